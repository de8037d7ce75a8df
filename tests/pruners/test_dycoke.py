from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from tests.pruners.vectors import BUILDERS
from vlprune.context import Context, Grid
from vlprune.pruners.dycoke import DyCoke, quotas, references


@pytest.mark.parametrize("name", names("base_dycoke"))
def test_golden(name: str):
    g = load(name)
    ((rule, ctx),) = BUILDERS["base_dycoke"](g)
    kept = rule.select(ctx).check(len(g["features"]), ctx.keep).kept
    assert kept.tolist() == g["source_row"].sort().values.tolist()


def test_references():
    assert references([4] * 8, "corrected") == [None, 0, 0, 2, None, 4, 4, 6]
    assert references([4] * 8, "official") == [None, 0, 0, 2, None, 4, None, 6]
    assert references([4, 4, 5, 4], "corrected") == [None, 0, None, None], "frames of another size are not compared"
    assert references([9], "corrected") == [None]


def test_quotas():
    assert quotas([16] * 4, [True, False, False, False], 28) == [16, 4, 4, 4]
    assert quotas([16] * 4, [True, False, False, False], 30) == [16, 5, 5, 4]
    assert quotas([16] * 4, [True, False, False, False], 16) == [16, 0, 0, 0]
    assert quotas([16] * 4, [True, False, False, False], 10) == [3, 2, 3, 2]
    assert quotas([36], [True], 5) == [5]
    assert sum(quotas([7, 1, 7, 7], [False, True, False, False], 13)) == 13


def video(keep: int, frames: int = 4, compat: str = "corrected", **fields: object) -> tuple[DyCoke, Context]:
    x = torch.eye(4).repeat(frames, 1)  # frames of 2 x 2 tokens, all alike
    return DyCoke(compat=compat), Context(keep=keep, grids=(Grid(frames, 2, 2),), features=x, **fields)


def test_what_moved_stays():
    rule, ctx = video(7)
    ctx.features[4 + 2] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # the second frame differs here
    ctx.features[8 + 1] = torch.tensor([0.0, 1.0, 1.0, 0.0])  # the third here, and so the fourth from it
    ctx.features[12 + 3] = torch.tensor([0.0, 0.0, 0.2, 1.0])  # the fourth a little here
    assert rule.select(ctx).kept.tolist() == [0, 1, 2, 3, 6, 9, 13]
    ctx.features[12 + 1] = ctx.features[8 + 1]
    assert rule.select(ctx).kept.tolist() == [0, 1, 2, 3, 6, 9, 15]


def test_a_picture_is_thinned_evenly():
    ctx = Context(keep=3, grids=(Grid(1, 3, 4),), features=torch.rand(12, 5))
    assert DyCoke().select(ctx).kept.tolist() == [2, 6, 10]


def test_frames_that_lost_tokens():
    index = torch.tensor([0, 2, 3, 5, 6, 9, 10, 15])
    x = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    for keep in range(1, 9):
        DyCoke().select(Context(keep=keep, grids=(Grid(4, 2, 2),), features=x, index=index)).check(8, keep)
