"""Removing tokens equals masking them, layer by layer, and keeping all of them changes nothing."""

from __future__ import annotations

import pytest
import tiny
import torch
from reference import MATTERS, TOLERANCE, apart, decode, kept, masked, uneven

import vlprune
from vlprune import Budget, Plan, Scorer, Stage, Step
from vlprune.pruners.uniform import Uniform

STAGES = [("projector",), ("2",), ("projector", "1", "3")]
DECODERS = {"llama": {}, "qwen2": {}, "mistral": {"sliding_window": None}, "mistral window": {"sliding_window": 20}}


def decoder(name):
    return {"text": name.partition(" ")[0], **DECODERS[name]}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("stages", STAGES, ids="+".join)
def test_removal_equals_masking(llava, reference, inputs, stages, text, attn):
    twin, model, x = reference(**decoder(text)), llava(attn, **decoder(text)), inputs(3)
    vlprune.wrap(model, uneven(*stages))
    tokens, logits, cache = decode(model, x, 10)
    prefill = model(**x).logits
    alive = kept(vlprune.trace(model), x["input_ids"], tiny.VISUAL)
    assert sorted(alive) == [0 if s == "projector" else int(s) for s in stages]
    assert len({int(k.sum()) for k in alive[min(alive)]}) > 1, "rows must lose different numbers of tokens"

    full = twin(**x).logits
    with masked(twin, alive):
        want_prefill = twin(**x).logits
        want_tokens, want_logits, _ = decode(twin, x, 10)
    real = x["attention_mask"].bool() & torch.stack(list(alive.values())).all(0)
    assert apart(full[real], want_prefill[real]) > MATTERS
    assert apart(prefill[real], want_prefill[real]) < TOLERANCE
    assert apart(logits, want_logits) < TOLERANCE
    assert torch.equal(tokens, want_tokens)

    assert cache.get_seq_length() == x["input_ids"].shape[1] + 9  # what callers see
    if "window" not in text:
        for i, layer in enumerate(cache.layers):  # what is stored
            left = x["attention_mask"].bool() & torch.stack(
                [k for at, k in alive.items() if at <= i] or [real | True]
            ).all(0)
            rows = int(left.sum(1).max()) if any(at <= i for at in alive) else x["input_ids"].shape[1]
            assert layer.keys.shape[2] == rows + 9


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("text", DECODERS)
def test_keep_all_is_bit_identical(llava, inputs, text, attn):
    model, x = llava(attn, **decoder(text)), inputs(3)
    before = decode(model, x)
    vlprune.wrap(model, "random:keep=1.0+fastv@2:keep=1.0")
    after = decode(model, x)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert vlprune.trace(model).kept == vlprune.trace(model).visual == 64


class Everything(Scorer):
    """Keeps all tokens, but through the gather."""

    name = "everything"

    def select(self, ctx):
        return vlprune.Selection(torch.arange(ctx.tokens))


def test_keep_all_through_the_gather_is_bit_identical(llava, inputs, monkeypatch):
    """One row without padding: gathering everything leaves shapes and order as they were."""
    model, x = llava(), inputs(1)
    before = decode(model, x)
    vlprune.wrap(
        model, Plan((Step(Everything(), Stage("projector"), Budget(1.0)), Step(Everything(), Stage("2"), Budget(1.0))))
    )
    engine = model._vlprune
    groups = engine._groups
    monkeypatch.setattr(engine, "_groups", lambda run, step, layout: groups(run, _below(step), layout) and [
        (row, visuals, 16) for row, visuals, _ in groups(run, _below(step), layout)])  # fmt: skip
    after = decode(model, x)
    assert type(after[2].layers[3]).__name__ == "KeptLayer"
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def _below(step):
    return Step(step.pruner, step.stage, Budget(0.5))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_live_fastv_ranks_as_eager_attention(llava, reference, inputs, attn):
    twin, model, x = reference(), llava(attn), inputs(3)
    rows = twin(**x, output_attentions=True).attentions[1][:, :, -1].mean(1)  # [B, T]
    vlprune.wrap(model, "fastv@2:keep=5")
    tokens, logits, _ = decode(model, x)
    alive = kept(vlprune.trace(model), x["input_ids"], tiny.VISUAL)[2]
    for row, ids in enumerate(x["input_ids"]):
        for picture in (ids == tiny.IMG).nonzero()[:, 0].split(16):
            best = picture[rows[row, picture].topk(5).indices].sort().values
            assert torch.equal(picture[alive[row, picture]], best)
    with masked(twin, {2: alive}):
        want_tokens, want_logits, _ = decode(twin, x)
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE


