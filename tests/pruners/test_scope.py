from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from vlprune.context import Context
from vlprune.pruners.scope import Scope


@pytest.mark.parametrize("name", names("base_scope"))
def test_golden(name: str):
    g = load(name)
    n, keep = g.params["patches"], g.params["keep"]
    for x, total, order in zip(g["features"], g["cls_attn_head_sum"], g["selected_in_pick_order"], strict=True):
        for k in (1, keep // 2, keep):
            ctx = Context(keep=k, features=x, cls_attention=total[None])
            kept = Scope(alpha=g.params["alpha"]).select(ctx).check(n, k).kept
            assert kept.tolist() == order[:k].sort().values.tolist()


def test_by_hand():
    """Gains 2 .5 . 3 at first; with token 0 its twin is covered, so the lonely token 2 beats it."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    ctx = Context(keep=2, features=x, cls_attention=torch.tensor([[0.5, 0.4, 0.1]]))
    assert Scope().select(ctx).kept.tolist() == [0, 2]


def test_alpha_zero_is_coverage_alone():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
    attention = torch.tensor([[0.9, 0.05, 0.03, 0.02]])
    assert Scope().select(Context(keep=1, features=x, cls_attention=attention)).kept.tolist() == [0]
    assert Scope(alpha=0.0).select(Context(keep=1, features=x, cls_attention=attention)).kept.tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_edges(dtype: torch.dtype):
    for keep in (1, 4, 9):
        ctx = Context(keep=keep, features=torch.ones(9, 3, dtype=dtype), cls_attention=torch.ones(2, 9))
        assert Scope().select(ctx).check(9, keep).kept.tolist() == list(range(keep))
    zero = Context(keep=4, features=torch.ones(9, 3), received_attention=torch.zeros(2, 9))
    Scope(attention="received").select(zero).check(9, 4)
