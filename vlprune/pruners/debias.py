"""Attention debiasing: takes the trend over positions and the letterbox padding out of another pruner's scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vlprune.context import Context, Grid
from vlprune.errors import PruningError, SpecError
from vlprune.pruner import Pruner, Scorer, Source, register
from vlprune.selection import Selection, top

ATTENTION = frozenset({"last_attention", "next_attention", "text_attention"})
SHIFT = 22  # bits after the point in 8-bit image resizing


def inside(size: tuple[int, int], grid: Grid, theta: float = 0.5) -> Tensor:
    """Cells that show the picture, when it was centred in a square and scaled to the grid: [height, width] bool.

    A cell is padding if more than `theta` of its area lies outside the picture; exactly `theta` is still picture.

    Args:
        size: width and height of the picture in any unit.
    """
    side = max(size)
    area = _covered(grid.height, size[1], side)[:, None] * _covered(grid.width, size[0], side)[None, :]
    return area >= (1 - theta) * (2 * side) ** 2


def inside_bilinear(size: tuple[int, int], grid: Grid) -> Tensor:
    """The same by resizing an 8-bit mask of the square, 1 in the picture, to the grid: bilinear, 0.5 rounded up."""
    width, height = size
    rows = _resized(grid.height, height, max(size))
    return rows[:, None] & _resized(grid.width, width, max(size))[None, :]


def inside_rows(size: tuple[int, int], grid: Grid) -> Tensor:
    """The same in whole rows or columns: ``int(cells * short / long)``, after half of the others, rounded down."""
    rows, columns = (_centred(cells, own, max(size)) for cells, own in ((grid.height, size[1]), (grid.width, size[0])))
    return rows[:, None] & columns[None, :]


def _covered(cells: int, own: int, side: int) -> Tensor:
    """[cells] int64, how much of each cell the picture's `own` of `side` covers; 2 side is all. Exact in integers."""
    edge = torch.arange(cells + 1) * 2 * side
    edge = edge.clamp(cells * (side - own), cells * (side + own))
    return edge[1:] - edge[:-1]


def _resized(cells: int, own: int, side: int) -> Tensor:
    """[cells] bool, one axis of the resized mask, in the fixed-point arithmetic of 8-bit image resizing."""
    scale = side / cells
    support = max(scale, 1.0)
    centre = (torch.arange(cells, dtype=torch.float64)[:, None] + 0.5) * scale
    pixel = torch.arange(side, dtype=torch.float64)[None, :]
    first, last = (centre - support + 0.5).trunc(), (centre + support + 0.5).trunc()
    weight = (1 - (pixel - centre + 0.5).abs() / support).clamp(min=0) * ((pixel >= first) & (pixel < last))
    weight = (weight / weight.sum(dim=1, keepdim=True) * 2**SHIFT + 0.5).floor()
    start = (side - own) // 2
    return weight[:, start : start + own].sum(dim=1) + 2 ** (SHIFT - 1) >= 2**SHIFT


def _centred(cells: int, own: int, side: int) -> Tensor:
    count = int(own * cells / side)
    first = (cells - count) // 2
    cell = torch.arange(cells)
    return (cell >= first) & (cell < cells - first)


MASKS: dict[str, Callable[[tuple[int, int], Grid, float], Tensor]] = {
    "area": inside,
    "bilinear": lambda size, grid, theta: inside_bilinear(size, grid),
    "rows": lambda size, grid, theta: inside_rows(size, grid),
}


