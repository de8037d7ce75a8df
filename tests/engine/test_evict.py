"""Stage "cache": the prefill sees everything, later steps find fewer keys, each layer its own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch
from reference import MATTERS, TOLERANCE, apart, decode, kept, masked

import vlprune
from vlprune import Budget, Context, Plan, Pruner, PruningError, Selection, Stage, Step
from vlprune.releases import cache_of

DECODERS = {"llama": {}, "mistral window": {"text": "mistral", "sliding_window": 20}}


@dataclass(frozen=True)
class PerLayer(Pruner):
    """Another set in every layer, other counts for every picture; notes what it chose."""

    notes: dict

    name = "per_layer"
    stage = "cache"
    adaptive = True
    needs = frozenset({"keys", "values", "last_attention", "features", "last_query", "last_value"})

    def select(self, ctx: Context) -> Selection:
        x = ctx.keys[0, :, ctx.layer % 4].float()
        chosen = (x > x.mean()).nonzero()[:, 0][: ctx.keep]
        self.notes.setdefault(ctx.layer, []).append((ctx, chosen))
        return Selection(chosen)


def plan(pruner, keep=0.6):
    return Plan((Step(pruner, Stage("cache"), Budget(keep)),))


def per_layer(notes, x):
    """[B, T] bool for each layer from what `PerLayer` noted, for pictures of 16 tokens."""
    alive = []
    for layer in range(4):
        keep = torch.ones(x["input_ids"].shape, dtype=torch.bool)
        flags = [torch.isin(torch.arange(16), chosen) for _, chosen in notes[layer]]
        keep[x["input_ids"] == tiny.IMG] = torch.cat(flags)
        alive.append(keep)
    return alive


def masked_in_decode(twin, alive):
    """Mask each layer's own columns, in steps after the prefill only."""

    def hook(keep):
        def mask(module, args, kwargs):
            if args[0].shape[1] > 1:
                return None
            m = kwargs["attention_mask"]
            first = int(cache_of(kwargs).layers[module.self_attn.layer_idx].get_seq_length()) + 1 - m.shape[-1]
            dead = torch.zeros(len(keep), m.shape[-1], dtype=torch.bool)
            column = torch.arange(m.shape[-1]) + first
            inside = column < keep.shape[1]
            dead[:, inside] = ~keep[:, column[inside]]
            return args, {**kwargs, "attention_mask": m.masked_fill(dead[:, None, None], torch.finfo(m.dtype).min)}

        return mask

    return [
        layer.register_forward_pre_hook(hook(keep), with_kwargs=True)
        for layer, keep in zip(twin.model.language_model.layers, alive, strict=True)
    ]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_eviction_equals_masking_in_decode_only(llava, reference, inputs, name, batch, attn):
    twin, model, x = reference(**DECODERS[name]), llava(attn, **DECODERS[name]), inputs(batch)
    notes = {}
    vlprune.wrap(model, plan(PerLayer(notes)))
    tokens, logits, cache = decode(model, x)
    alive = per_layer(notes, x)
    unpruned = decode(twin, x)[1]
    hooks = masked_in_decode(twin, alive)
    want_tokens, want_logits, _ = decode(twin, x)
    for hook in hooks:
        hook.remove()
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE
    assert apart(logits[:, 0], unpruned[:, 0]) < TOLERANCE
    assert apart(want_logits[:, 1], unpruned[:, 1]) > MATTERS or not torch.equal(want_tokens, decode(twin, x)[0])
    for layer, keep in zip(cache.layers, alive, strict=True):
        assert layer.keys.shape[2] == int((keep & x["attention_mask"].bool()).sum(1).max()) + 7
    trace = vlprune.trace(model)
    assert trace.layer_tokens == [sum(len(c) for _, c in notes[layer]) for layer in range(4)]
    assert trace.kv_bytes < trace.kv_bytes_unpruned


@pytest.mark.parametrize("batch", [1, 3])
def test_static_cache(llava, inputs, batch):
    model, x = llava(), inputs(batch)
    vlprune.wrap(model, plan(PerLayer({})))
    want_tokens, want_logits, _ = decode(model, x)
    tokens, logits, cache = decode(model, x, cache_implementation="static")
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE
    assert cache.layers[0].keys.shape[2] < cache.layers[0].logical_max


def test_after_a_stage_in_the_model(llava, reference, inputs):
    """What an earlier stage left is what the cache's pruner chooses from, in grid cells of the picture."""
    twin, model, x = reference(), llava(), inputs(3)
    notes = {}
    stages = (Step(vlprune.Plan.parse("fastv@2:keep=8").steps[0].pruner, Stage("2"), Budget(8)),)
    vlprune.wrap(model, Plan((*stages, *plan(PerLayer(notes), 0.3).steps)))
    tokens, logits, _ = decode(model, x)
    trace = vlprune.trace(model)
    early = kept(trace, x["input_ids"], tiny.VISUAL, ("2",))
    alive = []
    pictures = [(row, p) for row, ids in enumerate(x["input_ids"]) for p in (ids == tiny.IMG).nonzero()[:, 0].split(16)]
    for layer in range(4):
        keep = torch.ones(x["input_ids"].shape, dtype=torch.bool)
        for (row, picture), (ctx, chosen) in zip(pictures, notes[layer], strict=True):
            cells = chosen if ctx.index is None else ctx.index[chosen]
            keep[row, picture] = torch.isin(torch.arange(16), cells)
        alive.append(keep)
    assert {i.kept for i in trace.stages[-1].items} <= {1, 2, 3, 4, 5}
    last = [i.cells_kept() for i in trace.stages[-1].items]
    assert last == [ctx.index[chosen].tolist() for ctx, chosen in notes[3]]
    assert [list(c) for c in last] == [trace.cells(i.picture, i.row) for i in trace.stages[-1].items]
    with masked(twin, early):
        hooks = masked_in_decode(twin, alive)
        want_tokens, want_logits, _ = decode(twin, x)
        for hook in hooks:
            hook.remove()
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE


