from __future__ import annotations

import pytest
import torch

from vlprune.context import Context, Grid
from vlprune.pruners.uniform import Uniform


def kept(keep: int, *grids: Grid, **fields: torch.Tensor) -> list[int]:
    ctx = Context(keep=keep, grids=grids, **fields)
    return Uniform().select(ctx).check(ctx.tokens, keep).kept.tolist()


def test_square_counts_lie_on_a_square_lattice():
    assert kept(4, Grid(1, 8, 8)) == [18, 22, 50, 54]  # rows 2 and 6, columns 2 and 6
    assert kept(1, Grid(1, 5, 5)) == [12]


def test_tall_grid_gets_more_rows_than_columns():
    tokens = torch.tensor(kept(8, Grid(1, 16, 4)))
    assert len(set((tokens // 4).tolist())) == 6  # sqrt(8 * 16 / 4) = 5.7
    assert kept(3, Grid(1, 9, 1)) == [1, 4, 7]


def test_llava_lattice_covers_every_quarter_alike():
    tokens = torch.tensor(kept(64, Grid(1, 24, 24)))
    quarter = tokens // 24 // 12 * 2 + tokens % 24 // 12
    assert quarter.bincount().tolist() == [16, 16, 16, 16]


@pytest.mark.parametrize(
    "grids",
    [
        (Grid(1, 24, 24),),
        (Grid(3, 4, 5), Grid(1, 2, 7)),
        (Grid(1, 1, 1), Grid(8, 1, 3)),
        (Grid(1, 1, 40),),
        (Grid(2, 13, 3),),
    ],
)
def test_every_budget_is_met(grids: tuple[Grid, ...]):
    n = sum(g.tokens for g in grids)
    for keep in range(1, n + 1):
        assert len(kept(keep, *grids)) == keep
    assert kept(n, *grids) == list(range(n))


def test_grids_and_frames_share_by_size():
    tokens = torch.tensor(kept(10, Grid(1, 4, 4), Grid(2, 8, 4)))  # 16 + 32 + 32 tokens
    assert torch.bucketize(tokens, torch.tensor([16, 48]), right=True).bincount().tolist() == [2, 4, 4]


def test_thinned_grid_is_spread_in_reading_order():
    index = torch.tensor([0, 3, 4, 7, 9, 11, 12, 15])
    assert kept(4, Grid(1, 4, 4), index=index) == [1, 3, 5, 7]
