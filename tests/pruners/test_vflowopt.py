from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vlprune
from tests.pruners.golden import load, names
from tests.pruners.vectors import BUILDERS, Given, Rows, _visual
from vlprune.context import Context, Grid
from vlprune.errors import SpecError
from vlprune.pruners.vflowopt import GlobalTokens, VFlowOpt, cells, recycled

FILES = names("vflowopt")
ANYRES = (Grid(1, 27, 27), Grid(1, 12, 17))


# ---- the authors' code


@pytest.mark.parametrize("name", FILES)
def test_golden_map(name: str):
    g = load(name)
    (rule, ctx), *_ = BUILDERS["vflowopt"](g)
    entropy = float(g["alpha"]) * g["entropy"].flatten().softmax(0)
    torch.testing.assert_close(rule.select(ctx).scores, g["importance"] - entropy, rtol=1e-5, atol=1e-7)
    rows, weights = GlobalTokens(float(g["t"]))(g["attn"].mean(dim=(1, 2)))
    assert rows[0, weights[0] > 0].sort().values.tolist() == g["global_tokens"].tolist()


@pytest.mark.parametrize("name", FILES)
def test_golden_recycling(name: str):
    g = load(name)
    _, (rule, ctx), *_ = BUILDERS["vflowopt"](g)
    selection = rule.select(ctx).check(ctx.tokens, ctx.keep)
    assert selection.kept.tolist() == g["merge_keep"].tolist()
    torch.testing.assert_close(selection.apply(ctx.features), g["merge_out_features"], rtol=1e-5, atol=1e-6)
    assert torch.equal(selection.scores[selection.kept], g["merge_out_map"])

    n, low = ctx.tokens, g["merge_group"] >= 0
    assert int(low.sum()) == int(g["merge_reduce"]) + int(g["merge_num_merged"])
    assert ctx.keep == n - int(low.sum()) + len(g["merge_group"][low].unique())
    alone = torch.ones(n, dtype=torch.bool).index_fill(0, low.nonzero()[:, 0], False)[selection.kept]
    assert torch.equal(selection.apply(ctx.features)[alone], ctx.features[selection.kept][alone]), "bit by bit"


@pytest.mark.parametrize("name", FILES)
def test_golden_cells(name: str):
    g = load(name)
    _, (rule, ctx), *_ = BUILDERS["vflowopt"](g)
    cell, _ = cells(ctx.grids, rule.cell)
    low = g["merge_group"] >= 0
    pairs = torch.stack([cell[low], g["merge_group"][low]], 1).unique(dim=0)
    assert len(pairs) == len(pairs[:, 0].unique()) == len(pairs[:, 1].unique()), "the same cells by other numbers"


@pytest.mark.parametrize("name", FILES)
def test_golden_decoder_stages(name: str):
    g = load(name)
    _, _, *stages = BUILDERS["vflowopt"](g)
    for layer, (rule, ctx) in enumerate(stages):
        selection = rule.select(ctx)
        assert selection.merge is None
        assert ctx.index[selection.kept].tolist() == _visual(g, layer).tolist()


# ---- the map


def attention(n: int, seed: int = 0, crops: int = 1, heads: int = 2) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(crops, heads, n, n, generator=g)).softmax(-1)


def picture(scores: Tensor, grids: tuple[Grid, ...], keep: int, **more: object) -> Context:
    return Context(keep=keep, grids=grids, encoder_rows=Given(scores), **more)  # type: ignore[arg-type]


def test_uniform_attention():
    ctx = Context(keep=5, grids=(Grid(1, 4, 4),), encoder_rows=Rows(torch.full((1, 2, 16, 16), 1 / 16)))
    for threshold in (0.0, 0.9, 1.0, 34.76):
        torch.testing.assert_close(VFlowOpt(threshold).importance(ctx), torch.full((16,), 1 / 16))


def test_all_tokens_are_global():
    """t = 0: the map is what each token receives."""
    a = attention(16)
    ctx = Context(keep=5, grids=(Grid(1, 4, 4),), encoder_rows=Rows(a))
    torch.testing.assert_close(VFlowOpt(threshold=0.0).importance(ctx), a.mean(dim=(1, 2))[0])


