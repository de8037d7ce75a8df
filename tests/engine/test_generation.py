"""Everything `generate` and a hand-written loop can do goes on working with tokens removed."""

from __future__ import annotations

import inspect

import pytest
import tiny
import torch
from reference import MATTERS, TOLERANCE, apart, decode, kept, masked, uneven
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

import vlprune
from vlprune import PruningError
from vlprune.releases import CACHE

STAGES = [("projector",), ("2",), ("projector", "1", "3")]
every_stage = pytest.mark.parametrize("stages", STAGES, ids="+".join)


def removed(model, x):
    return kept(vlprune.trace(model), x["input_ids"], tiny.VISUAL)


def without_mask(x):
    return {k: v for k, v in x.items() if k != "attention_mask"}


@every_stage
@pytest.mark.parametrize("batch", [1, 3])
def test_static_cache(llava, reference, inputs, stages, batch):
    twin, model, x = reference(), llava(), inputs(batch)
    vlprune.wrap(model, uneven(*stages))
    tokens, logits, cache = decode(model, x, cache_implementation="static")
    with masked(twin, removed(model, x)):
        want_tokens, want_logits, _ = decode(twin, x)
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE
    longest = cache.layers[3].logical_max
    assert cache.layers[3].keys.shape[2] < longest
    assert longest >= x["input_ids"].shape[1] + 7
    assert longest == getattr(cache, "get_max_length", getattr(cache, "get_max_cache_shape", None))()


def test_static_cache_attention_is_read_from_written_slots(llava, inputs):
    """The library hands over all slots of a static cache and, without padding, no mask."""
    model = llava()
    for x in (inputs(1), without_mask(inputs(1)), inputs(3)):
        found = []
        for options in ({}, {"cache_implementation": "static"}):
            for plan in ("fastv@2:query=text:keep=5", "fastv@2:keep=5"):
                with vlprune.pruning(model, plan):
                    decode(model, x, 2, **options)
                    found.append([i.scores for i in vlprune.trace(model).stages[0].items])
        for dynamic, static in zip(found[:2], found[2:], strict=True):
            assert all(apart(a, b) < TOLERANCE for a, b in zip(dynamic, static, strict=True))


def test_static_cache_for_another_prompt(llava, inputs):
    model, x, y = llava(), inputs(1), inputs(1, seed=3)
    vlprune.wrap(model, uneven("2"))
    want = decode(model, y)[1]
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    model(**x, past_key_values=cache)
    with pytest.raises(PruningError, match="already holds tokens"):
        model(**y, past_key_values=cache)
    cache.reset()
    logits = [model(**y, past_key_values=cache).logits[:, -1]]
    for _ in range(7):
        logits.append(model(input_ids=logits[-1].argmax(-1)[None], past_key_values=cache).logits[:, -1])
    assert apart(torch.stack(logits, 1), want) < TOLERANCE


@every_stage
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mask", [True, False])
def test_without_a_cache(llava, reference, inputs, stages, batch, mask):
    """Without cache and mask the library looks for packed sequences: gaps in position_ids must not look like some."""
    twin, model = reference(), llava()
    x = inputs(batch) if mask else without_mask(inputs(batch))
    vlprune.wrap(model, uneven(*stages))
    logits = model(**x, use_cache=False).logits
    alive = removed(model, x)
    with masked(twin, alive):
        want = twin(**x, use_cache=False).logits
    real = torch.stack(list(alive.values())).all(0) & (inputs(batch)["attention_mask"].bool() if mask else True)
    assert apart(logits[real], want[real]) < TOLERANCE
    assert apart(twin(**x, use_cache=False).logits[real], want[real]) > MATTERS


@every_stage
def test_beam_search(llava, reference, inputs, grouped, stages):
    twin, model, x = reference(), llava(), inputs(3 if grouped else 1)
    vlprune.wrap(model, uneven(*stages))
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 10, "do_sample": False}
    sequences = model.generate(**x, **options)
    alive = kept(vlprune.trace(model), x["input_ids"].repeat_interleave(3, 0), tiny.VISUAL)
    with masked(twin, alive):
        assert torch.equal(sequences, twin.generate(**x, **options))


