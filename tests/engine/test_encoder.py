"""Stage "encoder": what the tower saw, merging before the projector, and leaving between the tower's blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from reference import MATTERS, TOLERANCE, Uneven, apart, decode, kept, masked, rewritten, uneven

import vlprune
from vlprune import Budget, Context, EncoderPruner, Merge, Plan, Pruner, PruningError, Selection, Stage, Step, top

BLOCK = 3  # the tiny tower has five blocks; feature layer -2 reads the output of this one


def plan(pruner, keep, stage="encoder"):
    return Plan((Step(pruner, Stage(stage), Budget(keep)),))


class Collect(Pruner):
    """Keeps the first tokens and remembers what it was shown."""

    name = "collect"

    def __init__(self, *needs):
        self.__dict__.update(needs=frozenset(needs), seen=[])

    def select(self, ctx):
        self.seen.append(ctx)
        return Selection(torch.arange(ctx.keep))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("stage", ["encoder", "projector"])
def test_captured_fields_are_those_of_eager_attention(llava, reference, inputs, stage, attn):
    twin, model, x = reference(), llava(attn), inputs(2)
    attention = twin.model.vision_tower(x["pixel_values"], output_attentions=True).attentions[BLOCK]
    rows = twin.model.vision_tower(x["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    projections = {}
    module = twin.model.vision_tower.encoder.layers[BLOCK].self_attn
    hooks = [
        getattr(module, name).register_forward_hook(lambda m, a, out, n=name: projections.update({n: out}))
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    twin.model.vision_tower(x["pixel_values"])
    for hook in hooks:
        hook.remove()

    pruner = Collect(
        "cls_attention", "received_attention", "queries", "keys", "values", "encoder_features", "features", "project"
    )
    vlprune.wrap(model, plan(pruner, 5, stage))
    model(**x)
    assert len(pruner.seen) == 3
    for i, ctx in enumerate(pruner.seen):
        assert apart(ctx.cls_attention, attention[i, :, 0, 1:]) < 1e-6
        assert apart(ctx.received_attention, attention[i].mean(1)[:, 1:]) < 1e-6
        for field, name in (("queries", "q_proj"), ("keys", "k_proj"), ("values", "v_proj")):
            heads = projections[name][i, 1:].unflatten(-1, (4, -1)).transpose(0, 1)  # [H, N, d]
            assert apart(getattr(ctx, field), heads) < 1e-5
        assert apart(ctx.encoder_features, rows[i]) < 1e-5
        assert ctx.grids == (vlprune.Grid(1, 4, 4),)
        projected = twin.model.multi_modal_projector(rows[i])
        assert apart(ctx.project(ctx.encoder_features), projected) < 1e-4
        assert apart(ctx.features, rows[i] if stage == "encoder" else projected) < 1e-4


@dataclass(frozen=True)
class Blend(Pruner):
    """Keeps the rows of largest first channel; every other row joins the kept one before it, or the first."""

    name = "blend"
    needs = frozenset({"features"})

    def select(self, ctx: Context) -> Selection:
        chosen = top(ctx.features[:, 0], ctx.keep)
        source = torch.arange(ctx.tokens)
        slot = (torch.searchsorted(chosen, source, right=True) - 1).clamp(min=0)
        return Selection(chosen, Merge(source, slot, torch.where(torch.isin(source, chosen), 1.0, 0.3)))


@pytest.mark.parametrize(
    "pruner", [Blend(), vlprune.Plan.parse("visionzip:keep=2").steps[0].pruner], ids=["blend", "visionzip"]
)
def test_merging_before_the_projector_projects_merged_rows(llava, reference, inputs, pruner):
    twin, model, x = reference(), llava(), inputs(3)
    rows = twin.model.vision_tower(x["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    fields = Collect("cls_attention", "keys", "features")
    vlprune.wrap(model, plan(fields, 6))
    model(**x)
    chosen = [pruner.select(ctx) for ctx in fields.seen]
    projected = torch.cat([twin.model.multi_modal_projector(s.apply(r)) for s, r in zip(chosen, rows, strict=True)])

    vlprune.wrap(model, plan(pruner, 6))
    tokens, logits, _ = decode(model, x)
    prefill = model(**x).logits
    alive = kept(vlprune.trace(model), x["input_ids"], tiny.VISUAL)[0]
    places = alive & (x["input_ids"] == tiny.IMG)
    with masked(twin, {0: alive}), rewritten(twin, 0, lambda h: h.masked_scatter(places[..., None], projected)):
        want_tokens, want_logits, _ = decode(twin, x)
        want = twin(**x).logits
    with masked(twin, {0: alive}):
        unmerged = twin(**x).logits
    real = alive & x["attention_mask"].bool()
    assert apart(prefill[real], want[real]) < TOLERANCE
    assert apart(unmerged[real], want[real]) > MATTERS, "the merge must show"
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE


@pytest.mark.parametrize("stage", ["projector", "2"])
def test_merging_in_the_decoder(llava, reference, inputs, stage):
    twin, model, x = reference(), llava(), inputs(3)
    vlprune.wrap(model, plan(Blend(), 6, stage))
    tokens, logits, _ = decode(model, x)
    layer = 0 if stage == "projector" else 2
    alive = kept(vlprune.trace(model), x["input_ids"], tiny.VISUAL)[layer]

    def merge(hidden):
        hidden = hidden.clone()
        for row, ids in enumerate(x["input_ids"]):
            for picture in (ids == tiny.IMG).nonzero()[:, 0].split(16):
                selection = Blend().select(Context(keep=6, features=hidden[row, picture]))
                hidden[row, picture[selection.kept]] = selection.apply(hidden[row, picture])
        return hidden

    with masked(twin, {layer: alive}), rewritten(twin, layer, merge):
        want_tokens, want_logits, _ = decode(twin, x)
    with masked(twin, {layer: alive}):
        assert apart(decode(twin, x)[1][:, 0], want_logits[:, 0]) > MATTERS
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE


def test_pictures_may_keep_different_numbers(llava, reference, inputs):
    twin, model, x = reference(), llava(), inputs(3)
    vlprune.wrap(model, uneven("encoder", "2"))
    tokens, logits, _ = decode(model, x)
    trace = vlprune.trace(model)
    assert len({i.kept for i in trace.stages[0].items}) > 1
    with masked(twin, kept(trace, x["input_ids"], tiny.VISUAL)):
        want_tokens, want_logits, _ = decode(twin, x)
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE


@dataclass(frozen=True)
class Leave(EncoderPruner):
    """After blocks 0 and 2 the tokens of smallest norm leave; `uneven` drops other numbers of every picture between."""

    uneven: bool = False
    seen: Any = None

    name = "leave"
    needs = frozenset({"features", "cls_attention", "cls_value", "keys"})

    def start(self) -> int:
        return 0

    def step(self, ctx: Context, state: int) -> tuple[Selection | None, int]:
        assert state == ctx.layer
        n = ctx.tokens
        if self.seen is not None:
            self.seen.append(ctx)
        assert ctx.cls_attention.shape[1] == ctx.keys.shape[1] == len(ctx.index) == n
        if ctx.layer == 1:
            return None, state + 1
        norm = ctx.features.norm(dim=-1)
        keep = (
            ctx.keep
            if ctx.layer == 2
            else int((norm > norm.mean()).sum()) + ctx.keep // 2
            if self.uneven
            else (n + ctx.keep) // 2
        )
        return Selection(top(norm, min(len(norm), max(keep, ctx.keep)))), state + 1


@pytest.mark.parametrize("uneven", [False, True])
def test_leaving_the_tower_equals_masking_in_the_tower(llava, reference, inputs, uneven):
    twin, model, x = reference(), llava(), inputs(3)
    pruner = Leave(uneven, [])
    vlprune.wrap(model, plan(pruner, 6))
    features = model.get_image_features(x["pixel_values"], return_dict=True).pooler_output
    steps = [[c for c in pruner.seen if c.layer == layer] for layer in range(BLOCK)]
    tokens, logits, _ = decode(model, x)
    alive = kept(vlprune.trace(model), x["input_ids"], tiny.VISUAL)
    final = alive[0][x["input_ids"] == tiny.IMG].view(-1, 16)
    after = [torch.stack([torch.isin(torch.arange(16), c.index) for c in found]) for found in (*steps[1:], ()) if found]
    after.append(final)  # who enters block 1, 2 and 3
    if uneven:
        assert len(set(after[0].sum(1).tolist())) > 1

    handles = []
    for block, stays in zip(twin.model.vision_tower.encoder.layers[1 : BLOCK + 1], after, strict=True):
        stays = torch.cat([torch.ones(len(stays), 1, dtype=torch.bool), stays], 1)  # CLS
        mask = torch.zeros(len(stays), 1, 17, 17).masked_fill(~stays[:, None, None], torch.finfo(torch.float).min)
        handles.append(block.register_forward_pre_hook(lambda m, a, k, mask=mask: (a[:1], {**k, "attention_mask": mask}), with_kwargs=True))  # fmt: skip
    want_features = twin.get_image_features(x["pixel_values"], return_dict=True).pooler_output
    with masked(twin, alive):
        want_tokens, want_logits, _ = decode(twin, x)
    for handle in handles:
        handle.remove()
    with masked(twin, alive):
        assert apart(want_logits[:, 0], decode(twin, x)[1][:, 0]) > MATTERS, "leaving early must show"
    for ours, theirs, stays in zip(features, want_features, final, strict=True):
        assert apart(ours[stays], theirs[stays]) < TOLERANCE
        assert not ours[~stays].any()
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE


def test_a_tower_pruner_that_keeps_too_many_is_named(llava, inputs):
    @dataclass(frozen=True)
    class Lazy(EncoderPruner):
        name = "lazy"

        def step(self, ctx, state):
            return Selection(torch.arange(ctx.tokens - 1)), state

    model, x = llava(), inputs(1)
    before = model(**x).logits
    vlprune.wrap(model, plan(Lazy(), 4))
    with pytest.raises(PruningError, match="4 of 16 tokens were asked for, the pruner kept 12"):
        model(**x)
    assert torch.equal(vlprune.unwrap(model)(**x).logits, before)


def test_the_tower_itself_stays_usable(llava, inputs):
    """Called by hand, outside `get_image_features`, it is the model's own."""
    model, x = llava(), inputs(1)
    want = model.model.vision_tower(x["pixel_values"]).last_hidden_state
    vlprune.wrap(model, plan(Leave(), 6))
    assert torch.equal(model.model.vision_tower(x["pixel_values"]).last_hidden_state, want)


