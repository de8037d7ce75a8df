from __future__ import annotations

import math

import pytest
import torch

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruners.agilepruner import AgilePruner, effective_rank


def context(keep: int, x: torch.Tensor, attention: torch.Tensor) -> Context:
    return Context(keep=keep, features=x, cls_attention=attention[None], received_attention=attention.flip(0)[None])


def test_effective_rank_of_known_spectra():
    assert float(effective_rank(torch.eye(7))) == pytest.approx(7)
    assert float(effective_rank(torch.ones(5, 9))) == pytest.approx(1, abs=1e-5)
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert float(effective_rank(torch.diag(torch.tensor([3.0, 1.0])))) == pytest.approx(expected)
    assert expected == pytest.approx(1.7548, abs=1e-4)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_effective_rank_by_another_way(shape: tuple[int, int]):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    q = torch.linalg.svdvals(x) / torch.linalg.svdvals(x).sum()
    expected = (-(q * q.log()).sum()).exp()
    torch.testing.assert_close(effective_rank(x), expected)
    turn = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=g, dtype=torch.float64))[0]
    torch.testing.assert_close(effective_rank(5 * x @ turn), expected)


def test_nothing_is_removed_at_threshold_zero():
    g = torch.Generator().manual_seed(0)
    x, a = torch.randn(30, 8, generator=g), torch.rand(30, generator=g)
    best = a.topk(9).indices.sort().values.tolist()
    assert AgilePruner(average=1e30).select(context(9, x, a)).kept.tolist() == best
    assert AgilePruner(average=1e-3, tau_max=0.99).select(context(8, torch.eye(30), a)).kept.tolist() == sorted(
        a.topk(8).indices.tolist()
    ), "orthogonal tokens are all far"


@pytest.mark.parametrize("order", ["rank", "selected"])
def test_a_twin_is_removed(order: str):
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    a = torch.tensor([0.5, 0.3, 0.2])
    assert AgilePruner(order=order).select(context(2, x, a)).kept.tolist() == [0, 2]
    assert AgilePruner(tau_max=0.0, order=order).select(context(2, x, a)).kept.tolist() == [0, 1]


def test_removed_tokens_come_back_by_attention():
    a = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05])
    assert AgilePruner().select(context(4, torch.ones(5, 3), a)).kept.tolist() == [0, 1, 2, 3]
    assert AgilePruner().select(context(2, torch.ones(5, 3), a)).kept.tolist() == [1, 3]


def test_zero_vectors_are_far_from_all():
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert AgilePruner(tau_max=0.9, average=1e-3).select(
        context(2, x, torch.tensor([0.5, 0.3, 0.2]))
    ).kept.tolist() == [0, 1]


@pytest.mark.parametrize("order", ["rank", "selected"])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_walk_step_by_step(order: str, seed: int):
    g = torch.Generator().manual_seed(seed)
    x, a = torch.randn(50, 5, generator=g), torch.rand(50, generator=g)
    unit = torch.nn.functional.normalize(x, dim=1)
    ratio, keep = float(effective_rank(x)) / 3, 12
    left, kept = a.argsort(descending=True).tolist(), []
    ranks = {token: i + 1 for i, token in enumerate(left)}
    while left and len(kept) < keep:
        token = left.pop(0)
        tau = min(0.4, (ranks[token] if order == "rank" else len(kept) + 1) * ratio * 0.01)
        left = [j for j in left if float(1 - unit[token] @ unit[j]) >= tau]
        kept.append(token)
    for token in ranks:
        if len(kept) < keep and token not in kept:
            kept.append(token)
    pruner = AgilePruner(average=3.0, tau_max=0.4, order=order)
    assert pruner.select(context(keep, x, a)).kept.tolist() == sorted(kept)


def test_parameters():
    assert AgilePruner(attention="received").needs == {"features", "received_attention"}
    with pytest.raises(SpecError, match="average"):
        AgilePruner(average=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("equal", [False, True])
def test_counts(dtype: torch.dtype, equal: bool):
    x = torch.ones(20, 6) if equal else torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    for keep in (1, 7, 20):
        AgilePruner().select(context(keep, x.to(dtype), torch.ones(20))).check(20, keep)
