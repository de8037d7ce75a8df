"""Every family, every stage: what is removed equals what is masked away, and everything else stays as it was."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import tiny
import torch
from reference import MATTERS, TOLERANCE, apart, beams_see_their_pictures, decode, kept, masked, text_model, uneven

import vlprune
from vlprune import Budget, DecodePruner, Plan, PruningError, Scorer, Selection, Stage, Step, top
from vlprune.releases import cache_of

STAGES = [("projector",), ("2",), ("projector", "1", "3")]


def name_of(case):
    return case.partition("+")[0]


@pytest.mark.parametrize("stages", STAGES, ids="+".join)
def test_removal_equals_masking(model, reference, inputs, case, stages):
    twin, x = reference(name_of(case)), inputs(case)
    length, alive = x["input_ids"].shape[1], {}
    for attn in ("sdpa", "eager"):
        m = model(name_of(case), attn)
        vlprune.wrap(m, uneven(*stages))
        prefill = m(**x).logits
        tokens, logits, cache = decode(m, x)
        trace = vlprune.trace(m)
        if not alive:
            alive = kept(trace, x["input_ids"], tiny.VISUAL)
            with masked(twin, alive):
                want_prefill = twin(**x).logits
                want_tokens, want_logits, _ = decode(twin, x)
            assert apart(twin(**x).logits[:, -1], want_prefill[:, -1]) > MATTERS
        again = kept(trace, x["input_ids"], tiny.VISUAL)
        assert all(torch.equal(alive[k], again[k]) for k in alive)
        left = torch.stack(list(alive.values())).all(0) & x["attention_mask"].bool()
        assert apart(prefill[left], want_prefill[left]) < TOLERANCE
        assert apart(logits, want_logits) < TOLERANCE
        assert torch.equal(tokens, want_tokens)
        here = x["attention_mask"].bool()
        for i, layer in enumerate(cache.layers):  # short in memory, long for everybody who asks
            here = here & alive.get(i, here)
            assert layer.get_seq_length() == length + 7
            if i >= min(alive):
                assert layer.keys.shape[2] == int(here.sum(1).max()) + 7
            elif not layer.is_sliding:
                assert layer.keys.shape[2] == length + 7


def test_keep_all_is_bit_identical(model, inputs, case):
    m, x = model(name_of(case)), inputs(case)
    before = decode(m, x)
    for stages in STAGES:
        vlprune.wrap(m, Plan(tuple(Step(Everything(), Stage(s), Budget(1.0)) for s in stages)))
        after = decode(m, x)
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])


class Everything(Scorer):
    """Keeps all tokens, also where a smaller budget asks for the gather."""

    name = "everything"
    adaptive = True

    def select(self, ctx):
        return Selection(torch.arange(ctx.tokens))


def test_keep_all_through_the_gather_is_bit_identical(model, inputs, family, monkeypatch):
    """One row without padding: gathering everything leaves shapes and order as they were."""
    m, x = model(family), inputs(family, batch=1)
    before = decode(m, x)
    vlprune.wrap(m, Plan(tuple(Step(Everything(), Stage(s), Budget(0.9)) for s in ("projector", "2"))))
    monkeypatch.setattr(Selection, "check", lambda selection, *_: selection)
    after = decode(m, x)
    assert type(after[2].layers[3]).__name__.startswith("Kept")
    if family != "gemma3":  # its sliding layers stop being trimmed, so sums are over other lengths
        assert torch.equal(before[1], after[1])
    assert apart(before[1], after[1]) < TOLERANCE
    assert torch.equal(before[0], after[0])


@pytest.mark.parametrize("attn", ["sdpa"])
def test_fastv_ranks_as_eager_attention(model, reference, inputs, case, attn):
    m, twin, x = model(name_of(case), attn), reference(name_of(case)), inputs(case)
    rows = twin(**x, output_attentions=True).attentions[1][:, :, -1].mean(1)  # [B, T]
    vlprune.wrap(m, "fastv@2:keep=3")
    tokens, logits, _ = decode(m, x)
    trace = vlprune.trace(m)
    alive = kept(trace, x["input_ids"], tiny.VISUAL)
    spans = pictures(trace, x)
    for (row, _), (start, n) in spans.items():
        best = rows[row, start : start + n].topk(3).indices.sort().values
        assert torch.equal(alive[2][row, start : start + n].nonzero()[:, 0], best)
    with masked(twin, alive):
        want_tokens, want_logits, _ = decode(twin, x)
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE


def pictures(trace, x):
    """(row, picture) -> (first position, tokens)."""
    from reference import starts

    first = starts(x["input_ids"], tiny.VISUAL, trace)
    return {(p.row, p.picture): (first[p.row, p.picture], p.tokens) for p in trace.pictures}


@pytest.mark.parametrize("stages", [*STAGES, ("encoder",)], ids="+".join)
def test_beam_search(model, reference, inputs, case, stages):
    m, twin = model(name_of(case)), reference(name_of(case))
    x = next((x for x in (inputs(case), inputs(case, batch=1)) if beams_see_their_pictures(twin, x)), None)
    if x is None:
        pytest.skip("this transformers gives the beams of a prompt other pictures than the prompt has")
    vlprune.wrap(m, uneven(*stages))
    tokens, _, _ = decode(m, x, num_beams=3)
    decode(m, x)
    alive = kept(vlprune.trace(m), x["input_ids"], tiny.VISUAL)
    with masked(twin, {k: v.repeat_interleave(3, 0) for k, v in alive.items()}):
        want, _, _ = decode(twin, x, num_beams=3)
    assert torch.equal(tokens, want)


@pytest.mark.parametrize("stages", STAGES, ids="+".join)
def test_static_cache(model, inputs, family, stages):
    m, x = model(family), inputs(family)
    vlprune.wrap(m, uneven(*stages))
    if family == "gemma3":
        with pytest.raises(PruningError, match="StaticSlidingWindowLayer cannot be pruned"):
            decode(m, x, cache_implementation="static")
        m.__dict__.pop("_cache", None)  # older releases keep what they could not use
        return
    tokens, logits, _ = decode(m, x)
    same_tokens, same_logits, _ = decode(m, x, cache_implementation="static")
    assert torch.equal(tokens, same_tokens)
    assert apart(logits, same_logits) < TOLERANCE


@pytest.mark.parametrize("attn", ["sdpa"])
def test_eviction_after_prefill_equals_masking_in_decode(model, reference, inputs, case, attn):
    m, twin, x = model(name_of(case), attn), reference(name_of(case)), inputs(case)
    plain = decode(twin, x)[1]
    vlprune.wrap(m, uneven("cache"))
    tokens, logits, cache = decode(m, x)
    trace = vlprune.trace(m)
    alive = torch.ones(x["input_ids"].shape, dtype=torch.bool)
    for item in trace.stages[-1].items:  # the features are those of the prompt, so all layers keep the same
        start, n = pictures(trace, x)[item.row, item.picture]
        alive[item.row, start : start + n] = torch.isin(torch.arange(n), torch.tensor(item.cells_kept()))
    with masked_steps(twin, alive):
        want_tokens, want_logits, _ = decode(twin, x)
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE
    assert apart(logits, plain) > MATTERS
    assert {layer.get_seq_length() for layer in cache.layers} == {x["input_ids"].shape[1] + 7}


@contextmanager
def masked_steps(model, alive):
    """Like `masked` from layer 0, but in decode steps only."""
    with masked(model, {0: alive}):
        for layer in text_model(model).layers:
            hook = next(iter(layer._forward_pre_hooks.values()))
            key = next(iter(layer._forward_pre_hooks))
            layer._forward_pre_hooks[key] = lambda *a, hook=hook: None if a[1][0].shape[1] > 1 else hook(*a)
        yield


class Ranked(DecodePruner):
    """The most attended tokens at layers 0 and 2."""

    name = "ranked"

    def focal(self, layers):
        return 0, 2

    def step(self, ctx, state):
        return Selection(top(ctx.last_attention.mean(0), ctx.keep)), state


def test_decode_stage_equals_masking_by_hand(model, reference, inputs, case):
    x, keep = inputs(case), 2
    got = {}
    for attn in ("sdpa", "eager"):
        m = model(name_of(case), attn)
        plain = decode(m, x)[1]
        vlprune.wrap(m, Plan((Step(Ranked(), Stage("decode"), Budget(1.0)),)))
        assert apart(decode(m, x)[1], plain) < TOLERANCE
        vlprune.wrap(m, Plan((Step(Ranked(), Stage("decode"), Budget(keep)),)))
        got[attn] = decode(m, x)
        assert apart(got[attn][1][:, 1:], plain[:, 1:]) > MATTERS
        spans = pictures(vlprune.trace(m), x)
    want = by_hand(reference(name_of(case)), x, spans, keep)
    for tokens, logits, _ in got.values():
        assert torch.equal(tokens, want[0])
        assert apart(logits, want[1]) < TOLERANCE


def by_hand(model, x, spans, keep):
    """Read an eager model's own attention at layers 0 and 2, mask what was not chosen in the others."""
    visual = torch.isin(x["input_ids"], torch.tensor(tiny.VISUAL))
    chosen = visual.clone()

    def before(module, args, kwargs):
        m = kwargs["attention_mask"]
        if m.shape[2] > 1 or module.layer_idx in (0, 2):
            return None
        total = cache_of(kwargs).layers[2].get_seq_length() + (module.layer_idx < 2)
        at = torch.arange(m.shape[-1]) + total - m.shape[-1]  # a trimmed window starts late
        dead = torch.zeros(len(visual), m.shape[-1], dtype=torch.bool)
        inside = (at >= 0) & (at < visual.shape[1])
        dead[:, inside] = (visual & ~chosen)[:, at[inside]]
        hidden = m.expand(len(dead), -1, -1, -1).masked_fill(dead[:, None, None], torch.finfo(m.dtype).min)
        return args, {**kwargs, "attention_mask": hidden}

    def after(module, args, kwargs, result):
        weights = result[1][:, :, -1].mean(1)  # [B, S]
        if module.layer_idx not in (0, 2) or (module.layer_idx == 0 and kwargs["attention_mask"].shape[2] > 1):
            return
        total = cache_of(kwargs).layers[module.layer_idx].get_seq_length()
        first = total - weights.shape[1]
        chosen[:] = False
        for (row, _), (start, n) in spans.items():
            seen = torch.zeros(n)
            for j in range(n):
                if start + j >= first:
                    seen[j] = weights[row, start + j - first]
            chosen[row, start + top(seen, keep)] = True

    handles = []
    for layer in text_model(model).layers:
        handles.append(layer.self_attn.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.self_attn.register_forward_hook(after, with_kwargs=True))
    try:
        return decode(model, x)
    finally:
        for handle in handles:
            handle.remove()


def test_unwrap_restores(model, inputs, case):
    m, x = model(name_of(case)), inputs(case)
    m(**x)  # the library installs hooks of its own on first use

    def traces():
        return {n: (sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks), type(getattr(module, "config", None)))
                for n, module in m.named_modules()}  # fmt: skip

    before, logits = traces(), m(**x).logits
    fits = [p for p in ("visionzip:keep=2:attention=received", "holov:keep=2:attention=received", "fastv@2:keep=2",
                        "flowcut:keep=2:variant=mean_query") if vlprune.supported(m, p)]  # fmt: skip
    assert len(fits) >= 3
    for plan in fits:
        vlprune.wrap(m, plan)
        assert apart(m(**x).logits, logits) > MATTERS
        vlprune.unwrap(m)
        assert traces() == before
        assert torch.equal(m(**x).logits, logits)
