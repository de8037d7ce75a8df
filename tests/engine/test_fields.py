"""What a pruner is shown in the decoder is what an eager model computes."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import tiny
import torch
import transformers.models.llama.modeling_llama as llama
from reference import TOLERANCE, apart, kept, masked

import vlprune
from vlprune import Budget, Plan, Pruner, Selection, Stage, Step

FIELDS = {
    "features", "text_features", "text_embeddings", "queries", "keys", "values", "last_query", "last_value", "text_keys",
    "last_attention", "text_attention", "next_attention", "norm",
}  # fmt: skip


class Look(Pruner):
    """Keeps the first tokens and remembers what it was shown."""

    name = "look"

    def __init__(self, needs):
        self.__dict__.update(needs=frozenset(needs), seen=[])

    def select(self, ctx):
        self.seen.append(ctx)
        return Selection(torch.arange(ctx.keep))


@pytest.fixture
def calls(monkeypatch):
    """Every eager attention call of a Llama: query, key, value after RoPE, and its weights."""
    made = []
    original = llama.eager_attention_forward

    def record(module, query, key, value, *args, **kwargs):
        out = original(module, query, key, value, *args, **kwargs)
        made.append((query, key, value, out[1]))
        return out

    monkeypatch.setattr(llama, "eager_attention_forward", record)
    return made


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_fields_of_a_decoder_stage(llava, reference, inputs, calls, layer, early, attn):
    twin, model, x = reference(), llava(attn), inputs(2)
    look = Look(FIELDS)
    steps = vlprune.Plan.parse("random@projector:keep=9").steps if early else ()
    vlprune.wrap(model, Plan((*steps, Step(look, Stage(str(layer)), Budget(5)))))
    model(**x)
    alive = kept(vlprune.trace(model), x["input_ids"], tiny.VISUAL, ("projector",))
    vlprune.unwrap(model)
    calls.clear()
    with masked(twin, alive):
        hidden = twin(**x, output_hidden_states=True).hidden_states
    compare(look.seen, x, alive.get(0), hidden, calls, layer)


def compare(contexts, x, alive, hidden, calls, layer):
    """calls[i]: layer i's q, k, v [B, H or Hkv, T, d] and weights; hidden[i]: what enters layer i."""
    query, key, value, weights = calls[layer - 1]
    ahead = calls[layer][3]
    pictures = [(row, p) for row, ids in enumerate(x["input_ids"]) for p in (ids == tiny.IMG).nonzero()[:, 0].split(16)]
    for (row, picture), ctx in zip(pictures, contexts, strict=True):
        here = picture if alive is None else picture[alive[row, picture]]
        text = torch.arange(int(picture[-1]) + 1, x["input_ids"].shape[1])
        text = text[x["input_ids"][row, text] != tiny.IMG]
        pairs = {
            "features": hidden[layer][row, here],
            "text_features": hidden[layer][row, text],
            "text_embeddings": hidden[0][row, text],
            "queries": query[row][:, here],
            "keys": key[row][:, here],
            "values": value[row][:, here],
            "last_query": query[row][:, -1],
            "last_value": value[row][:, -1],
            "text_keys": key[row][:, text],
            "last_attention": weights[row, :, -1][:, here],
            "text_attention": weights[row][:, text][:, :, here].transpose(0, 1),
            "next_attention": ahead[row, :, -1][:, here],
        }
        for name, want in pairs.items():
            assert apart(getattr(ctx, name), want) < TOLERANCE, name
        assert ctx.index is None if alive is None else torch.equal(ctx.index, here - picture[0])
        assert (ctx.layer, ctx.layers, ctx.keep, ctx.tokens) == (layer, 4, 5, len(here))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("layer", [0, 2])
