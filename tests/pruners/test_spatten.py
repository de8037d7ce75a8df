from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from tests.pruners.vectors import BUILDERS
from vlprune.context import Context, Grid
from vlprune.errors import SpecError
from vlprune.pruners.spatten import Gathered, SpAtten, SpAttenRelease


@pytest.mark.parametrize("name", names("spatten_release"))
def test_golden(name: str):
    g = load(name)
    for (rule, ctx), kept in zip(BUILDERS["spatten_release"](g), g["kept"], strict=True):
        selection = rule.select(ctx).check(int(g["seq_len"]), ctx.keep)
        assert torch.equal(selection.heads.kept, kept)


def test_released_rule_by_hand():
    keys = torch.tensor([[[5.0], [1.0], [3.0], [-9.0], [2.0], [0.0]]])
    ctx = Context(keep=3, keys=keys, query_sum=torch.tensor([[1.0], [1.0]]))
    assert SpAttenRelease().select(ctx).heads.kept.tolist() == [[0, 2, 4]]
    assert SpAttenRelease(tokens="all", first=1).select(ctx).heads.kept.tolist() == [[0, 2, 5]]
    assert SpAttenRelease(tokens="all", first=9).select(ctx).heads.kept.tolist() == [[0, 1, 5]]


def test_a_cascade_ends_with_the_budget():
    rule, layers = SpAtten(), 28
    counts = [rule.count(64, 1000, layer, layers) for layer in range(layers)]
    assert counts == sorted(counts, reverse=True)
    assert counts[13:] == [64] * 15
    assert counts[0] == 1000 - 936 // 14
    read = [1000, *counts[:-1]]
    assert sum(read) / layers == pytest.approx((1000 + 3 * 64) / 4, rel=0.07)
    assert [SpAtten(first=0.5, last=0.5).count(3, 16, layer, 5) for layer in range(5)] == [16, 16, 3, 3, 3]


def test_sets_are_nested_within_a_step():
    g = torch.Generator().manual_seed(0)
    rule, state, layers = SpAtten(), Gathered(), 6
    for _ in range(3):
        last = set(range(36))
        for layer in range(layers):
            keep = rule.count(5, 36, layer, layers)
            ctx = Context(
                keep=keep, grids=(Grid(1, 6, 6),), last_attention=torch.rand(4, 36, generator=g), layer=layer, layers=6
            )
            selection, state = rule.step(ctx, state)
            now = set(selection.check(36, keep).kept.tolist())
            assert now <= last
            last = now
        assert len(last) == 5


def test_scores_add_up_over_layers_and_steps():
    rule, rows = SpAtten(first=0.0, last=0.0), torch.tensor([[[0.4, 0.1, 0.0]], [[0.0, 0.2, 0.3]], [[0.0, 0.3, 0.0]]])
    grids, state, kept = (Grid(1, 1, 3),), Gathered(), []
    for layer, row in zip((0, 1, 0), rows, strict=True):
        selection, state = rule.step(Context(keep=1, grids=grids, last_attention=row, layer=layer, layers=2), state)
        kept.append(selection.kept.tolist())
    assert kept == [[0], [0], [1]], "token 1 comes back with the next step, and 0.1 + 0.2 + 0.3 exceed 0.4"
    torch.testing.assert_close(state.scores, torch.tensor([0.4, 0.6, 0.3]))


def test_scores_follow_grid_cells():
    rule, grids = SpAtten(), (Grid(1, 2, 4),)
    _, state = rule.step(Context(keep=8, grids=grids, last_attention=torch.ones(1, 8), layer=0, layers=3), Gathered())
    left = Context(
        keep=1, grids=grids, index=torch.tensor([1, 6]), last_attention=torch.tensor([[0.1, 0.2]]), layer=1, layers=3
    )
    selection, state = rule.step(left, state)
    assert selection.kept.tolist() == [1]
    torch.testing.assert_close(state.scores[[1, 6, 0]], torch.tensor([1.1, 1.2, 1.0]))


def test_parameters_it_refuses():
    for wrong in ({"first": -0.1}, {"first": 0.6}, {"last": 1.1}):
        with pytest.raises(SpecError, match="spatten"):
            SpAtten(**wrong)
    with pytest.raises(SpecError, match="spatten_release"):
        SpAttenRelease(first=-1)
