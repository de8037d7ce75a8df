from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.pruners.golden import load, names
from vlprune.context import Context
from vlprune.errors import BudgetError
from vlprune.plan import Budget
from vlprune.pruners.entropyprune import EntropyPrune

SCORED = [name for name in names("entropyprune") if not name.startswith("entropyprune_budget")]


@pytest.mark.parametrize("name", SCORED)
def test_golden(name: str):
    g = load(name)
    ctx = Context(keep=g.params["keep"], queries=g["queries"])
    torch.testing.assert_close(EntropyPrune().score(ctx), g["entropy_f64"], rtol=1e-6, atol=1e-9)
    assert EntropyPrune().select(ctx).check(g.params["n_visual"], ctx.keep).kept.tolist() == g["keep_sorted"].tolist()
    # float32 eigenvalues are off by about 1e-7 of the trace
    fast = EntropyPrune(dtype="float32")
    torch.testing.assert_close(fast.score(ctx).double(), g["entropy_f64"], rtol=1e-4, atol=1e-4)


def test_golden_budget():
    g = load("entropyprune_budget")
    for (layers, average, at, n), count in zip(g["cases"].tolist(), g["plain"].tolist(), strict=True):
        if count < 2:
            with pytest.raises(BudgetError, match="out of reach"):
                Budget.equivalent(average, n, layers, at)
        else:
            assert Budget.equivalent(average, n, layers, at).count(n) == count


def unit(i: int, d: int = 128) -> Tensor:
    return torch.eye(d)[i]


def same(s: float) -> Tensor:
    return s * unit(0).repeat(4, 1)


def pairs(s: float) -> Tensor:
    return s * torch.stack([unit(0), -unit(0), unit(0), -unit(0)])


def spread(s: float) -> Tensor:
    return s * torch.eye(4, 128)


def test_by_hand():
    tokens = [same(1), pairs(0.5), pairs(1), pairs(2), spread(0.5), spread(1), spread(2), spread(4)]
    ctx = Context(keep=3, queries=torch.stack(tokens, dim=1))
    expected = torch.tensor([0, 0.25, 0, -4, 0.375, 0.75, 0, -12], dtype=torch.float64)
    torch.testing.assert_close(EntropyPrune().score(ctx), expected, rtol=1e-5, atol=1e-7)
    assert EntropyPrune().select(ctx).kept.tolist() == [1, 4, 5]
    third = math.log(3) / math.log(4)
    expected = torch.tensor([0, 0, 0, 0, third, third, third, third], dtype=torch.float64)
    torch.testing.assert_close(EntropyPrune(normalize="trace").score(ctx), expected, rtol=1e-5, atol=1e-7)


def test_invariances():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(6, 10, 64, generator=g, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=g, dtype=torch.float64)).Q
    for normalize in ("none", "trace"):
        rule = EntropyPrune(normalize=normalize)  # type: ignore[arg-type]
        score = rule.score(Context(keep=1, queries=q))
        for other in (q[torch.randperm(6, generator=g)], q + torch.randn(1, 10, 64, generator=g), q @ turn):
            torch.testing.assert_close(rule.score(Context(keep=1, queries=other)), score, rtol=1e-6, atol=1e-8)


def test_scaling():
    """S(c R) = c^2 S(R) - c^2 log(c^2) tr(G) / log H; the normalised form does not see c."""
    q = torch.randn(4, 9, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    centred = q - q.mean(0)
    trace = centred.square().sum(dim=(0, 2)) / 4
    c = 1.7
    score = EntropyPrune().score(Context(keep=1, queries=q))
    expected = c**2 * score - c**2 * math.log(c**2) * trace / math.log(4)
    torch.testing.assert_close(EntropyPrune().score(Context(keep=1, queries=c * q)), expected, rtol=1e-6, atol=1e-6)
    normalised = [EntropyPrune(normalize="trace").score(Context(keep=1, queries=x)) for x in (q, c * q)]
    torch.testing.assert_close(*normalised, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", ["none", "trace"])
def test_edges(dtype: torch.dtype, normalize: str):
    for keep in (1, 5, 12):
        ctx = Context(keep=keep, queries=torch.ones(4, 12, 80, dtype=dtype))
        kept = EntropyPrune(normalize=normalize).select(ctx).check(12, keep).kept  # type: ignore[arg-type]
        assert kept.tolist() == list(range(keep))