@pytest.mark.parametrize(
    "plan", ["visionzip:keep=6", "fastervlm:keep=6", "fastervlm@projector:keep=6", "fastervlm@2:keep=6"]
)
@pytest.mark.parametrize("copies", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_beams_share_what_the_tower_saw(llava, inputs, grouped, plan, copies):
    """Beams repeat a row with its pictures; each copy keeps the tokens of its picture."""
    if not grouped:
        pytest.skip("this transformers gives the beams of a prompt with two pictures twice the first")
    model, x = llava(), inputs(3)
    vlprune.wrap(model, plan)
    model(**x)
    alone = {(i.row, i.picture): i.cells_kept() for i in vlprune.trace(model).stages[0].items}
    assert len({tuple(c) for c in alone.values()}) > 1
    model.generate(**x, max_new_tokens=4, **copies)
    n = next(iter(copies.values()))
    repeated = {(i.row, i.picture): i.cells_kept() for i in vlprune.trace(model).stages[0].items}
    assert repeated == {(row * n + copy, picture): c for (row, picture), c in alone.items() for copy in range(n)}


def test_sampling_with_a_seed(llava, reference, inputs):
    twin, model, x = reference(), llava(), inputs(3)
    vlprune.wrap(model, uneven("projector", "2"))
    options = {"do_sample": True, "max_new_tokens": 12, "top_k": 20}
    torch.manual_seed(5)
    sequences = model.generate(**x, **options)
    with masked(twin, removed(model, x)):
        torch.manual_seed(5)
        assert torch.equal(sequences, twin.generate(**x, **options))


@every_stage
def test_chat_goes_on_with_the_pruned_cache(llava, reference, inputs, stages):
    twin, model, x = reference(), llava(), inputs(1)

    def two_turns(model):
        first = model.generate(**x, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13, 14]])], 1)
        mask = torch.ones_like(ids)
        return decode(model, {"input_ids": ids, "attention_mask": mask}, 6, past_key_values=first.past_key_values)

    vlprune.wrap(model, uneven(*stages))
    tokens, logits, _ = two_turns(model)
    with masked(twin, removed(model, x)):
        want_tokens, want_logits, _ = two_turns(twin)
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE


def test_a_chat_wrapped_later_goes_on_with_a_cache_of_another_plan(llava, reference, inputs):
    """The cache knows what it holds, whatever plan made it; layers below the new plan's first stage as well."""
    twin, model, x = reference(), llava(), inputs(1)
    more = torch.tensor([[11, 12, 13, 14]])
    vlprune.wrap(model, uneven("projector"))
    cache = model(**x).past_key_values
    alive = removed(model, x)
    vlprune.wrap(model, "fastv@3:keep=4")
    logits = model(input_ids=more, past_key_values=cache).logits
    with masked(twin, alive):
        want = twin(input_ids=more, past_key_values=twin(**x).past_key_values).logits
    assert apart(logits, want) < TOLERANCE


def second_turn(cache, batch=1, seed=9):
    """New text around a new picture."""
    g = torch.Generator().manual_seed(seed)
    picture = torch.full((batch, 16), tiny.IMG)
    text = [torch.randint(10, 99, (batch, n), generator=g) for n in (2, 3)]
    ids = torch.cat([text[0], picture, text[1]], 1)
    return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 32, 32, generator=g), "past_key_values": cache}


