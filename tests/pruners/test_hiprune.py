from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from tests.pruners.vectors import BUILDERS
from vlprune.context import Context, Grid
from vlprune.errors import SpecError
from vlprune.pruners.hiprune import HiPrune, around


@pytest.mark.parametrize("name", names("base_hiprune"))
def test_golden(name: str):
    g = load(name)
    ((rule, ctx),) = BUILDERS["base_hiprune"](g)
    kept = rule.select(ctx).check(g.params["patches"], ctx.keep).kept
    assert kept.tolist() == g["keep_mask"][0].nonzero()[:, 0].tolist()


def test_neighbours_by_hand():
    """Rows are left at their ends for the next ones, pictures are not, and every frame is a picture."""
    grids = (Grid(1, 2, 3), Grid(2, 2, 2))
    assert around(torch.tensor([2]), grids).tolist() == [2, 1, 3, 0, 5]
    assert around(torch.tensor([6]), grids).tolist() == [6, 6, 7, 6, 8]
    assert around(torch.tensor([9]), grids).tolist() == [9, 8, 9, 7, 9]


def context(keep: int, **fields: object) -> Context:
    g = torch.Generator().manual_seed(0)
    early, deep = torch.rand(2, 3, 36, generator=g)
    return Context(keep=keep, grids=(Grid(1, 6, 6),), early_received_attention=early, received_attention=deep, **fields)


def test_anchors_come_first():
    ctx = context(20)
    rule = HiPrune(alpha=0.5)
    anchors = ctx.early_received_attention.mean(0).topk(2).indices
    want = set(around(anchors, ctx.grids).tolist())
    rest = ctx.received_attention.mean(0).clone()
    rest[list(want)] = -1
    want |= set(rest.topk(20 - len(want)).indices.tolist())
    assert set(rule.select(ctx).kept.tolist()) == want
    deep = ctx.received_attention.mean(0).topk(20).indices.sort().values
    assert torch.equal(HiPrune(alpha=0.0).select(ctx).kept, deep)


def test_more_neighbours_than_tokens():
    kept = HiPrune(alpha=1.0).select(context(3)).check(36, 3).kept
    assert len(kept) == 3


def test_cells_that_are_gone():
    index = torch.tensor([0, 1, 6, 7, 20, 35])
    early = torch.tensor([[0.0, 0.0, 0.9, 0.0, 0.0, 0.0]])
    deep = torch.tensor([[0.1, 0.5, 0.2, 0.3, 0.6, 0.4]])
    ctx = Context(keep=5, grids=(Grid(1, 6, 6),), index=index, early_received_attention=early, received_attention=deep)
    kept = HiPrune(alpha=1.0).select(ctx).kept
    assert kept.tolist() == [0, 1, 2, 3, 4], "cells 0, 6 and 7, then the best of the deep layer"


def test_layers():
    assert [HiPrune().early_block(n) for n in (24, 32, 26, 2, 1)] == [8, 11, 8, 0, 0]
    assert HiPrune(object_layer=16).early_block(32) == 15
    for wrong in ({"alpha": 1.5}, {"object_layer": -1}):
        with pytest.raises(SpecError, match="hiprune"):
            HiPrune(**wrong)
