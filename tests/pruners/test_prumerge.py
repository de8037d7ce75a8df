from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from tests.pruners.vectors import BUILDERS
from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruners.prumerge import PruMerge, outliers, spacing


@pytest.mark.parametrize("name", names("base_prumerge"))
def test_golden(name: str):
    g = load(name)
    order, n = g["kept_idx_in_order"], g.params["patches"]
    x = g["features_with_cls"][1:]
    for rule, ctx in BUILDERS["base_prumerge"](g):
        selection = rule.select(ctx).check(n, ctx.keep, rule.adaptive)
        assert len(selection.kept) == len(order) + 1
        left = torch.ones(n).index_fill(0, order, 0.0)
        assert left[selection.kept].sum() == 1, "all the authors' tokens, and one for the rest"
        rest = int(left[selection.kept].argmax())
        rows = selection.apply(x)
        torch.testing.assert_close(rows[rest], g["output"][-1], rtol=1e-4, atol=1e-5)
        mine = torch.cat([rows[:rest], rows[rest + 1 :]])
        torch.testing.assert_close(mine, g["output"][:-1][order.argsort()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", names("base_prumerge"))
def test_outliers_are_the_authors(name: str):
    g = load(name)
    a = (g["k_proj"] @ g["q_proj_cls"] / len(g["q_proj_cls"]) ** 0.5).softmax(0)[1:]
    assert outliers(a) == round(g.params["iqr_ratio"] * len(a))


def context(keep: int, n: int = 40, seed: int = 0) -> Context:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(1, n, generator=g).mul(2).softmax(1) * 0.9
    return Context(
        keep=keep,
        features=torch.randn(n, 6, generator=g),
        final_cls_attention=a,
        final_keys=torch.randn(2, n, 4, generator=g),
    )


def test_by_hand():
    """Token 1 stays and takes in token 3, its neighbour by key; 0, 2 and 3 go, and 3 has the largest a of them."""
    ctx = Context(
        keep=2,
        features=torch.tensor([[1.0], [10.0], [100.0], [1000.0]]),
        final_cls_attention=torch.tensor([[0.1, 0.5, 0.0, 0.2]]),
        final_keys=torch.tensor(
            [[[1.0], [0.0], [1.0], [0.0]], [[0.0], [1.0], [1.0], [2.0]]]
        ),  # two heads of one dimension
    )
    selection = PruMerge(neighbours=1).select(ctx)
    assert selection.kept.tolist() == [1, 3]
    torch.testing.assert_close(selection.apply(ctx.features).flatten(), torch.tensor([10.0 + 200.0, 0.1 + 200.0]))


def test_one_token_stands_for_all():
    ctx = context(1)
    selection = PruMerge().select(ctx).check(40, 1)
    a = ctx.final_cls_attention[0]
    assert selection.kept.tolist() == [int(a.argmax())]
    torch.testing.assert_close(selection.apply(ctx.features)[0], a @ ctx.features)


@pytest.mark.parametrize("keep", [1, 2, 3, 8, 20, 39])
def test_samples_fit_into_the_budget(keep: int):
    for seed in range(4):
        kept = PruMerge(plus=True).select(context(keep, seed=seed)).check(40, keep).kept
        assert len(kept) == keep


def test_samples_are_spread():
    a = torch.zeros(1, 576)
    a[0, :80] = torch.linspace(2e-3, 1e-3, 80)
    ctx = Context(keep=64, features=torch.rand(576, 2), final_cls_attention=a, final_keys=torch.rand(1, 576, 2))
    kept = set(PruMerge(plus=True).select(ctx).kept.tolist())
    assert spacing(576, 16) == 12
    assert set(range(0, 575, 12)) <= kept
    assert len([i for i in kept if i < 80 and i % 12]) == 16, "15 by attention and one for the rest"
    assert max(PruMerge().select(ctx).kept.tolist()) == 63


def test_adaptive_count():
    ctx = context(39)
    found = outliers(ctx.final_cls_attention[0])
    assert 0 < found < 38
    rule = PruMerge(count="outliers")
    assert rule.adaptive and not PruMerge().adaptive
    assert len(rule.select(ctx).check(40, 39, True).kept) == found + 1
    assert len(rule.select(context(2)).check(40, 2, True).kept) == 2
    flat = Context(
        keep=9, features=torch.ones(12, 2), final_cls_attention=torch.ones(1, 12), final_keys=torch.ones(1, 12, 2)
    )
    assert len(rule.select(flat).check(12, 9, True).kept) == 1
    with pytest.raises(SpecError, match="neighbours"):
        PruMerge(neighbours=0)
