"""Fields of other blocks of the tower than the one that the projector reads."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch
from reference import TOLERANCE, apart

import vlprune
from vlprune import Budget, Plan, Pruner, Selection, Stage, Step

CLS = {"early_cls_attention", "final_cls_attention"}
FIELDS = {"early_received_attention", "final_keys", "received_attention"}


@dataclass(frozen=True)
class Look(Pruner):
    """Keeps the first tokens and remembers what it was shown."""

    needs: frozenset
    block: int = 1

    name = "look"

    def __post_init__(self):
        object.__setattr__(self, "seen", [])

    def early_block(self, blocks):
        return self.block

    def select(self, ctx):
        self.seen.append(ctx)
        return Selection(torch.arange(ctx.keep))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("stage", ["encoder", "projector"])
def test_fields_are_those_of_an_eager_tower(llava, reference, inputs, stage, attn):
    twin, model, x = reference(), llava(attn), inputs(2)
    look = Look(frozenset(FIELDS | CLS))
    vlprune.wrap(model, Plan((Step(look, Stage(stage), Budget(5)),)))
    model(**x)
    tower = twin.model.vision_tower
    block = getattr(tower, "vision_model", tower).encoder.layers[-1].self_attn
    made = {}
    hooks = [
        getattr(block, name).register_forward_hook(lambda m, a, out, name=name: made.update({name: out}))
        for name in ("q_proj", "k_proj")
    ]
    attentions = tower(x["pixel_values"], output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    q, k = made["q_proj"][:, 0], made["k_proj"]  # [R, C], [R, 1 + N, C]
    joined = ((k @ q[..., None])[..., 0] / q.shape[1] ** 0.5).softmax(1)[:, 1:]
    assert len(look.seen) == len(x["pixel_values"]) == 3
    for n, ctx in enumerate(look.seen):
        assert apart(ctx.early_cls_attention, attentions[1][n, :, 0, 1:]) < 1e-5
        assert apart(ctx.early_received_attention, attentions[1][n].mean(1)[:, 1:]) < 1e-5
        assert apart(ctx.received_attention, attentions[-2][n].mean(1)[:, 1:]) < 1e-5
        assert apart(ctx.final_cls_attention, joined[n][None]) < 1e-5
        assert apart(ctx.final_keys, k[n, 1:].unflatten(1, (4, -1)).transpose(0, 1)) < TOLERANCE


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_has_them(family):
    model, inputs = tiny.FAMILIES[family]()
    has_cls = "cls_attention" in vlprune.api.adapter_of(model).offers(Stage("projector"))
    look = Look(frozenset(FIELDS | (CLS if has_cls else set())))
    with vlprune.pruning(model, Plan((Step(look, Stage("projector"), Budget(3)),))):
        model(**inputs())
    assert look.seen
    for ctx in look.seen:
        n = sum(g.tokens for g in ctx.grids)
        assert ctx.early_received_attention.shape[1] == ctx.final_keys.shape[1] == n
        assert ctx.final_keys.isfinite().all()
        attention = ctx.early_received_attention
        assert (attention.isfinite().all(0) | (ctx.newline if ctx.newline is not None else False)).all()
        if has_cls:
            assert ctx.final_cls_attention.shape == (1, n)


def test_two_rules_that_look_at_different_blocks(llava, inputs):
    early = frozenset({"early_received_attention", "features"})
    one, other = Look(early, 1), Look(early, 2)
    both = Plan((Step(one, Stage("encoder"), Budget(9)), Step(other, Stage("projector"), Budget(5))))
    assert "blocks 0 to 4" in vlprune.why_unsupported(llava(), both)
    assert "block 9" in vlprune.why_unsupported(llava(), Plan((Step(Look(early, 9), Stage("encoder"), Budget(5)),)))
    model = llava()
    vlprune.wrap(
        model, Plan((Step(one, Stage("encoder"), Budget(9)), Step(Look(early, 1), Stage("projector"), Budget(5))))
    )
    model(**inputs(1))
