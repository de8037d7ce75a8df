"""VFlowOpt: keep what the vision tower's few global tokens attend to, and merge neighbours among the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.context import Context, Grid
from vlprune.errors import SpecError
from vlprune.pruner import Pruner, Source, register
from vlprune.selection import Merge, Selection, top


@dataclass(frozen=True)
class GlobalTokens:
    """The patches that receive more than `threshold` times the mean, each with weight 1/|G|; at least the first of all."""

    threshold: float

    def __call__(self, received: Tensor) -> tuple[Tensor, Tensor]:
        """[B, P] -> rows and weights, [B, R] each, R the most that there can be."""
        p = received.shape[-1]
        most = p if self.threshold <= 1 else max(1, int(p / self.threshold))  # what G receives is at most the whole
        sorted_ = received.sort(dim=-1, descending=True, stable=True)
        chosen = sorted_.values[..., :most] > self.threshold * received.mean(dim=-1, keepdim=True)
        chosen[..., 0] = True
        return sorted_.indices[..., :most], chosen / chosen.sum(dim=-1, keepdim=True)


@register("vflowopt")
@dataclass(frozen=True)
class VFlowOpt(Pruner):
    """A map of importance from the tower's global tokens G; among the least important, neighbours become one token.

    With A the attention of the vision layer the projector reads, mean over heads, of each crop by itself:

        rec_j = mean_i A_ij;    G = {j : rec_j > t mean(rec)};    map_j = mean_(g in G) A_gj;    map = 1 for separators

    Recycling: cells are m x m places of the whole view or, apart from it, of the crops with their separators. The tokens
    of lowest map in a cell become ``sum_j map_j x_j / sum_j map_j`` at the place of the highest of them. How many tokens
    take part follows from K, as each that joins others leaves one less. Where K is less than there are cells, the lowest
    cells go.

    Videos and pictures closed by one separator (several in a prompt of LLaVA-OneVision) keep the K highest instead. So
    do decoder stages, which rank what is left by the same map. The authors' settings for LLaVA-OneVision-7B, as shares of
    all tokens at the projector and before layers 9 and 18 of 28, with their mean ``(9 k_0 + 9 k_9 + 10 k_18) / 28``:

        mean    threshold    cell      keep       @9:keep    @18:keep
        50 %    28.683       11.757    .72332     .54159     .26375
        25 %    34.760       15.581    .26510     .26068     .22870
        10 %    39.265       17.387    .116615    .116615    .070097

    threshold: t, which all steps of a plan should share. cell: m, any number above 0.
    recycle: false keeps the K highest at every stage, which also lets pictures share a budget.

    Differs: K is kept exactly. The authors' share r of n tokens leaves ``n - round(n (1 - r)) - int(n / m^2)`` and one for
    each cell; with that count as K the tokens are theirs. A second term of their map, the entropy of a patch's pixels,
    has weight 0 in all their settings and is left out. Where G is empty, theirs is NaN and ours the token that receives
    most; a cell of zeros is averaged. In towers that group patches (Qwen) a token's map is its group's mean, and frames
    that stand apart in a prompt (Qwen3-VL) are pictures.
    """

    threshold: float = 34.76
    cell: float = 15.581
    recycle: bool = True

    stage = "projector"
    merges = property(lambda self: self.recycle)
    needs = frozenset({"encoder_rows", "grids", "index", "newline"})
    source = Source(paper="arXiv:2508.05211", code="sihany077/VFlowOpt@129eeef", licence="CC BY-NC 4.0")

    def __post_init__(self) -> None:
        if not self.cell > 0:
            raise SpecError(f"vflowopt: cell={self.cell}; the side of a cell is above 0")

    def importance(self, ctx: Context) -> Tensor:
        """The map, [N] float32."""
        scores = ctx.encoder_rows(GlobalTokens(self.threshold)).float().mean(dim=0).nan_to_num(nan=0.0)
        return scores if ctx.newline is None else scores.masked_fill(ctx.newline.to(scores.device), 1.0)

    def select(self, ctx: Context) -> Selection:
        return self.select_many([ctx])[0]

    def select_many(self, contexts: Sequence[Context]) -> list[Selection]:
        first, scores = contexts[0], torch.stack([self.importance(ctx) for ctx in contexts])  # [G, N]
        one_picture = all(g.frames == 1 for g in first.grids) and first.grids[-1].tokens > 1
        if not self.recycle or first.layer or not one_picture:
            return [Selection(k, scores=s) for k, s in zip(top(scores, first.keep), scores, strict=True)]
        table, count = cells(first.grids, self.cell)
        table = table.to(scores.device, non_blocking=True)
        cell = torch.stack([table if ctx.index is None else table[ctx.index.to(table.device)] for ctx in contexts])
        kept, *merge = recycled(scores, cell, count, first.keep)
        return [Selection(k, Merge(*m), s) for k, s, *m in zip(kept, scores, *merge, strict=True)]


def cells(grids: Sequence[Grid], side: float) -> tuple[Tensor, int]:
    """The cell of each place of the grids, [places], and the number of cells. No cell lies in two grids."""
    out, count = [], 0
    for grid in grids:
        row, column = ((torch.arange(n, dtype=torch.float64) / side).long() for n in grid[1:])
        down, across = (int((n - 1) / side) + 1 for n in grid[1:])
        out.append((count + row[:, None] * across + column).flatten())
        count += down * across
    return torch.cat(out), count


def recycled(scores: Tensor, cell: Tensor, cells: int, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kept tokens, [G, K], and source, slot and weight of a merge with an entry for each token, [G, N].

    Args:
        scores: [G, N], at least 0. cell: [G, N] int64 in 0..cells-1.
    """
    (g, n), device = scores.shape, scores.device
    order = scores.argsort(dim=1, descending=True, stable=True).flip(1)  # ascending; of equals the first token last
    cell, scores = cell.gather(1, order), scores.gather(1, order)
    place = torch.arange(n, device=device).expand(g, n)
    opened = place.new_full((g, cells), n).scatter_reduce(1, cell, place, "amin").gather(1, cell)
    joins = (place > opened).long()  # others of the cell come before: one token less
    low = joins.cumsum(1) - joins < n - keep
    ends = place.new_full((g, cells), -1).scatter_reduce(1, cell, torch.where(low, place, -1), "amax").gather(1, cell)
    ends = torch.where(low, ends, place)  # where each token ends up: at its cell's highest
    kept = order.gather(1, top(torch.where(ends == place, place, -1), keep)).sort(dim=1).values

    share = scores.clamp(min=torch.finfo(scores.dtype).tiny).masked_fill(~low, 0.0)  # a cell of zeros: equal shares
    whole = scores.new_zeros(g, cells).scatter_add(1, cell, share).gather(1, cell)
    at = order.gather(1, ends)
    slot = torch.searchsorted(kept, at).clamp(max=keep - 1)
    weight = torch.where(low, share / whole, 1.0).masked_fill(kept.gather(1, slot) != at, 0.0)
    return kept, order, slot, weight