@pytest.mark.parametrize("early", [False, True])
def test_second_picture(llava, reference, inputs, early):
    """Each layer has its own gaps from the first turn, and gets new ones in the second."""
    twin, model, x = reference(), llava(), inputs(1)
    g = torch.Generator().manual_seed(9)
    ids = torch.cat([torch.tensor([[20, 21]]), torch.full((1, 16), tiny.IMG), torch.tensor([[22, 23, 24]])], 1)
    y = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32, generator=g)}
    notes = {}
    steps = plan(PerLayer(notes), 0.5).steps
    uniform = vlprune.Plan.parse("uniform:keep=12").steps
    vlprune.wrap(model, Plan((*uniform, *steps) if early else steps))

    def chosen():
        found = []
        for layer in range(4):
            ((ctx, picked),) = notes[layer]
            found.append(torch.isin(torch.arange(16), picked if ctx.index is None else ctx.index[picked]))
        gone = kept(vlprune.trace(model), torch.full((1, 16), tiny.IMG), tiny.VISUAL) if early else {}
        notes.clear()
        return found, gone.get(0, torch.ones(1, 16, dtype=torch.bool))

    def place(ids, flags):
        keep = torch.ones(ids.shape, dtype=torch.bool)
        keep[ids == tiny.IMG] = flags.flatten()
        return keep

    first = model(**x)
    one, one_early = chosen()
    second = model(**y, past_key_values=first.past_key_values)
    two, two_early = chosen()
    step = model(input_ids=torch.tensor([[33]]), past_key_values=second.past_key_values).logits

    def hook(layer):
        def mask(module, args, kwargs):
            m = kwargs["attention_mask"].clone()
            off = torch.finfo(m.dtype).min
            t1 = x["input_ids"].shape[1]
            dead = torch.zeros(m.shape[-1], dtype=torch.bool)
            columns = m.shape[-1]
            if columns == t1:
                dead |= ~place(x["input_ids"], one_early)[0]
            else:
                dead[:t1] = ~place(x["input_ids"], one[layer])[0]
                dead[t1 : t1 + 21] = ~place(ids, two_early if columns == t1 + 21 else two[layer])[0]
            return args, {**kwargs, "attention_mask": m.masked_fill(dead, off)}

        return mask

    hooks = [
        layer.register_forward_pre_hook(hook(i), with_kwargs=True)
        for i, layer in enumerate(twin.model.language_model.layers)
    ]
    want_first = twin(**x)
    want_second = twin(**y, past_key_values=want_first.past_key_values)
    want_step = twin(input_ids=torch.tensor([[33]]), past_key_values=want_second.past_key_values).logits
    for h in hooks:
        h.remove()
    real = place(ids, two_early)
    assert apart(second.logits[real], want_second.logits[real]) < TOLERANCE
    assert apart(step, want_step) < TOLERANCE


def test_beams(llava, inputs, grouped):
    """Beams reorder every layer's own set with its rows."""
    model, x = llava(), inputs(3 if grouped else 1)
    vlprune.wrap(model, plan(PerLayer({})))
    beams = model.generate(
        **x, num_beams=3, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    new = beams.sequences[:, x["input_ids"].shape[1] :]
    assert apart(beams.sequences_scores, rescored(model, x, new) / 5) < TOLERANCE


def rescored(model, x, new):
    """Log probability of given continuations, with positions counted as `generate` counts them."""
    mask = x["attention_mask"]
    out = model(**x, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    total = torch.zeros(len(new))
    for t in range(new.shape[1]):
        total += out.logits[:, -1].log_softmax(-1).gather(1, new[:, t : t + 1])[:, 0]
        mask = torch.cat([mask, mask[:, -1:]], 1)
        out = model(input_ids=new[:, t : t + 1], attention_mask=mask, position_ids=(mask.cumsum(-1) - 1)[:, -1:],
                    past_key_values=out.past_key_values)  # fmt: skip
    return total


def test_fields_at_the_cache(llava, reference, inputs):
    twin, model, x = reference(), llava(), inputs(1)
    notes = {}
    vlprune.wrap(model, plan(PerLayer(notes)))
    model(**x)
    out = twin(**x, output_attentions=True, use_cache=True)
    places = (x["input_ids"][0] == tiny.IMG).nonzero()[:, 0]
    for layer in range(4):
        ((ctx, _),) = notes[layer]
        assert ctx.layer == layer
        assert apart(ctx.keys, out.past_key_values.layers[layer].keys[0][:, places]) < TOLERANCE
        assert apart(ctx.values, out.past_key_values.layers[layer].values[0][:, places]) < TOLERANCE
        assert apart(ctx.last_attention, out.attentions[layer][0, :, -1][:, places]) < 1e-5
        assert apart(ctx.last_value, out.past_key_values.layers[layer].values[0][:, -1]) < TOLERANCE


def test_needs_a_cache(llava, inputs):
    model, x = llava(), inputs(1)
    vlprune.wrap(model, plan(PerLayer({})))
    with pytest.raises(PruningError, match="use_cache=True"):
        model(**x, use_cache=False)
    assert model(**x).logits.shape[1] == x["input_ids"].shape[1]


def test_nothing_to_evict(llava, inputs):
    model, x = llava(), inputs(2)
    before = decode(model, x)
    vlprune.wrap(model, plan(PerLayer({}), 1.0))
    after = decode(model, x)
    assert torch.equal(before[1], after[1])
    assert vlprune.trace(model).layer_tokens == [48] * 4
