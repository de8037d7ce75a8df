"""The ways people run a model, wrapped: each gives what the reference gives, or is refused by one clear error.

Padding, beams, assisted decoding, static caches and gradients have their own files; docs/running.md says which test holds what.
"""

from __future__ import annotations

import copy
import re
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers as tf
from PIL import Image
from reference import MATTERS, TOLERANCE, apart, decode, kept, masked, uneven
from transformers import cache_utils

import vlprune
from vlprune import PruningError

STAGES = [("projector",), ("2",), ("projector", "1", "3")]
every_stage = pytest.mark.parametrize("stages", STAGES, ids="+".join)
EMBEDDED = Path(vlprune.__file__).parent / "models" / "tiny-llava"


def removed(model, x):
    return kept(vlprune.trace(model), x["input_ids"], tiny.VISUAL)


@pytest.fixture
def fresh():
    return tiny.llava()[0]


# ---- padding


@every_stage
def test_right_padding_and_steps_behind_it(llava, reference, inputs, stages):
    """A loop that takes each row's own last token and counts its positions; the pads stay where they are."""
    twin, model, x = reference(), llava(), inputs(3)
    mask = x["attention_mask"]
    right = {**x, **{n: torch.stack([row.roll(-int((m == 0).sum())) for row, m in zip(x[n], mask, strict=True)])
                     for n in ("input_ids", "attention_mask")}}  # fmt: skip

    def loop(model):
        ends, seen = right["attention_mask"].sum(1, keepdim=True), right["attention_mask"]
        out = model(**right, position_ids=(seen.cumsum(1) - 1).clamp(min=0))
        logits = [out.logits.gather(1, (ends - 1)[..., None].expand(-1, -1, 99))[:, 0]]
        for step in range(6):
            seen = torch.cat([seen, torch.ones_like(ends)], 1)
            out = model(input_ids=logits[-1].argmax(-1, keepdim=True), attention_mask=seen, position_ids=ends + step,
                        past_key_values=out.past_key_values)  # fmt: skip
            logits.append(out.logits[:, -1])
        return torch.stack(logits, 1)

    vlprune.wrap(model, uneven(*stages))
    logits, plain = loop(model), loop(twin)
    with masked(twin, removed(model, right)):
        want = loop(twin)
    assert apart(logits, want) < TOLERANCE
    assert apart(plain, want) > MATTERS
    vlprune.wrap(model, uneven(*stages))
    assert apart(decode(model, x, 7)[1], want) < TOLERANCE, "the same prompts, padded on the left"


# ---- generate


def gets_pictures(main, assistant, x):
    """Whether the library hands an assistant model the pictures of the prompt."""
    shown = []
    hook = assistant.model.register_forward_pre_hook(
        lambda module, args, kw: shown.append(bool(kw.get("mm_encoder_outputs") or kw.get("pixel_values") is not None)),
        with_kwargs=True,
    )
    main.generate(**x, max_new_tokens=2, do_sample=False, assistant_model=assistant)
    hook.remove()
    return shown[0]


def test_a_wrapped_assistant(llava, fresh, inputs):
    """Its guesses are checked by the main model, so they change no token; without pictures it has nothing to prune."""
    main, assistant, x = llava(), fresh, inputs(1)
    want = decode(main, x, 16)[0]
    seeing = gets_pictures(main, assistant, x)
    vlprune.wrap(assistant, "uniform:keep=6")
    with nullcontext() if seeing else pytest.raises(PruningError, match="leave an assistant model unwrapped"):
        tokens = main.generate(**x, max_new_tokens=16, do_sample=False, assistant_model=assistant)
        assert torch.equal(tokens[:, -16:], want)
        assert vlprune.trace(assistant).kept == 6