@pytest.mark.parametrize("threshold", [0.3, 1.0, 1.7, 3.0, 7.5, 500.0])
def test_global_tokens(threshold: float):
    """Each crop by itself, with no more rows than there can be; the one that receives most where none stands out."""
    received = attention(60, crops=7).mean(dim=(1, 2))
    received[3] = torch.nn.functional.one_hot(torch.tensor(8), 60).float()
    rows, weights = GlobalTokens(threshold)(received)
    assert rows.shape == weights.shape
    assert rows.shape[1] <= max(1, 60 / max(threshold, 1))
    for r, w, one in zip(rows, weights, received, strict=True):
        want = (one > threshold * one.mean()).nonzero()[:, 0].tolist() or [int(one.argmax())]
        assert sorted(r[w > 0].tolist()) == want
        assert w[w > 0].unique().numel() == 1
        assert float(w.sum()) == pytest.approx(1.0)


def test_separators_are_worth_most():
    newline = torch.arange(12) % 4 == 3
    scores = torch.linspace(0.1, 0.9, 12).masked_fill(newline, torch.nan)
    ctx = picture(scores, (Grid(1, 3, 4),), 5, newline=newline)
    assert torch.equal(VFlowOpt().importance(ctx), scores.nan_to_num(nan=1.0))
    assert {3, 7, 11} < set(VFlowOpt().select(ctx).kept.tolist())


# ---- recycling


def test_by_hand():
    """Two cells, of columns 0-1 and 2-3; the three lowest of the left become one at token 4."""
    scores = torch.tensor([[0.1, 0.2, 0.4, 0.9, 0.3, 0.8, 0.7, 0.6]])
    ctx = picture(scores[0], (Grid(1, 2, 4),), 6)
    selection = VFlowOpt(cell=2).select(ctx).check(8, 6)
    assert selection.kept.tolist() == [2, 3, 4, 5, 6, 7]
    x = torch.tensor([[10.0], [20.0], [2.0], [3.0], [30.0], [5.0], [6.0], [7.0]])
    want = torch.tensor([2.0, 3.0, (0.1 * 10 + 0.2 * 20 + 0.3 * 30) / 0.6, 5.0, 6.0, 7.0])
    torch.testing.assert_close(selection.apply(x).flatten(), want)


def test_ties():
    """Equal maps: a plain mean at the first place."""
    selection = VFlowOpt(cell=99).select(picture(torch.full((9,), 0.5), (Grid(1, 3, 3),), 1))
    assert selection.kept.tolist() == [0]
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(selection.apply(x)[0], x.mean(0))


def test_the_whole_view_and_the_crops_have_their_own_cells():
    """Down to one token for each."""
    scores = torch.rand(729 + 204, generator=torch.Generator().manual_seed(1))
    kept = VFlowOpt(cell=1e6).select(picture(scores, ANYRES, 2)).check(933, 2).kept
    assert kept.tolist() == [int(scores[:729].argmax()), 729 + int(scores[729:].argmax())]