@pytest.mark.parametrize("stage", ["encoder", "projector"])
def test_pruner_that_uses_the_projector(llava, inputs, stage):
    """At stage "encoder" the projector is about to run; calling it as a function must not prune again."""
    model, x = llava(), inputs(2)
    pruner = Collect("project", "encoder_features")
    pruner.__dict__["select"] = lambda ctx: Selection(top(ctx.project(ctx.encoder_features).norm(dim=-1), ctx.keep))
    vlprune.wrap(model, plan(pruner, 5, stage))
    model(**x)
    features = torch.stack(vlprune.unwrap(model).get_image_features(x["pixel_values"], return_dict=True).pooler_output)
    vlprune.wrap(model, plan(pruner, 5, stage))
    model(**x)
    trace = vlprune.trace(model)
    got = [i.cells_kept() for i in trace.stages[0].items]
    assert got == [top(f.norm(dim=-1), 5).tolist() for f in features]


def test_uneven_really_is(llava, inputs):
    """Guards the tests that lean on `Uneven`."""
    model, x = llava(), inputs(3)
    for stage in ("encoder", "projector", "2"):
        vlprune.wrap(model, plan(Uneven(), 0.8, stage))
        model(**x)
        counts = [i.kept for i in vlprune.trace(model).stages[0].items]
        assert len(set(counts)) > 1
        assert max(counts) < 16
