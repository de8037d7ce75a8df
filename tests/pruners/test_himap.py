from __future__ import annotations

import pytest
import torch

from vlprune.context import Context
from vlprune.pruners.himap import HiMAP


def test_sums_rows_and_averages_heads():
    rows = torch.tensor([[[0.1, 0.2, 0.0], [0.3, 0.0, 0.0]], [[0.0, 0.5, 0.1], [0.0, 0.1, 0.1]]])  # [M=2, H=2, N=3]
    ctx = Context(keep=1, text_attention=rows)
    torch.testing.assert_close(HiMAP().score(ctx), torch.tensor([0.2, 0.4, 0.1]))
    assert HiMAP().select(ctx).kept.tolist() == [1]


def test_one_row_is_the_last_token():
    row = torch.rand(1, 4, 30, generator=torch.Generator().manual_seed(0))
    ctx = Context(keep=7, text_attention=row)
    assert HiMAP().select(ctx).kept.tolist() == row[0].mean(0).topk(7).indices.sort().values.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_and_counts(dtype: torch.dtype):
    for keep in (1, 6):
        ctx = Context(keep=keep, text_attention=torch.full((3, 2, 6), 0.1, dtype=dtype))
        assert HiMAP().select(ctx).check(6, keep).kept.tolist() == list(range(keep))
