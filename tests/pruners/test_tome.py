from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from vlprune.context import Context
from vlprune.pruners.tome import ToMe


@pytest.mark.parametrize("name", names("base_tome"))
def test_golden(name: str):
    g = load(name)
    p = g.params
    front = int(p["class_token"])  # the class token is none of the N tokens here, and the authors never merge it
    n, keep = p["tokens"] - front, p["tokens"] - front - p["r"]
    for b in range(p["batch"]):
        x = g["x"][b, front:]
        ctx = Context(keep=keep, features=x, keys=g["metric"][b, None, front:])
        selection = ToMe(class_token=p["class_token"]).select(ctx).check(n, keep)
        rows, expected = selection.apply(x), g["out"][b, front:]
        size = torch.zeros(keep).index_add(0, selection.merge.slot, torch.ones(n))
        nearest = torch.cdist(rows, expected).argmin(1)  # theirs: first who was offered, then the others
        assert sorted(nearest.tolist()) == list(range(keep))
        torch.testing.assert_close(rows, expected[nearest], rtol=1e-4, atol=1e-5)
        assert torch.equal(size, g["size"][b, front:, 0][nearest])


def test_by_hand():
    """Keys of 1 and 2 are alike, then those of 3 and 4; 1, 3 and 5 are offered."""
    keys = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 0.1], [0, 0, 1], [0, 0.2, 1], [-1, 1, 1]])[None]
    x = torch.arange(6.0)[:, None]
    five, four = (ToMe().select(Context(keep=k, features=x, keys=keys)) for k in (5, 4))
    assert five.kept.tolist() == [0, 2, 3, 4, 5]
    assert five.apply(x).flatten().tolist() == [0, 1.5, 3, 4, 5]
    assert four.kept.tolist() == [0, 2, 4, 5]
    assert four.apply(x).flatten().tolist() == [0, 1.5, 3.5, 5]


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("n", [7, 64])
def test_rows_are_means_of_a_partition(class_token: bool, n: int):
    g = torch.Generator().manual_seed(0)
    keys, x = torch.randn(2, n, 5, generator=g), torch.randn(n, 3, generator=g)
    for keep in (1, 2, n // 3, n - 1, n):
        selection = ToMe(class_token=class_token).select(Context(keep=keep, keys=keys)).check(n, keep)
        merge = selection.merge
        assert sorted(merge.source.tolist()) == list(range(n))
        torch.testing.assert_close(torch.zeros(keep).index_add(0, merge.slot, merge.weight), torch.ones(keep))
        assert torch.equal(merge.slot[selection.kept], torch.arange(keep)), "a kept token is part of its own slot"
        if keep == n:
            assert torch.equal(selection.apply(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_keys(dtype: torch.dtype):
    for keep in (1, 5, 9):
        ToMe().select(Context(keep=keep, keys=torch.ones(2, 9, 4, dtype=dtype))).check(9, keep)