class Collect(tf.generation.streamers.BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_a_streamer_sees_every_token(llava, inputs):
    model, x, streamer = llava(), inputs(1), Collect()
    vlprune.wrap(model, uneven("projector", "2"))
    want = decode(model, x, 12)[0]
    model.generate(**x, max_new_tokens=12, do_sample=False, streamer=streamer)
    assert streamer.ended
    assert streamer.tokens == x["input_ids"][0].tolist() + want[0].tolist()


@pytest.fixture(scope="module")
def embedded():
    """The checkpoint that vlprune ships, its processor, a picture."""
    model = tf.LlavaForConditionalGeneration.from_pretrained(EMBEDDED).eval()
    pixels = np.random.default_rng(0).integers(0, 255, (2, 60, 90, 3), dtype=np.uint8)
    yield model, tf.AutoProcessor.from_pretrained(EMBEDDED), [Image.fromarray(p) for p in pixels]
    vlprune.unwrap(model, missing_ok=True)


def question(picture, text="What colour is it?"):
    content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def test_text_streamers(embedded, capsys):
    model, processor, pictures = embedded
    x = processor.apply_chat_template(question(pictures[0]), tokenize=True, return_dict=True, return_tensors="pt",
                                      add_generation_prompt=True)  # fmt: skip
    vlprune.wrap(model, "uniform:keep=36+fastv@1:keep=12")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    text = processor.decode(model.generate(**x, **options)[0, x["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text
    iterator = tf.TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    thread = threading.Thread(target=model.generate, kwargs={**x, **options, "streamer": iterator})
    thread.start()
    assert "".join(iterator) == text
    thread.join()
    capsys.readouterr()
    model.generate(
        **x, **options, streamer=tf.TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    assert capsys.readouterr().out.strip() == text.strip()


def test_pipeline(embedded):
    """One prompt, and several in a batch, where padding differs."""
    model, processor, pictures = embedded
    prompts = [question(pictures[0]), question(pictures[1], "How many circles are there in this picture?")]
    vlprune.wrap(model, "uniform:keep=36+fastv@1:keep=12")
    want = []
    for prompt in prompts:
        x = processor.apply_chat_template(prompt, tokenize=True, return_dict=True, return_tensors="pt",
                                          add_generation_prompt=True)  # fmt: skip
        new = model.generate(**x, max_new_tokens=6, do_sample=False)[0, x["input_ids"].shape[1] :]
        want.append(processor.decode(new, skip_special_tokens=True))
    pipe = tf.pipeline("image-text-to-text", model=model, processor=processor)
    options = {"return_full_text": False, "generate_kwargs": {"max_new_tokens": 6, "do_sample": False}}
    answers = pipe(text=prompts, **options)
    assert [a[0]["generated_text"] if isinstance(a, list) else a["generated_text"] for a in answers] == want
    assert vlprune.trace(model).kept == 12
    assert pipe.model is model


# ---- caches


def shorter(model, x, alive, cache, steps=8):
    """Greedy logits [1, steps, V] of a bare model that is fed the merged embeddings of what stays, at their own positions."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**x)
    hook.remove()
    at = alive.nonzero()[:, 1][None]
    out = model(inputs_embeds=seen[0][:, at[0]], position_ids=at, past_key_values=cache)
    logits = [out.logits[:, -1]]
    for step in range(steps - 1):
        position = torch.tensor([[alive.shape[1] + step]])
        out = model(input_ids=logits[-1].argmax(-1)[None], position_ids=position, past_key_values=out.past_key_values)
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


def quantised(backend, model):
    if backend == "quanto":
        pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    elif backend == "hqq":
        pytest.importorskip("hqq", reason="needs hqq")
    elif not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no fp8 cache")
    options = {} if backend == "fp8" else {"q_group_size": 8, "residual_length": 4}
    return tf.QuantizedCache(backend, model.config, **options)


@pytest.mark.parametrize("backend", ["fp8", "quanto", "hqq"])
def test_quantised_cache(llava, reference, inputs, backend):
    """The survivors alone are quantised: exactly what the shorter prompt has in such a cache."""
    model, twin, x = llava(), reference(), inputs(1)
    vlprune.wrap(model, uneven("projector"))
    tokens, logits, cache = decode(model, x, past_key_values=quantised(backend, model))
    alive = removed(model, x)[0]
    want = shorter(twin, x, alive, quantised(backend, twin))
    assert apart(logits, want) < TOLERANCE
    assert torch.equal(tokens, want.argmax(-1))
    assert apart(want, shorter(twin, x, alive, tf.DynamicCache())) > TOLERANCE, (
        "it must lose something, or it shows nothing"
    )
    assert cache.get_seq_length() == x["input_ids"].shape[1] + 7
    assert cache.layers[0].cumulative_length == int(alive.sum()) + 7


class Lossless(cache_utils.QuantizedLayer):
    """A backend that loses nothing, so results can be held against masking."""

    def _quantize(self, tensor, axis):
        return tensor.clone()

    def _dequantize(self, tensor):
        return tensor


def lossless():
    return cache_utils.Cache(layers=[Lossless(residual_length=3) for _ in range(4)])


@every_stage
@pytest.mark.parametrize("batch", [1, 3])
def test_quantised_cache_at_every_stage(llava, reference, inputs, stages, batch):
    twin, model, x = reference(), llava(), inputs(batch)
    vlprune.wrap(model, uneven(*stages))
    tokens, logits, _ = decode(model, x, past_key_values=lossless())
    with masked(twin, removed(model, x)):
        want_tokens, want_logits, _ = decode(twin, x)
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE


def test_beams_on_a_quantised_cache(llava, reference, inputs):
    twin, model, x = reference(), llava(), inputs(1)
    options = {"num_beams": 3, "max_new_tokens": 10, "do_sample": False}
    plain = twin.generate(**x, **options)
    try:
        follows = torch.equal(plain, twin.generate(**x, **options, past_key_values=lossless()))
    except IndexError:
        follows = False
    if not follows:
        pytest.skip("this transformers cannot reorder a quantised cache")
    vlprune.wrap(model, uneven("projector", "2"))
    want = model.generate(**x, **options)
    assert torch.equal(model.generate(**x, **options, past_key_values=lossless()), want)


def test_what_a_quantised_cache_cannot_do_is_refused(llava, inputs):
    model, x = llava(), inputs(1)
    vlprune.wrap(model, uneven("cache"))
    with pytest.raises(PruningError, match="those of a quantised cache are packed"):
        decode(model, x, past_key_values=lossless())
    vlprune.wrap(model, uneven("projector"))
    cache = model(**x, past_key_values=lossless()).past_key_values
    with pytest.raises(PruningError, match="a quantised cache cannot be cropped"):
        cache.crop(-2)


class NoStream:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait_stream(self, other):
        pass


@pytest.fixture
def offloading(monkeypatch):
    """Offloading is for GPUs. Here another dtype stands for another device: what was sent away cannot be attended to."""
    layer = cache_utils.CacheLayerMixin
    sent = []

    def offload(self):
        if self.is_initialized:
            sent.append(self)
            self.keys, self.values = self.keys.double(), self.values.double()

    def prefetch(self):
        if self.is_initialized:
            self.keys, self.values = self.keys.float(), self.values.float()

    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: NoStream())
    monkeypatch.setattr(layer, "offload", offload)
    monkeypatch.setattr(layer, "prefetch", prefetch)
    return sent


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("stages", [*STAGES, ("cache",), ("1", "cache")], ids="+".join)
def test_offloaded_cache(llava, inputs, offloading, stages, implementation):
    model, x = llava(), inputs(3)
    vlprune.wrap(model, uneven(*stages))
    want_tokens, want_logits, _ = decode(model, x)
    tokens, logits, cache = decode(model, x, cache_implementation=implementation)
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE
    assert {type(layer).__name__ for layer in offloading} >= {type(cache.layers[3]).__name__}
    model.__dict__.pop("_cache", None)


def test_second_turn_on_an_offloaded_cache(llava, inputs, offloading):
    model, x, y = llava(), inputs(1), inputs(1, seed=4)
    vlprune.wrap(model, uneven("2"))
    logits = []
    for cache in (tf.DynamicCache(), tf.DynamicCache(offloading=True)):
        model(**x, past_key_values=cache)
        mask = torch.ones(1, 2 * x["input_ids"].shape[1], dtype=torch.long)
        logits.append(model(**{**y, "attention_mask": mask}, past_key_values=cache).logits)
    assert apart(*logits) < TOLERANCE


# ---- where the weights are, and in what numbers


@pytest.mark.parametrize(
    "plan", ["visionzip:keep=6", "flowcut:keep=6", "himap@2:keep=6", "uniform:keep=8+fastv@cache:keep=4"]
)
def test_device_map(fresh, inputs, tmp_path, plan):
    """Weights wait on disk and come in module by module; accelerate moves what goes in and out."""
    pytest.importorskip("accelerate", reason="needs accelerate")
    x = inputs(3)
    with vlprune.pruning(fresh, plan):
        want = decode(fresh, x)
    fresh.save_pretrained(tmp_path / "checkpoint")
    places = {"model.vision_tower": "disk", "model.multi_modal_projector": "disk", "lm_head": "cpu",
              "model.language_model.embed_tokens": "cpu", "model.language_model.norm": "disk",
              "model.language_model.rotary_emb": "cpu", "model.language_model.layers.0": "cpu",
              "model.language_model.layers.1": "disk", "model.language_model.layers.2": "cpu",
              "model.language_model.layers.3": "disk"}  # fmt: skip
    model = tf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint", device_map=places,
                                                             offload_folder=tmp_path / "disk").eval()  # fmt: skip
    model.generation_config = fresh.generation_config
    assert next(model.model.language_model.layers[3].parameters()).device.type == "meta"
    vlprune.wrap(model, plan)
    found = decode(model, x)
    assert torch.equal(found[0], want[0])
    assert apart(found[1], want[1]) < TOLERANCE
    assert vlprune.trace(model).kept < vlprune.trace(model).visual or "cache" in plan
    vlprune.wrap(model, "zoo_prune:keep=6")
    with pytest.raises(PruningError, match="give the projector a device of its own"):
        model(**x)
    vlprune.unwrap(model)
    assert torch.equal(decode(model, x)[1], decode(fresh, x)[1])


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_that_is_not_installed_is_the_librarys_to_refuse(fresh, inputs, implementation):
    """tests/engine/test_flash.py runs its glue with stand-in kernels."""
    available = getattr(tf.utils, f"is_flash_attn_{implementation[-1]}_available")
    if available():
        pytest.skip(f"{implementation} is installed")
    x = inputs(3)
    vlprune.wrap(fresh, "fastv@2:keep=6")
    want = decode(fresh, x)[1]
    refusals = []
    for model in (fresh, tiny.llava()[0]):
        with pytest.raises((ImportError, ValueError)) as refusal:
            model.set_attn_implementation(implementation)
        refusals.append(str(refusal.value))
    assert refusals[0] == refusals[1], "in the library's own words"
    assert torch.equal(decode(fresh, x)[1], want)


def test_flex_attention_is_refused(fresh, inputs):
    """tests/test_api.py has it at wrap time; here a wrapped model is switched to it."""
    x = inputs(3)
    vlprune.wrap(fresh, "uniform:keep=6")
    want = decode(fresh, x)[1]
    fresh.set_attn_implementation({"text_config": "flex_attention"})
    with pytest.raises(PruningError, match="flex attention"):
        fresh(**x)
    fresh.set_attn_implementation("sdpa")
    assert torch.equal(decode(fresh, x)[1], want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_stage
def test_half_precision(inputs, stages, dtype):
    """Rounding happens at other places; the pruned run is no further from masking than the attention functions are apart."""
    x = inputs(3)
    x["pixel_values"] = x["pixel_values"].to(dtype)
    model, twin, bare = (tiny.llava(attn)[0].to(dtype) for attn in ("sdpa", "eager", "sdpa"))
    vlprune.wrap(model, uneven(*stages))
    logits = model(**x).logits
    alive = removed(model, x)
    with masked(twin, alive):
        want = twin(**x).logits
    left = torch.stack(list(alive.values())).all(0) & x["attention_mask"].bool()
    plain = twin(**x).logits
    rounding = apart(bare(**x).logits[left], plain[left])
    assert logits.dtype == dtype
    assert apart(logits[left], want[left]) < 2 * rounding < apart(plain[left], want[left])
    assert decode(model, x, 4)[1].isfinite().all()


def test_autocast(inputs):
    """Weights in float32, products in bfloat16."""
    model, twin, bare, x = tiny.llava()[0], tiny.llava("eager")[0], tiny.llava()[0], inputs(3)
    vlprune.wrap(model, uneven("projector", "2"))
    with torch.autocast("cpu", torch.bfloat16):
        bare_logits, logits, _ = bare(**x).logits, model(**x).logits, decode(model, x, 4)
        alive = removed(model, x)
        with masked(twin, alive):
            want = twin(**x).logits
        left = torch.stack(list(alive.values())).all(0) & x["attention_mask"].bool()
        plain = twin(**x).logits[left]
    # spreads, not maxima: the largest of many roundings depends on the processor
    rounding, error = (bare_logits[left] - plain).std(), (logits[left] - want[left]).std()
    assert error < 2 * rounding < (plain - want[left]).std()


@pytest.mark.parametrize("plan", ["fastv@2:keep=6", "visionzip:keep=6", "flowcut:keep=6", "uniform@cache:keep=6"])
def test_inference_mode(llava, inputs, plan):
    """The cache it leaves serves a later step outside as well."""
    model, x = llava(), inputs(3)
    vlprune.wrap(model, plan)
    want = decode(model, x)
    with torch.inference_mode():
        found = decode(model, x)
        cache = model(**x).past_key_values
    assert torch.equal(found[0], want[0])
    assert torch.equal(found[1], want[1])
    mask = torch.cat([x["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    step = {"input_ids": want[0][:, :1], "attention_mask": mask}
    a = model(**step, past_key_values=cache).logits
    assert torch.equal(a, model(**step, past_key_values=model(**x).past_key_values).logits)


# ---- adapters (PEFT)


def with_lora(model):
    """In tower, projector and decoder; the matrices that would start at zero are random, and the same each time."""
    peft = pytest.importorskip("peft", reason="needs peft")
    where = r".*(q_proj|k_proj|v_proj|fc1|linear_1|down_proj)"
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=where, init_lora_weights=False))


@pytest.mark.parametrize("order", ["wrapped first", "LoRA first"])
@pytest.mark.parametrize("plan", ["fastv@2:keep=6", "visionzip:keep=6", "zoo_prune:keep=6", "himap@2:keep=6"])
def test_lora_on_top_and_underneath(fresh, inputs, plan, order):
    """Equals the plain model with the same LoRA weights merged into it."""
    x = inputs(3)
    merged = with_lora(tiny.llava()[0]).merge_and_unload()
    with vlprune.pruning(merged, plan):
        want = decode(merged, x)
    if order == "wrapped first":
        vlprune.wrap(fresh, plan)
    tuned = with_lora(fresh)
    if order == "LoRA first":
        vlprune.wrap(tuned.get_base_model(), plan)
    found = decode(tuned, x)
    assert torch.equal(found[0], want[0])
    assert apart(found[1], want[1]) < TOLERANCE
    assert vlprune.trace(fresh).kept == 24
    with tuned.disable_adapter(), vlprune.pruning(tiny.llava()[0], plan) as plain:
        assert apart(decode(tuned, x)[1], decode(plain, x)[1]) < TOLERANCE
    assert apart(tuned(**x).logits, merged(**x).logits) > MATTERS
    vlprune.unwrap(fresh)
    assert apart(tuned(**x).logits, merged(**x).logits) < TOLERANCE


def test_a_peft_model_names_what_to_wrap(fresh):
    tuned = with_lora(fresh)
    with pytest.raises(vlprune.UnsupportedModel, match=r"get_base_model\(\)"):
        vlprune.wrap(tuned, "fastv@2:keep=6")


def test_training_lora_on_a_wrapped_model(fresh, inputs, tmp_path):
    """Gradients reach every LoRA matrix and nothing else, and steps lower the loss; what is saved is the adapter alone."""
    x = inputs(3)
    labels = x["input_ids"].masked_fill((x["input_ids"] == tiny.IMG) | (x["attention_mask"] == 0), -100)
    vlprune.wrap(fresh, "fastv@2:keep=6")
    tuned = with_lora(fresh).train()
    optimiser = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    with torch.enable_grad():
        for _ in range(3):
            optimiser.zero_grad()
            loss = tuned(**x, labels=labels).loss
            loss.backward()
            losses.append(loss.item())
            optimiser.step()
    moved = {n for n, p in tuned.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    last = "vision_tower.encoder.layers.4", "vision_tower.vision_model.encoder.layers.4"  # a block nobody reads
    assert moved == {n for n, p in tuned.named_parameters() if p.requires_grad and not any(b in n for b in last)}
    assert all("lora" in n for n in moved)
    assert losses[2] < losses[0]
    tuned.save_pretrained(tmp_path)
    assert "vlprune" not in "".join(p.read_text() for p in tmp_path.glob("*.json"))


# ---- several models


def test_several_wrapped_models_take_turns(inputs):
    """Another plan on each; none sees another's prompt."""
    plans = ["fastv@2:keep=6", "visionzip:keep=4", "uniform@cache:keep=5", "fastv@2:keep=3"]
    prompts = [inputs(3), inputs(2, seed=2), inputs(1, seed=3), inputs(3, seed=4)]
    models = [tiny.llava()[0] for _ in plans]
    want = []
    for model, plan, x in zip(models, plans, prompts, strict=True):
        with vlprune.pruning(model, plan):
            want.append(decode(model, x)[1])
    for model, plan in zip(models, plans, strict=True):
        vlprune.wrap(model, plan)
    masks = [x["attention_mask"] for x in prompts]
    outs = [model(**x, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
            for model, x, mask in zip(models, prompts, masks, strict=True)]  # fmt: skip
    for step in range(4):  # one step of each in turn
        for i, model in enumerate(models):
            assert apart(outs[i].logits[:, -1], want[i][:, step]) < TOLERANCE
            masks[i] = torch.cat([masks[i], torch.ones_like(masks[i][:, :1])], 1)
            positions = (masks[i].cumsum(1) - 1)[:, -1:]
            outs[i] = model(input_ids=want[i][:, step].argmax(-1, keepdim=True), attention_mask=masks[i],
                            position_ids=positions, past_key_values=outs[i].past_key_values)  # fmt: skip


def test_several_wrapped_models_in_threads(inputs):
    plans = ["fastv@2:keep=6", "visionzip:keep=4", "uniform@cache:keep=5"]
    models = [vlprune.wrap(tiny.llava()[0], plan) for plan in plans]
    models.append(copy.deepcopy(models[0]))
    x = inputs(3)
    want = [decode(model, x, 6)[1] for model in models]
    wrong = []

    def work(model, logits):
        try:
            with torch.no_grad():
                wrong.extend("other logits" for _ in range(4) if not torch.equal(decode(model, x, 6)[1], logits))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- replay


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("plan", ["uniform:keep=5", "fastv@2:keep=5"])
def test_replay(llava, inputs, attn, plan):
    """Eager attention always has a mask, which must cover the slots of the static cache that are still empty."""
    model, x, y = llava(attn), inputs(1), inputs(1, seed=5)
    vlprune.wrap(model, plan)
    want = decode(model, y, 8)[0]
    assert torch.equal(vlprune.replay(model, x, new_tokens=8).generate(y), want)


# ---- the page


def test_the_page_names_tests_that_exist():
    """docs/running.md: `file.py::test_name`, and behind it other tests of that file by their names alone."""
    root = Path(__file__).parents[2]
    named = 0
    rows = (root / "docs" / "running.md").read_text().splitlines()
    for row in (r for r in rows if r.startswith("|")):
        source = ""
        for path, name in re.findall(r"`([\w/]+\.py)?(?:::)?(test_\w+)?`", row):
            source = (root / "tests" / path).read_text() if path else source
            if name:
                assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{name} in: {row}"
                named += 1
    assert named > 40
