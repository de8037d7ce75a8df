from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from vlprune.context import Context, Grid
from vlprune.errors import PruningError, SpecError
from vlprune.plan import Plan
from vlprune.pruners.fastocr import FastOCR, Gaze, around
from vlprune.selection import Selection


def context(a: Tensor, keep: int, layer: int = 1, **fields: object) -> Context:
    rows = a if a.dim() == 2 else a[None]
    return Context(keep=keep, last_attention=rows, layer=layer, layers=6, **fields)


def peaks(n: int, *at: int) -> Tensor:
    return torch.full((n,), 1e-3).index_fill(0, torch.tensor(at), 0.2)


def test_follows_the_gaze():
    """Eight tokens, two a step; what the layers before the focal layer read is the choice of the step before."""
    pruner = FastOCR(focal_layers="3")
    state = pruner.start(context(peaks(8, 5, 6), 2, layer=3))
    selection, state = pruner.step(context(peaks(8, 5, 6), 2, layer=3), state)  # the last prompt row
    read_first, read_after = [], []
    for peak in ((2, 3), (3, 4), (7, 0)):
        read_first.append(selection.kept.tolist())
        selection, state = pruner.step(context(peaks(8, *peak), 2, layer=3), state)
        read_after.append(selection.kept.tolist())
    assert read_after == [[2, 3], [3, 4], [0, 7]]
    assert read_first == [[5, 6], [2, 3], [3, 4]]


def test_mean_over_heads_and_ties():
    a = torch.rand(4, 30, generator=torch.Generator().manual_seed(0))
    kept = FastOCR().step(context(a, 7), Gaze())[0].check(30, 7).kept
    assert kept.tolist() == a.mean(0).topk(7).indices.sort().values.tolist()
    assert torch.equal(FastOCR().step(context(a[[3, 1, 0, 2]], 7), Gaze())[0].kept, kept), "heads have no order"
    assert FastOCR().step(context(torch.ones(9), 4), Gaze())[0].kept.tolist() == [0, 1, 2, 3]


def test_a_larger_budget_keeps_what_a_smaller_one_kept():
    a = torch.rand(50, generator=torch.Generator().manual_seed(0))
    kept = [set(FastOCR().step(context(a, k), Gaze())[0].kept.tolist()) for k in range(1, 51)]
    assert all(small < large for small, large in pairwise(kept))
    assert len(kept[-1]) == 50


def test_permuted_tokens_permute_the_choice():
    g = torch.Generator().manual_seed(0)
    a, order = torch.rand(2, 40, generator=g), torch.randperm(40, generator=g)
    kept = FastOCR().step(context(a, 9), Gaze())[0].kept
    turned = FastOCR().step(context(a[:, order], 9), Gaze())[0].kept
    assert sorted(order[turned].tolist()) == kept.tolist()


def test_smoothing_remembers_each_layer_apart():
    pruner = FastOCR(smoothing=0.5)
    _, state = pruner.step(context(torch.tensor([0.4, 0.0, 0.1]), 1, layer=1), Gaze())
    _, state = pruner.step(context(torch.tensor([0.0, 0.0, 0.9]), 1, layer=4), state)
    selection, state = pruner.step(context(torch.tensor([0.0, 0.15, 0.1]), 1, layer=1), state)
    assert selection.kept.tolist() == [0], "0.2 of the last look is left"
    torch.testing.assert_close(selection.scores, torch.tensor([0.2, 0.15, 0.15]))
    assert FastOCR().step(context(torch.tensor([0.0, 0.15, 0.1]), 1), state)[0].kept.tolist() == [1]


def test_states_are_replaced_not_changed():
    """Beams share a state until they part."""
    pruner = FastOCR(smoothing=0.5, window=1)
    grid = (Grid(1, 2, 3),)
    _, first = pruner.step(context(peaks(6, 2), 1, grids=grid), pruner.start(context(peaks(6, 2), 1)))
    cells, rankings = first.cells.clone(), {k: v.clone() for k, v in first.rankings.items()}
    a, _ = pruner.step(context(peaks(6, 0), 1, grids=grid), first)
    pruner.step(context(peaks(6, 5), 1, grids=grid), first)
    assert torch.equal(first.cells, cells)
    assert torch.equal(first.rankings[1], rankings[1])
    assert torch.equal(pruner.step(context(peaks(6, 0), 1, grids=grid), first)[0].kept, a.kept)


# ---- the window