@every_stage
@pytest.mark.parametrize("batch", [1, 3])
def test_second_picture_on_a_pruned_cache(llava, reference, inputs, stages, batch):
    twin, model, x = reference(), llava(), inputs(batch)
    vlprune.wrap(model, uneven(*stages))

    def turns(model, then):
        cache = model(**x, use_cache=True).past_key_values
        middle = then()
        y = second_turn(cache, batch)
        mask = torch.cat([x["attention_mask"], torch.ones_like(y["input_ids"])], 1)
        out = model(**y, attention_mask=mask)
        mask = torch.cat([mask, mask[:, :1]], 1)
        last = model(input_ids=out.logits[:, -1:].argmax(-1), attention_mask=mask, past_key_values=out.past_key_values)
        return out.logits, last.logits, middle, y["input_ids"]

    logits, last, first, ids = turns(model, lambda: removed(model, x))
    again = kept(vlprune.trace(model), ids, tiny.VISUAL)
    alive = {k: torch.cat([first[k], again.get(k, torch.ones_like(ids, dtype=torch.bool))], 1) for k in first}
    with masked(twin, alive):
        want, want_last, _, _ = turns(twin, lambda: None)
    real = torch.stack(list(again.values())).all(0)
    assert apart(logits[real], want[real]) < TOLERANCE
    assert apart(last, want_last) < TOLERANCE


def test_second_picture_where_a_stage_has_nothing_left_to_do(llava, reference, inputs):
    """Layers then differ in what the first turn left them: their masks must not be shared."""
    twin, model, x = reference(), llava(), inputs(1)
    vlprune.wrap(model, "random@1:keep=12+uniform@3:keep=6")
    cache = model(**x).past_key_values
    first = removed(model, x)
    vlprune.wrap(model, "random@1:keep=6+uniform@3:keep=10")
    y = second_turn(cache)
    logits = model(**y).logits
    second = kept(vlprune.trace(model), y["input_ids"], tiny.VISUAL)
    assert second[1].sum() == second[3].sum() == 11
    with masked(twin, {k: torch.cat([first[k], second[k]], 1) for k in (1, 3)}):
        cache = twin(**x).past_key_values
        want = twin(**{**y, "past_key_values": cache}).logits
    assert apart(logits[second[1]], want[second[1]]) < TOLERANCE


def test_second_picture_with_compact_positions(llava, reference, inputs):
    """Equals the shorter conversation, fed as embeddings."""
    twin, model, x = reference(), llava(), inputs(1)
    vlprune.wrap(model, "uniform:keep=6+positions=compact")
    cache = model(**x).past_key_values
    first = removed(model, x)[0]
    y = second_turn(cache)
    out = model(**y)
    second = removed(model, y)[0]
    last = model(input_ids=torch.tensor([[33]]), past_key_values=out.past_key_values).logits

    embeds = []
    hook = twin.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    twin(**x)
    twin(**{**y, "past_key_values": None})
    hook.remove()
    one = twin(inputs_embeds=embeds[0][first][None])
    two = twin(inputs_embeds=embeds[1][second][None], past_key_values=one.past_key_values)
    want = twin(input_ids=torch.tensor([[33]]), past_key_values=two.past_key_values).logits
    assert apart(out.logits[second][None], two.logits) < TOLERANCE
    assert apart(last, want) < TOLERANCE


@every_stage
def test_hand_written_loop_without_positions(llava, reference, inputs, stages):
    twin, model, x = reference(), llava(), without_mask(inputs(1))

    def loop(model):
        out = model(**x, use_cache=True)
        logits = [out.logits[:, -1]]
        for _ in range(8):
            out = model(input_ids=logits[-1].argmax(-1, keepdim=True), past_key_values=out.past_key_values)
            logits.append(out.logits[:, -1])
        return torch.stack(logits, 1)

    vlprune.wrap(model, uneven(*stages))
    logits = loop(model)
    with masked(twin, removed(model, x)):
        assert apart(logits, loop(twin)) < TOLERANCE


@every_stage
@pytest.mark.parametrize("implementation", [None, "static"])
def test_prompt_lookup_crops_the_cache(llava, inputs, stages, implementation):
    if implementation == "static" and not hasattr(StaticLayer, "crop"):
        pytest.skip("transformers before 5.24 refuses prompt lookup on a static cache")
    model, x = llava(), inputs(1)
    room = (
        {} if implementation is None else {"max_cache_len": 60}
    )  # by itself the library guesses past a static cache's end
    vlprune.wrap(model, uneven(*stages))
    tokens = decode(model, x, 24)[0]
    crops = []
    with pytest.MonkeyPatch.context() as patch:
        crop = Cache.crop
        patch.setattr(Cache, "crop", lambda self, n: (crops.append(n), crop(self, n))[1])
        out = model.generate(**x, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=3, eos_token_id=999,
                             cache_implementation=implementation, **room)  # fmt: skip
    model.__dict__.pop("_cache", None)
    assert crops, "this prompt makes no candidates, so it tests nothing"
    assert torch.equal(out[:, -24:], tokens)


