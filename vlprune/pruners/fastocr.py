"""FastOCR: at every decode step a few layers look at the whole page, the others where those have looked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprune.context import Context, Grid
from vlprune.errors import PruningError, SpecError
from vlprune.pruner import DecodePruner, Source, register
from vlprune.selection import Selection, top

BORDER = 0.3  # share of the window's attention on its rim from which the gaze is leaving it


@dataclass(frozen=True, eq=False)
class Gaze:
    """What one item carries from step to step; never changed, only replaced."""

    cells: Tensor | None = None  # [K] grid cells of the last choice
    scanned: Tensor | None = None  # [K] those of the last choice made among all tokens
    looks: int = 0  # choices since then
    rankings: dict[int, Tensor] = field(default_factory=dict)  # focal layer -> its last ranking [N]


@register("fastocr")
@dataclass(frozen=True)
class FastOCR(DecodePruner):
    """Focal layers attend to everything and choose ``S = top K of a``; the layers after them read text and S alone.

        a_j = mean_h A[h, j], the attention the new token pays visual token j, softmax over the whole cache

    Layers before the first focal layer read the last choice of the step before (fixation reuse); the first choice is
    that of the last prompt token. Nothing leaves the cache, so a later step may return to any token, and memory stays
    what it was. K is the budget: the paper's 5 % is ``keep=0.05``, of which the average over all layers is
    (f + (L - f) 0.05) / L for f focal layers.

    focal_layers: numbers joined by "/", as `vlprune.calibrate.focal_layers` finds them for a model. Empty stands for
        L / 12 and L / 3, which is 2/9 of 28 layers: a guess, early, so that few layers read a stale choice.
    smoothing: lambda in [0, 1), ranks by a + lambda times the last ranking of the same layer.
    window: w > 0 chooses only among tokens within w rows and columns of the last choice, the first 2 w + 1 columns of
        the w rows below it (a line break), and the last choice made among all tokens; every `period`-th choice, and
        whenever 30 % of the window's attention lies on its rim, all tokens compete. Needs plain grids.
    least: pictures of fewer tokens are read whole; choosing costs more than it saves there.

    Everything but the two ideas, focal layers and reuse, is our reading of the abstract: there is no public code, and
    criterion, reduction over heads and defaults are unknown. K has no lower bound of its own.
    """

    focal_layers: str | int = ""
    smoothing: float = 0.0
    window: int = 0
    period: int = 16
    least: int = 1024

    needs = frozenset({"last_attention", "grids", "index"})
    source = Source(paper="arXiv:2605.17447", fidelity="idea")

    def __post_init__(self) -> None:
        object.__setattr__(self, "focal_layers", str(self.focal_layers))  # a plan's text reads "2" as a number
        if self.focal_layers and not all(part.isdecimal() for part in str(self.focal_layers).split("/")):
            raise SpecError(f"fastocr: focal_layers={self.focal_layers!r} are layer numbers joined by '/', such as 2/9")
        if not 0 <= self.smoothing < 1:
            raise SpecError(f"fastocr: smoothing={self.smoothing} lies in [0, 1)")
        if self.window < 0 or self.period < 1:
            raise SpecError(f"fastocr: window={self.window} is at least 0 and period={self.period} at least 1")

    def focal(self, layers: int) -> tuple[int, ...]:
        if not self.focal_layers:
            return tuple(sorted({min(max(1, layers // part), layers - 1) for part in (12, 3)}))
        chosen = sorted({int(part) for part in str(self.focal_layers).split("/")})
        if chosen[-1] >= layers:
            raise SpecError(f"fastocr: focal layer {chosen[-1]} of a model with layers 0 to {layers - 1}")
        return tuple(chosen)

    def worthwhile(self, tokens: int) -> bool:
        return tokens >= self.least

    def start(self, ctx: Context) -> Gaze:
        return Gaze()

    def step_many(self, contexts: Sequence[Context], states: Sequence[Gaze]) -> tuple[list[Selection], list[Gaze]]:
        if self.smoothing or self.window or type(self).step is not FastOCR.step:
            return super().step_many(contexts, states)
        rankings = torch.stack([ctx.last_attention for ctx in contexts]).float().mean(dim=1)  # [G, H, N] -> [G, N]
        kept = top(rankings, contexts[0].keep).unbind()
        return [Selection(k, scores=r) for k, r in zip(kept, rankings.unbind(), strict=True)], list(states)

    def step(self, ctx: Context, state: Gaze) -> tuple[Selection, Gaze]:
        ranking = ctx.last_attention.float().mean(dim=0)  # [H, N] -> [N]
        if self.smoothing and ctx.layer in state.rankings:
            ranking = ranking + self.smoothing * state.rankings[ctx.layer]
        scores, scan = ranking, True
        if self.window and state.cells is not None and state.looks + 1 < self.period:
            scores, scan = self.near(ctx, ranking, state), False
        kept = top(scores, ctx.keep)
        cells = kept if ctx.index is None else ctx.index[kept]
        state = replace(
            state,
            cells=cells,
            scanned=cells if scan else state.scanned,
            looks=0 if scan else state.looks + 1,
            rankings={**state.rankings, ctx.layer or 0: ranking} if self.smoothing else {},
        )
        return Selection(kept, scores=ranking), state

    def near(self, ctx: Context, ranking: Tensor, state: Gaze) -> Tensor:
        """The ranking with every token outside the window behind all inside it, unless the gaze is leaving it."""
        grid = ctx.grids[0]
        if len(ctx.grids) != 1 or (ctx.index is None and grid.tokens != len(ranking)):
            raise PruningError("fastocr: window needs one grid of tokens per picture; write window=0")
        window, rim = around(state.cells, grid, self.window)
        window = window.index_fill(0, state.scanned, True)
        if ctx.index is not None:
            window, rim = window[ctx.index], rim[ctx.index]
        leaving = (ranking * rim).sum() > BORDER * (ranking * window).sum()
        return ranking.where(window | leaving, ranking - 1 - ranking.max())


def around(cells: Tensor, grid: Grid, reach: int) -> tuple[Tensor, Tensor]:
    """Cells within `reach` of some, with the starts of the rows below, and that set's rim: two [frames H W] bool."""
    chosen = torch.zeros(grid.tokens, device=cells.device).index_fill(0, cells, 1.0)
    chosen = chosen.view(grid.frames, 1, grid.height, grid.width)
    window = F.max_pool2d(chosen, 2 * reach + 1, stride=1, padding=reach)
    read = F.pad(chosen.amax(dim=3, keepdim=True), (0, 0, reach, 0))[:, :, :-1]  # rows above this one, `reach` of them
    below = F.max_pool2d(read, (reach, 1), stride=1)
    window[..., : 2 * reach + 1] = torch.maximum(window[..., : 2 * reach + 1], below)
    inner = -F.max_pool2d(-F.pad(window, (1, 1, 1, 1), value=1.0), 3, stride=1)  # the page's edge is no rim
    return window.flatten().bool(), (window > inner).flatten()