def authors(
    scores: Tensor, grids: tuple[Grid, ...], side: float, low: int
) -> tuple[list[int], dict[int, dict[int, float]]]:
    """The rule as it is told: kept tokens, and what each kept one of a cell is made of."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for i in scores.argsort(stable=True)[:low].tolist():
        grid, j = 0, i
        while j >= grids[grid].tokens:
            j -= grids[grid].tokens
            grid += 1
        width = grids[grid].width
        groups.setdefault((grid, int(j // width / side), int(j % width / side)), []).append(i)
    parts = {}
    for tokens in groups.values():
        total = sum(float(scores[i]) for i in tokens)
        parts[max(tokens, key=lambda i: float(scores[i]))] = {i: float(scores[i]) / total for i in tokens}
    rest = set(range(len(scores))) - {i for tokens in groups.values() for i in tokens}
    return sorted(rest | parts.keys()), parts


@pytest.mark.parametrize("side", [1.0, 2.5, 5.4, 8.0, 15.581, 40.0])
@pytest.mark.parametrize("seed", range(3))
def test_every_count_is_the_authors(side: float, seed: int):
    """However many low tokens there are, with their count as K ours are theirs."""
    grids = (Grid(1, 9, 9), Grid(1, 5, 13))
    scores = torch.rand(146, generator=torch.Generator().manual_seed(seed))
    for low in range(0, 147, 5):
        kept, parts = authors(scores, grids, side, low)
        selection = VFlowOpt(cell=side).select(picture(scores, grids, len(kept))).check(146, len(kept))
        assert selection.kept.tolist() == kept
        dense = torch.zeros(len(kept), 146)
        m = selection.merge
        dense.index_put_((m.slot, m.source), m.weight, accumulate=True)
        want = torch.zeros(len(kept), 146)
        for slot, token in enumerate(kept):
            for source, weight in parts.get(token, {token: 1.0}).items():
                want[slot, source] = weight
        torch.testing.assert_close(dense, want)


@pytest.mark.parametrize("grids", [ANYRES, (Grid(1, 1, 7),), (Grid(1, 24, 24),), (Grid(1, 1, 1), Grid(1, 4, 4))])
@pytest.mark.parametrize("side", [0.5, 3.3, 15.581, 1000.0])
def test_any_budget(grids: tuple[Grid, ...], side: float):
    """K tokens in order, in each a mean of tokens; maps of a few values have ties and zeros."""
    n = sum(g.tokens for g in grids)
    for keep in sorted({1, 2, 3, n // 9, n // 2, n - 1, n} & set(range(1, n + 1))):
        for values in (2, 1000):
            scores = torch.randint(0, values, (n,), generator=torch.Generator().manual_seed(keep)) / values
            selection = VFlowOpt(cell=side).select(picture(scores, grids, keep)).check(n, keep)
            m = selection.merge
            assert len(m.source) == n
            assert len(m.source.unique()) == n
            sums = torch.zeros(keep).index_add(0, m.slot, m.weight)
            torch.testing.assert_close(sums, torch.ones(keep))
            same = torch.full((n, 3), 0.7)
            torch.testing.assert_close(selection.apply(same), same[:keep])
            x = torch.arange(n, dtype=torch.float32)[:, None]
            if keep == n:
                assert torch.equal(selection.apply(x), x)


def test_fewer_tokens_than_cells():
    """Cells of single tokens: the K highest, as they are."""
    scores = torch.rand(16, generator=torch.Generator().manual_seed(0))
    selection = VFlowOpt(cell=1).select(picture(scores, (Grid(1, 4, 4),), 5))
    assert selection.kept.tolist() == scores.topk(5).indices.sort().values.tolist()
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(selection.apply(x), x[selection.kept])


def test_cells_of_tokens_that_an_earlier_stage_left():
    index = torch.tensor([0, 1, 2, 5, 7])
    scores = torch.tensor([0.3, 0.2, 0.9, 0.1, 0.8])
    ctx = picture(scores, (Grid(1, 2, 4),), 4, index=index)
    selection = VFlowOpt(cell=2).select(ctx)
    assert selection.kept.tolist() == [0, 1, 2, 4], "cells 0 1 and 5 are one"
    kept, _, slot, weight = recycled(scores[None], torch.tensor([[0, 0, 1, 0, 1]]), 2, 4)
    assert torch.equal(kept[0], selection.kept)
    torch.testing.assert_close(weight[0, (slot[0] == 1)].sort().values, torch.tensor([1 / 3, 2 / 3]))


@pytest.mark.parametrize(
    "ctx",
    [
        picture(torch.arange(18.0), (Grid(2, 3, 3),), 4),
        picture(torch.arange(10.0), (Grid(1, 3, 3), Grid(1, 1, 1)), 4),
        picture(torch.arange(9.0), (Grid(1, 3, 3),), 4, layer=9),
        picture(torch.zeros(1), (Grid(1, 1, 1),), 1),
    ],
    ids=["video", "one of several pictures", "decoder stage", "single token"],
)
def test_what_is_not_recycled(ctx: Context):
    selection = VFlowOpt(cell=2).select(ctx)
    n = sum(g.tokens for g in ctx.grids)
    assert selection.merge is None
    assert selection.kept.tolist() == list(range(n - ctx.keep, n))


def test_recycling_is_a_choice():
    ctx = picture(torch.arange(9.0), (Grid(1, 3, 3),), 4, layer=0)
    assert VFlowOpt().merges
    assert VFlowOpt().select(ctx).merge is not None
    assert not VFlowOpt(recycle=False).merges
    assert VFlowOpt(recycle=False).select(ctx).kept.tolist() == [5, 6, 7, 8]


def test_shipped_plans():
    """The shares of the table give the averages that the authors name."""
    for want, shares in {
        0.5: (0.72332, 0.54159, 0.26375),
        0.25: (0.26510, 0.26068, 0.22870),
        0.1: (0.116615, 0.116615, 0.070097),
    }.items():
        plan = vlprune.Plan.parse(
            "+".join(f"vflowopt{at}:keep={s}" for at, s in zip(("", "@9", "@18"), shares, strict=True))
        )
        assert plan.layer_average(100_000, 28) / 100_000 == pytest.approx(want, abs=1e-3)


def test_no_cell():
    with pytest.raises(SpecError, match="cell"):
        VFlowOpt(cell=0)