def test_assisted_decoding(llava, inputs):
    """The same weights, unpruned, guess for the pruned model."""
    model, x = llava(), inputs(1)
    assistant = tiny.llava()[0].model.language_model
    helper = tiny.tf.LlamaForCausalLM(assistant.config).eval()
    helper.generation_config = model.generation_config
    helper.model, helper.lm_head = assistant, model.lm_head
    try:
        model.generate(**x, max_new_tokens=4, do_sample=False, assistant_model=helper)
    except ValueError as error:
        if "pixel_values" not in str(error):
            raise
        pytest.skip("this transformers hands pictures to an assistant that reads text alone")
    vlprune.wrap(model, uneven("projector", "2"))
    tokens = decode(model, x, 16)[0]
    out = model.generate(**x, max_new_tokens=16, do_sample=False, assistant_model=helper)
    assert torch.equal(out[:, -16:], tokens)


def test_crop_into_the_pruned_prompt_is_refused(llava, inputs):
    model, x = llava(), inputs(1)
    vlprune.wrap(model, uneven("2"))
    cache = decode(model, x)[2]
    with pytest.raises(PruningError, match="cropped into the pruned prompt"):
        cache.layers[2].crop(-20)
    cache.layers[2].crop(-3)
    assert cache.layers[2].get_seq_length() == x["input_ids"].shape[1] + 4


@pytest.mark.skipif(not hasattr(StaticLayer, "crop"), reason="transformers before 5.24 has no crop for static caches")
def test_crop_into_the_pruned_prompt_of_a_static_cache_is_refused(llava, inputs):
    model, x = llava(), inputs(1)
    vlprune.wrap(model, uneven("2"))
    cache = decode(model, x, cache_implementation="static")[2]
    model.__dict__.pop("_cache", None)
    with pytest.raises(PruningError, match="cropped into the pruned prompt"):
        cache.layers[2].crop(-20)
    cache.layers[2].crop(-3)
    assert int(cache.layers[2].get_seq_length()) == x["input_ids"].shape[1] + 4


@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
def test_a_cache_under_any_name_the_release_takes(llava, reference, inputs, name):
    """transformers 5.24 says `cache` for `past_key_values` and still takes the old word."""
    twin, model, x = reference(), llava(), without_mask(inputs(1))
    vlprune.wrap(model, uneven("projector", "2"))

    def two_steps(model):
        cache = DynamicCache(config=model.config.get_text_config())
        first = model(**x, **{name: cache}, use_cache=True).logits[:, -1:]
        assert cache.get_seq_length() == x["input_ids"].shape[1]
        return torch.cat([first, model(input_ids=first.argmax(-1), **{name: cache}, use_cache=True).logits], 1)

    logits = two_steps(model)
    with masked(twin, removed(model, x)):
        assert apart(logits, two_steps(twin)[:, -len(logits[0]) :]) < TOLERANCE


@pytest.mark.parametrize("plan", ["visionzip:keep=6", "fastervlm:keep=6", "fastv@2:keep=6"])
def test_prompt_as_embeddings(llava, inputs, plan):
    model, x = llava(), inputs(3)
    embeds = model.get_input_embeddings()(x["input_ids"])
    y = {**{k: v for k, v in x.items() if k != "input_ids"}, "inputs_embeds": embeds}
    vlprune.wrap(model, plan)
    assert torch.equal(model(**x).logits, model(**y).logits)
    assert torch.equal(decode(model, x)[1], decode(model, y)[1])