def test_fields_in_a_second_turn(llava, reference, inputs, calls, layer, static):
    """Columns of the turn before lie in front."""
    twin, model, x = reference(), llava(), inputs(1)
    del x["attention_mask"]
    look, cache = Look(FIELDS if layer else {"features", "text_features", "next_attention"}), None
    if static:
        cache = tiny.tf.StaticCache(config=model.config.text_config, max_cache_len=64)
    text = {"input_ids": torch.tensor([[31, 32, 33]])}
    first = model(**text, past_key_values=cache)
    vlprune.wrap(model, Plan((Step(look, Stage(str(layer)), Budget(5)),)))
    refused = pytest.raises(vlprune.PruningError, match="already holds tokens") if static else nullcontext()
    with refused:
        model(**x, past_key_values=first.past_key_values)
    vlprune.unwrap(model)
    (ctx,) = look.seen
    start = twin(**text)
    calls.clear()
    hidden = twin(**x, past_key_values=start.past_key_values, output_hidden_states=True).hidden_states
    places = (x["input_ids"][0] == tiny.IMG).nonzero()[:, 0]
    assert apart(ctx.features, hidden[layer][0, places]) < TOLERANCE
    assert apart(ctx.next_attention, calls[layer][3][0, :, -1][:, places + 3]) < 1e-5
    if layer:
        query, key, value, weights = calls[layer - 1]
        assert apart(ctx.last_attention, weights[0, :, -1][:, places + 3]) < 1e-5
        assert apart(ctx.text_attention, weights[0][:, 19:][:, :, places + 3].transpose(0, 1)) < 1e-5
        assert apart(ctx.keys, key[0][:, places + 3]) < TOLERANCE
        assert apart(ctx.values, value[0][:, places + 3]) < TOLERANCE
        assert apart(ctx.text_keys, key[0][:, 22:]) < TOLERANCE
        assert apart(ctx.last_value, value[0][:, -1]) < TOLERANCE
        assert apart(ctx.queries, query[0][:, places]) < TOLERANCE


@pytest.mark.parametrize("layer", [1, 2])
def test_attention_ahead_on_a_pruned_cache(llava, reference, inputs, calls, layer):
    """The row runs over what the turn before left in the layer's own cache."""
    twin, model, x = reference(), llava(), inputs(3)
    vlprune.wrap(model, "uniform@2:keep=6")
    first = model(**x)
    gone = kept(vlprune.trace(model), x["input_ids"], tiny.VISUAL)
    look = Look({"next_attention", "last_attention"})
    vlprune.wrap(model, Plan((Step(look, Stage(str(layer)), Budget(5)),)))
    ids = torch.cat([torch.full((3, 16), tiny.IMG), torch.tensor([[22, 23]] * 3)], 1)
    y = {
        "input_ids": ids,
        "pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        "attention_mask": torch.cat([x["attention_mask"], torch.ones_like(ids)], 1),
    }
    model(**y, past_key_values=first.past_key_values)
    with masked(twin, gone):
        start = twin(**x)
        calls.clear()
        twin(**y, past_key_values=start.past_key_values)
    length = x["input_ids"].shape[1]
    for row, ctx in enumerate(look.seen):
        assert apart(ctx.next_attention, calls[layer][3][row, :, -1, length : length + 16]) < 1e-5
        assert apart(ctx.last_attention, calls[layer - 1][3][row, :, -1, length : length + 16]) < 1e-5


def test_image_sizes_reach_the_picture_they_belong_to(llava, inputs, grouped):
    model, x = llava(), inputs(3)
    look = Look({"image_size", "features"})
    vlprune.wrap(model, Plan((Step(look, Stage("2"), Budget(5)),)))
    sizes = [(10, 20), (30, 40), (50, 60), (70, 80)]
    with vlprune.image_sizes(model, sizes):
        model(**x)
        assert [c.image_size for c in look.seen] == sizes
        look.seen.clear()
        if grouped:  # else the library shows beams other pictures than their prompt has
            model.generate(**x, num_beams=2, max_new_tokens=1)
            assert [c.image_size for c in look.seen] == [sizes[i] for i in (0, 0, 1, 2, 1, 2, 3, 3)]
    look.seen.clear()
    model(**x)
    assert [c.image_size for c in look.seen] == [None] * 4
    with vlprune.image_sizes(model, sizes[:2]), pytest.raises(vlprune.PruningError, match="names 2 pictures"):
        model(**x)