def test_window_by_hand():
    """Cell (1, 3) of a 5 x 6 page, one around it, and the first three columns of the next row."""
    window, rim = around(torch.tensor([9]), Grid(1, 5, 6), 1)
    assert window.view(5, 6).int().tolist() == [
        [0, 0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert rim.view(5, 6).int().tolist() == [
        [0, 0, 1, 0, 1, 0],
        [0, 0, 1, 0, 1, 0],
        [1, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]


def test_window_keeps_to_its_frame():
    window, _ = around(torch.tensor([5]), Grid(2, 2, 3), 2)
    assert window.view(2, 6).any(1).tolist() == [True, False]


def test_window_limits_the_choice_until_the_next_scan():
    pruner, grid = FastOCR(window=1, period=3), (Grid(1, 8, 8),)
    far = torch.full((64,), 1e-6)
    far[[27, 28, 63]] = torch.tensor([0.05, 0.01, 0.06])  # 63 is out of reach, and little lies on the rim
    _, state = pruner.step(context(peaks(64, 27), 1, grids=grid), Gaze())
    picks = []
    for _ in range(4):
        selection, state = pruner.step(context(far, 1, grids=grid), state)
        picks.append(selection.kept.tolist())
    assert picks == [[27], [27], [63], [63]], "the third look scans the page"
    assert selection.scores[63] == far[63], "scores are the attention, not the restricted ranking"


def test_a_gaze_on_the_rim_frees_the_choice():
    pruner, grid = FastOCR(window=1, period=99), (Grid(1, 8, 8),)
    _, state = pruner.step(context(peaks(64, 27), 1, grids=grid), Gaze())
    leaving = torch.full((64,), 1e-6)
    leaving[[28, 63]] = torch.tensor([0.04, 0.06])  # 28 lies on the rim of the window around 27
    assert pruner.step(context(leaving, 1, grids=grid), state)[0].kept.tolist() == [63]


def test_window_counts_in_cells_when_tokens_are_gone():
    pruner, grid, index = FastOCR(window=1), (Grid(1, 8, 8),), torch.arange(0, 64, 3)
    _, state = pruner.step(context(peaks(22, 9), 1, grids=grid, index=index), Gaze())
    assert state.cells.tolist() == [27]
    budget = pruner.step(context(torch.ones(22), 22, grids=grid, index=index), state)[0].check(22, 22)
    assert len(budget.kept) == 22, "a budget beyond the window fills up outside it"
    with pytest.raises(PruningError, match="window=0"):
        pruner.step(context(torch.ones(22), 2, grids=grid), state)


# ---- the plan


def test_focal_layers():
    assert FastOCR().focal(28) == (2, 9)
    assert FastOCR().focal(8) == (1, 2)
    assert FastOCR().focal(1) == (0,)
    assert FastOCR(focal_layers="9/2/9").focal(28) == (2, 9)
    with pytest.raises(SpecError, match="layers 0 to 7"):
        FastOCR(focal_layers="2/9").focal(8)
    for wrong in ("2,9", "a", "2/", "-1"):
        with pytest.raises(SpecError, match="focal_layers"):
            FastOCR(focal_layers=wrong)


@pytest.mark.parametrize("text", [
    "fastocr:keep=0.05", "fastocr:keep=0.05:focal_layers=2/9", "fastocr:keep=0.05:focal_layers=2:least=0",
    "fastocr:keep=64:smoothing=0.5:window=2:period=8",
])  # fmt: skip
def test_plan_text(text: str):
    plan = Plan.parse(text)
    assert str(plan) == text
    assert Plan.parse(str(plan)) == plan
    assert plan.steps[0].stage.name == "decode"


def test_small_pictures_are_read_whole():
    assert not FastOCR().worthwhile(1023)
    assert FastOCR().worthwhile(1024)
    assert FastOCR(least=0).worthwhile(1)


def test_parameters_it_refuses():
    for wrong in ({"smoothing": 1.0}, {"window": -1}, {"period": 0}):
        with pytest.raises(SpecError, match="fastocr"):
            FastOCR(**wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype):
    for keep in (1, 30):
        FastOCR().step(context(torch.rand(2, 30).to(dtype), keep), Gaze())[0].check(30, keep)


@pytest.mark.parametrize("options", [{}, {"smoothing": 0.5}, {"window": 1, "period": 3}], ids=str)
def test_items_together_are_chosen_from_as_each_alone(options: dict[str, float]):
    g = torch.Generator().manual_seed(0)
    pruner = FastOCR(**options)
    alone, together = [Gaze()] * 3, [Gaze()] * 3
    for _ in range(5):  # of whole numbers, so that there are ties
        contexts = [
            context(torch.randint(1, 9, (2, 24), generator=g).float(), 5, grids=(Grid(1, 4, 6),)) for _ in range(3)
        ]
        found, together = pruner.step_many(contexts, together)
        for i, ctx in enumerate(contexts):
            selection, alone[i] = pruner.step(ctx, alone[i])
            assert torch.equal(found[i].kept, selection.kept)
            assert torch.equal(found[i].scores, selection.scores)


def test_a_subclass_with_a_step_of_its_own_is_asked_for_it():
    class Backwards(FastOCR):
        def step(self, ctx: Context, state: Gaze) -> tuple[Selection, Gaze]:
            return Selection(torch.arange(ctx.tokens - ctx.keep, ctx.tokens)), state

    found, _ = Backwards().step_many([context(torch.rand(9), 2), context(torch.rand(9), 2)], [Gaze(), Gaze()])
    assert [s.kept.tolist() for s in found] == [[7, 8], [7, 8]]
