from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruners.vispruner import VisPruner


@pytest.mark.parametrize("name", names("base_vispruner"))
def test_golden(name: str):
    g = load(name)
    n, keep = g.params["patches"], g.params["keep"]
    for x, attention, mask in zip(g["features"], g["cls_attn"], g["keep_mask"], strict=True):
        ctx = Context(keep=keep, features=x, cls_attention=attention)
        kept = VisPruner(important=g.params["important_ratio"]).select(ctx).check(n, keep).kept
        assert kept.tolist() == mask.nonzero().squeeze(1).tolist()


def test_by_hand():
    """Important: 0. List 1 2 3 4, even places 1 3 against 2 4: 1 is like 2 and goes first, then 3 is like 4."""
    x = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.3, 1.0]])
    attention = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    rule = VisPruner(important=0.25)
    assert rule.select(Context(keep=4, features=x, cls_attention=attention)).kept.tolist() == [0, 2, 3, 4]
    assert VisPruner(important=1.0).select(Context(keep=2, features=x, cls_attention=attention)).kept.tolist() == [0, 1]


def test_removes_eight_a_round():
    """20 equal tokens down to 8: 0 2 .. 14 go first, then 16 1 5 9 of 16 18 1 3 5 7 9 11 13 15 17 19."""
    ctx = Context(keep=8, features=torch.ones(20, 4), cls_attention=torch.linspace(2, 1, 20)[None])
    assert VisPruner(important=0.0).select(ctx).kept.tolist() == [3, 7, 11, 13, 15, 17, 18, 19]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("important", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("n", [1, 2, 9, 37])
def test_every_budget_is_met(dtype: torch.dtype, important: float, n: int):
    for x in (torch.ones(n, 4), torch.randn(n, 4, generator=torch.Generator().manual_seed(n))):
        for keep in range(1, n + 1):
            ctx = Context(keep=keep, features=x.to(dtype), cls_attention=torch.ones(2, n))
            VisPruner(important=important).select(ctx).check(n, keep)


def test_share_outside_range():
    with pytest.raises(SpecError, match="important"):
        VisPruner(important=1.5)