@register("debias")
@dataclass(frozen=True)
class Debias(Scorer):
    """``s_i = a_i w(x_i) m_i`` before the top K, with a the score of a pruner that ranks by language-model attention.

        debias(fastv)@2:keep=0.333    debias(pyramiddrop)@8:keep=0.5:kappa=1.89:theta=0.01    debias(sparsevlm):keep=77

    trend: w takes out the growth of attention along the prompt, which the language model brings with it; x_i is the
    token's place among the N of its image, 0 to 1, and starts again with every image. "exponential" is
    ``exp(-kappa x)``; "cubic" is ``1 / (1 + c1 x + c2 x^2 + c3 x^3)``, its defaults the authors' FastV weights.
    kappa: 1.0 fits no model in particular. The authors' weights for LLaVA-1.5-7B are ``exp(-b i)`` with one b a
    benchmark; kappa = 575 b, on average 1.07 for HiMAP, 1.89 for PyramidDrop, 1.94 for SparseVLM.
    `vlprune.calibrate.fit_trend` measures it on a model of one's own.
    padding: m is 0 where no picture is seen. That is `Context.padding` where it is known; else it follows from the
    picture's size, to be told (`vlprune.image_sizes`) only where preprocessing pads to a centred square, as LLaVA-1.5's
    own does while that of its Hugging Face checkpoints crops. "area" goes by the share of a cell outside the picture,
    padding if more than theta (the authors: 0.5, with PyramidDrop 0.01); "bilinear" (theirs with SparseVLM) and "rows"
    (their FastV before debiasing) round in other ways. Where neither is known, as with several images sharing a budget,
    or with "off", nothing counts as padding.

    Row separators count in x and are never chosen while another token is left; nor is padding while a token of the
    picture is. The authors use this at a host's first stage only. Positions, caches and the budget are the host's.

    Differs: K is exact, where the authors' FastV lowers it to the number of tokens of the picture. Products are taken
    in float32; theirs in the model's dtype.
    """

    inner: Pruner
    trend: Literal["exponential", "cubic", "off"] = "exponential"
    kappa: float = 1.0
    c1: float = 1.73373862
    c2: float = -4.82643345
    c3: float = 4.88412565
    padding: Literal["area", "bilinear", "rows", "off"] = "area"
    theta: float = 0.5

    stage = property(lambda self: self.inner.stage)
    batched = property(lambda self: self.inner.batched)
    needs = property(lambda self: self.inner.needs | {"grids", "index", "newline", "padding", "image_size"})
    source = Source(paper="arXiv:2508.17807", code="intcomp/attention-bias@e75ebe7")

    def __post_init__(self) -> None:
        inner = self.inner
        if not isinstance(inner, Scorer) or not inner.needs & ATTENTION:
            raise SpecError(
                f"debias corrects scores made of language-model attention; {inner.name} has none. "
                "It wraps fastv, pyramiddrop, himap, sparsevlm, adaptinfer and the like"
            )
        if type(inner).select is not Scorer.select and not hasattr(inner, "choose"):
            raise SpecError(
                f"debias cannot hand its scores to {inner.name}, which selects in its own way; give it `choose`"
            )
        if not 0 <= self.theta < 1:
            raise SpecError(f"debias: theta={self.theta} is a share of a cell's area, in [0, 1)")
        x = torch.linspace(0, 1, 1001, dtype=torch.float64)
        if self.trend == "cubic" and bool((self.polynomial(x) <= 0).any()):
            raise SpecError("debias: 1 + c1 x + c2 x^2 + c3 x^3 must be positive for x in [0, 1]")

    def polynomial(self, x: Tensor) -> Tensor:
        return 1 + x * (self.c1 + x * (self.c2 + x * self.c3))

    def weights(self, x: Tensor) -> Tensor:
        """``w(x)``: places in [0, 1] -> [N], same dtype."""
        if self.trend == "off":
            return torch.ones_like(x)
        return torch.exp(-self.kappa * x) if self.trend == "exponential" else 1 / self.polynomial(x)

    def score(self, ctx: Context) -> Tensor:
        return self.corrected(ctx)[0]

    def select(self, ctx: Context) -> Selection:
        scores, padded = self.corrected(ctx)
        ranked = scores
        for mask in (padded, ctx.newline):
            if mask is not None:
                ranked = ranked.masked_fill(mask.to(scores.device), -torch.inf)
        choose = getattr(self.inner, "choose", None)
        chosen = Selection(top(ranked, ctx.keep)) if choose is None else choose(ctx, ranked)
        return replace(chosen, scores=scores)

    def corrected(self, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """The corrected scores, 0 on padding, and which tokens are padding if any is known."""
        scores = self.inner.score(ctx).float()  # type: ignore[attr-defined]
        scores = scores * self.weights(places(ctx, len(scores))).float().to(scores.device, non_blocking=True)
        padded = self.padded(ctx, scores)
        return (scores if padded is None else scores.masked_fill(padded, 0.0)), padded

    def padded(self, ctx: Context, scores: Tensor) -> Tensor | None:
        """[N] bool, tokens that show no picture, or None if none is known."""
        if self.padding == "off":
            return None
        if ctx.padding is not None:
            return ctx.padding.to(scores.device)
        if ctx.image_size is None or len(ctx.grids) != 1:
            return None
        grid = ctx.grids[0]
        if grid.height != grid.width or (ctx.index is None and grid.tokens != len(scores)):
            raise PruningError(
                f"debias was told the picture's size, but {len(scores)} tokens on a grid of {grid.height} x "
                f"{grid.width} are no picture padded to a square. Write padding=off"
            )
        outside = ~MASKS[self.padding](ctx.image_size, grid, self.theta).flatten().repeat(grid.frames)
        outside = outside.to(scores.device, non_blocking=True)
        return outside if ctx.index is None else outside[ctx.index]


def places(ctx: Context, n: int) -> Tensor:
    """``x_i``: the place of each of N tokens in its image, from 0 to 1; [N], on the CPU unless `index` is set.

    Once earlier stages have removed tokens it is still the place among those that were there at first.
    """
    if ctx.index is not None:
        if len(ctx.grids) > 1:
            raise PruningError("debias: earlier stages removed tokens of several images; use it at the first stage")
        cells = ctx.grids[0].tokens if ctx.grids else n
        return ctx.index.float() / max(cells - 1, 1)  # float32: some devices have no float64
    lengths = [g.tokens for g in ctx.grids]
    if sum(lengths) != n:  # row separators among the tokens, or no grid told
        if len(lengths) > 1:
            raise PruningError("debias: where each of several images begins is unknown; use scope=image")
        lengths = [n]
    parts = [torch.arange(length, dtype=torch.float64) / max(length - 1, 1) for length in lengths]
    return torch.cat(parts)
