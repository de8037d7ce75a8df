from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from tests.pruners.vectors import BUILDERS, packed
from vlprune.context import Context, Grid
from vlprune.errors import SpecError
from vlprune.pruners.hired import HiRED, layout

GRIDS = (Grid(1, 4, 4), Grid(1, 8, 9))  # a whole view and 2 x 2 crops of its size, with separators


@pytest.mark.parametrize("name", names("base_hired"))
def test_golden(name: str):
    g = load(name)
    ((rule, ctx),) = BUILDERS["base_hired"](g)
    mask = packed(g["keep_mask"].float(), g.params["grid_w_h"][0], 0.0)
    assert int(mask.sum()) == ctx.keep
    kept = rule.select(ctx).check(len(mask), ctx.keep).kept
    assert kept.tolist() == mask.nonzero()[:, 0].tolist()


def test_layout_by_hand():
    part, shown, crops = layout(GRIDS)
    assert crops == 4
    assert part[:16].tolist() == [0] * 16
    assert part[16:].view(8, 9)[::4].tolist() == [[1] * 4 + [2] * 4 + [5], [3] * 4 + [4] * 4 + [5]]
    assert shown.view(4, 4).tolist() == [[1, 1, 2, 2]] * 2 + [[3, 3, 4, 4]] * 2


def test_padding_shifts_the_crops():
    """Of two rows of crops six rows are picture: one above and one below are padding."""
    part, shown, crops = layout((Grid(1, 4, 4), Grid(1, 6, 9)))
    assert part[16:].view(6, 9)[:, 0].tolist() == [1, 1, 1, 3, 3, 3]
    assert shown.view(4, 4)[:, 0].tolist() == [1, 1, 3, 3]
    assert crops == 4
    assert layout((Grid(1, 4, 4), Grid(1, 3, 9)))[2] == 2, "one row of crops, part of it padding"


def context(keep: int, early: torch.Tensor, late: torch.Tensor, **fields: object) -> Context:
    return Context(keep=keep, grids=GRIDS, early_cls_attention=early[None], cls_attention=late[None], **fields)


def test_votes_become_tokens():
    """Eight votes of the whole view: four in the first crop and four in the last one."""
    early = torch.zeros(88)
    early[[0, 1, 4, 5]] = 0.9
    early[[2, 3]] = 0.1  # what crop 2 shows
    early[[10, 11, 14, 15]] = torch.tensor([0.3, 0.3, 0.2, 0.2])
    late = torch.linspace(0.5, 0.1, 88)
    late[16:].view(8, 9)[:, 8] = torch.nan
    selection = HiRED(alpha=0.5).select(context(16, early, late)).check(88, 16)
    part = layout(GRIDS)[0][selection.kept]
    assert torch.bincount(part, minlength=5).tolist() == [8, 4, 0, 0, 4]
    assert selection.kept[:8].tolist() == list(range(8))
    stripes = HiRED(alpha=0.5, parts="bands").select(context(16, early, late)).kept
    assert torch.bincount(layout(GRIDS)[0][stripes], minlength=5).tolist() == [8, 2, 2, 2, 2]


@pytest.mark.parametrize("keep", [1, 2, 17, 60, 80, 87, 88])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_exactly_the_budget(keep: int, alpha: float):
    g = torch.Generator().manual_seed(keep)
    early, late = torch.rand(2, 88, generator=g)
    late[16:].view(8, 9)[:, 8] = torch.nan
    for parts in ("shown", "bands"):
        kept = HiRED(alpha=alpha, parts=parts).select(context(keep, early, late)).check(88, keep).kept
        assert keep > 80 or not late[kept].isnan().any(), "separators come last"


def test_cells_that_are_gone():
    g = torch.Generator().manual_seed(0)
    index = torch.arange(0, 88, 3)
    early, late = torch.rand(2, len(index), generator=g)
    for keep in (1, 9, len(index)):
        HiRED().select(context(keep, early, late, index=index)).check(len(index), keep)


def test_without_crops():
    late = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    ctx = Context(keep=5, grids=(Grid(1, 4, 4),), early_cls_attention=late.flip(1), cls_attention=late)
    assert torch.equal(HiRED().select(ctx).kept, late.mean(0).topk(5).indices.sort().values)
    with pytest.raises(SpecError, match="alpha"):
        HiRED(alpha=2.0)