def test_embeddings_with_the_pictures_already_in_are_pointed_out(llava, inputs):
    model, x = llava(), inputs(1)
    embeds = model.get_input_embeddings()(x["input_ids"])
    features = torch.cat(model.get_image_features(x["pixel_values"], return_dict=True).pooler_output)
    embeds = embeds.masked_scatter((x["input_ids"] == tiny.IMG)[..., None], features)
    want = model(**x).logits
    vlprune.wrap(model, "fastervlm:keep=6")
    with pytest.warns(UserWarning, match="nothing is pruned"):
        logits = model(inputs_embeds=embeds).logits
    assert torch.equal(logits, want)


def test_features_from_elsewhere_are_refused(llava, inputs):
    model, x = llava(), inputs(1)
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this transformers takes no features in place of pictures")
    out = model.get_image_features(x["pixel_values"], return_dict=True)
    vlprune.wrap(model, "fastervlm:keep=6")
    with pytest.raises(PruningError, match="before the model was wrapped"):
        model(input_ids=x["input_ids"], mm_encoder_outputs={"image": out})
    out = model.get_image_features(x["pixel_values"], return_dict=True)
    assert torch.equal(model(input_ids=x["input_ids"], mm_encoder_outputs={"image": out}).logits, model(**x).logits)


@pytest.mark.parametrize("size", [4, 10, 19, 100])
def test_chunked_prefill_is_refused(llava, inputs, size):
    model, x = llava(), inputs(1)
    vlprune.wrap(model, "fastv:keep=6")
    with pytest.raises(PruningError, match="prefill_chunk_size"):
        model.generate(**x, max_new_tokens=2, prefill_chunk_size=size)
    assert model.generate(**x, max_new_tokens=2).shape[1] == x["input_ids"].shape[1] + 2


@every_stage
def test_cache_that_knows_no_config(llava, reference, inputs, stages):
    twin, model, x = reference(), llava(), inputs(3)
    vlprune.wrap(model, uneven(*stages))
    tokens, logits, _ = decode(model, x, past_key_values=DynamicCache())
    with masked(twin, removed(model, x)):
        want_tokens, want_logits, _ = decode(twin, x)
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE


@pytest.mark.parametrize("plan", ["random:keep=6", "visionzip:keep=6", "fastv@2:keep=6"])
def test_text_alone_is_left_alone(llava, plan):
    model = llava()
    ids = torch.randint(10, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    x = {"input_ids": ids, "attention_mask": (torch.arange(9) > torch.tensor([[-1], [2]])).long()}
    before = decode(model, x)
    vlprune.wrap(model, plan)
    after = decode(model, x)
    assert torch.equal(before[1], after[1])
    with pytest.raises(PruningError, match="nothing to trace yet"):
        vlprune.trace(model)


def test_a_generated_token_with_a_placeholders_id_is_text(llava, inputs):
    """Several tokens at once, as in a second turn: no features came for them."""
    model, x = llava(), inputs(1)
    vlprune.wrap(model, "uniform:keep=6")
    cache = model(**x).past_key_values
    more = model(input_ids=torch.tensor([[11, tiny.IMG, 12]]), past_key_values=cache)
    assert more.logits.shape[1] == 3
    assert vlprune.trace(model).prompt == x["input_ids"].shape[1]


def test_placeholders_without_pictures_are_pointed_out(llava, inputs):
    model, x = llava(), inputs(1)
    vlprune.wrap(model, "uniform:keep=6")
    with pytest.raises(PruningError, match="16 image placeholders came without pixels"):
        model(input_ids=x["input_ids"])


def test_prompt_that_ends_with_a_picture(llava, reference, inputs):
    """What follows is predicted from the last token that stayed, as in the really shorter prompt."""
    twin, model = reference(), llava()
    x = {k: v[:, :19] if k != "pixel_values" else v for k, v in inputs(1).items()}
    vlprune.wrap(model, "fastv@2:keep=6")
    logits = model(**x).logits
    alive = removed(model, x)
    assert not alive[2][0, -1]
    with masked(twin, alive):
        want = twin(**x).logits
    assert apart(logits[alive[2]], want[alive[2]]) < TOLERANCE
    assert torch.equal(logits[0, -1], logits[0, alive[2][0].nonzero()[-1, 0]])