def test_share_of_a_later_stage_is_one_of_all_tokens(llava, inputs):
    model, x = llava(), inputs(2)
    vlprune.wrap(model, "uniform@1:keep=0.75+fastv@2:keep=0.5+fastv@3:keep=4")
    model(**x)
    trace = vlprune.trace(model)
    assert trace.layer_tokens == [48, 36, 24, 12]
    assert [(s.stage, s.tokens, s.kept) for s in trace.stages] == [("1", 48, 36), ("2", 36, 24), ("3", 24, 12)]
    assert set(trace.cells(1, 1)) <= set(trace.cells(1, 1, stage="2")) <= set(trace.cells(1, 1, stage="1"))


def test_pictures_of_a_prompt_share_one_budget(llava, reference, inputs):
    twin, model, x = reference(), llava(), inputs(2)
    vlprune.wrap(model, "fastv@2:keep=0.25:scope=prompt")
    tokens, logits, _ = decode(model, x)
    trace = vlprune.trace(model)
    counts = {(i.row, i.picture): i.kept for i in trace.stages[0].items}
    assert counts[0, 0] == 4
    assert counts[1, 0] + counts[1, 1] == 8
    rows = twin(**x, output_attentions=True).attentions[1][1, :, -1].mean(0)
    places = (x["input_ids"][1] == tiny.IMG).nonzero()[:, 0]
    alive = kept(trace, x["input_ids"], tiny.VISUAL)
    assert torch.equal(places[alive[2][1, places]], places[rows[places].topk(8).indices].sort().values)
    with masked(twin, alive):
        want_tokens, want_logits, _ = decode(twin, x)
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE


@pytest.mark.parametrize("batch", [1, 3])
def test_compact_positions_equal_the_shorter_prompt(llava, reference, inputs, batch):
    """The reference is fed the merged embeddings without the removed rows."""
    twin, model, x = reference(), llava(), inputs(batch)
    vlprune.wrap(model, uneven("projector", positions="compact"))
    tokens, logits, _ = decode(model, x)
    alive = kept(vlprune.trace(model), x["input_ids"], tiny.VISUAL)[0] & x["attention_mask"].bool()
    vlprune.wrap(model, uneven("projector"))
    assert apart(logits, decode(model, x)[1]) > MATTERS, "the two numberings must differ, or the test shows nothing"

    shorter = shortened(twin, x, alive)
    want_tokens, want_logits, _ = decode(twin, shorter)
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE


def shortened(model, x, alive):
    """Embeddings and mask [B, P] of the prompt without what `alive` lacks."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**x)
    hook.remove()
    width = int(alive.sum(1).max())
    embeds = torch.zeros(len(alive), width, seen[0].shape[-1])
    mask = torch.zeros(len(alive), width, dtype=torch.long)
    for row, left in enumerate(alive):
        n = int(left.sum())
        embeds[row, width - n :], mask[row, width - n :] = seen[0][row, left], 1
    return {"inputs_embeds": embeds, "attention_mask": mask}


def test_pad_slots_stay_finite(llava, inputs):
    model, x = llava(), inputs(3)
    vlprune.wrap(model, uneven("1"))
    finite = []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: finite.append(bool(out.isfinite().all())))
        for layer in model.model.language_model.layers
    ]
    model(**x)
    for hook in hooks:
        hook.remove()
    assert finite == [True] * 4


def test_masks_stay_absent_where_the_model_built_none(llava, inputs):
    """One row without padding: causal stays causal, so the fast kernels stay in use."""
    model, x = llava(), inputs(1)
    vlprune.wrap(model, uneven("1"))
    seen = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((kwargs["hidden_states"].shape[1], kwargs["attention_mask"])),
            with_kwargs=True,
        )
        for layer in model.model.language_model.layers
    ]
    decode(model, x, 2)
    for hook in hooks:
        hook.remove()
    assert [mask for _, mask in seen] == [None] * 8
    assert seen[0][0] == 23 > seen[1][0] == seen[3][0]


def test_a_rule_that_answers_for_too_few_pictures(llava, inputs, monkeypatch):
    monkeypatch.setattr(Uniform, "select_many", lambda self, contexts: [])
    model = llava()
    vlprune.wrap(model, "uniform:keep=0.5")
    with pytest.raises(vlprune.PruningError, match="asked for 4 selections and made 0"):
        model(**inputs(3))
