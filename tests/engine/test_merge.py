"""Merges of several pictures as one list of entries do what each of them does alone."""

from __future__ import annotations

import pytest
import torch

from vlprune import Merge, Selection
from vlprune.engine.merge import entries_of
from vlprune.ops import gather_tokens

CPU = torch.device("cpu")


def merging(n: int, k: int, g: torch.Generator) -> Selection:
    """K of N tokens with random shares of all of them; the last kept token is named by no entry."""
    kept = torch.randperm(n, generator=g)[:k].sort().values
    source, slot = torch.randperm(n, generator=g), torch.randint(0, k - 1, (n,), generator=g)
    return Selection(kept, Merge(source, slot, torch.rand(n, generator=g)))


@pytest.mark.parametrize("rows", [1, 2])
def test_entries_of_several_pictures(rows: int) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 20, 6, generator=g)
    first, second = merging(8, 3, g), merging(9, 4, g)
    plain = Selection(torch.tensor([1, 2]))
    # row 0: tokens 0..7 and 8..16 merge into slots 0..2 and 3..6; the last row: tokens 17..19 lose one
    last = rows - 1
    slots = torch.zeros(rows, 9, dtype=torch.int64)
    slots[0, :7] = torch.cat([first.kept, second.kept + 8])
    slots[last, 7:] = plain.kept + 17
    parts = [(first, 0, 0), (second, 8, 3), (plain, 17, last * 9 + 7)]
    out = gather_tokens(x, slots, merge=entries_of(parts, CPU))
    torch.testing.assert_close(out[0, :3], first.apply(x[0, :8]))
    torch.testing.assert_close(out[0, 3:7], second.apply(x[0, 8:17]))
    assert torch.equal(out[last, 7:], x[last, 18:20])
    assert not out[0, 2].any()


def test_nothing_to_merge() -> None:
    assert entries_of([(Selection(torch.tensor([0, 3])), 0, 0)], CPU) is None
    assert entries_of([], CPU) is None
