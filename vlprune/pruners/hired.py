"""HiRED: the whole picture says how much each of its crops is worth, and CLS picks inside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlprune.context import Context, Grid
from vlprune.errors import SpecError
from vlprune.pruner import Pruner, Source, register
from vlprune.pruners.fastervlm import saliency
from vlprune.selection import Selection, top


@register("hired")
@dataclass(frozen=True)
class HiRED(Pruner):
    """For pictures of a whole view and crops, as LLaVA-NeXT packs them.

    The whole view of n tokens keeps ``min(int(alpha K), n)``. Of its ``int(n (1 - alpha))`` tokens that CLS attends to most
    in the tower's first layer, v_c lie in what crop c shows; that crop keeps ``int((K - whole) v_c / sum v)``. In each of
    them stay the tokens that CLS attends to most in the layer the projector reads. What rounding leaves of K, or a crop
    has no tokens for, goes to the best of all others. A picture without crops keeps its K best.

    parts: "shown" counts votes where the crop really lies. "bands" is the authors' code, which cuts the whole view in
        reading order into as many runs as there are crops: stripes, whatever the crops' arrangement.
    """

    alpha: float = 0.5
    parts: Literal["shown", "bands"] = "shown"

    stage = "encoder"
    batched = True
    needs = frozenset({"early_cls_attention", "cls_attention", "grids", "index"})
    source = Source(paper="arXiv:2408.10945", code="hasanar1f/HiRED@502d6dd", licence="MIT", fidelity="approximate")

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise SpecError(f"hired: alpha={self.alpha} lies in [0, 1]")

    def select(self, ctx: Context) -> Selection:
        scores = saliency(ctx, "cls")
        if len(ctx.grids) == 1:
            return Selection(top(scores, ctx.keep), scores=scores)
        n, device = len(scores), scores.device
        whole = ctx.grids[0]
        part, shown, crops = layout(ctx.grids)
        if self.parts == "bands":
            shown = torch.arange(whole.tokens) * crops // whole.tokens + 1
        table = torch.cat([part, shown]).to(device, non_blocking=True)
        index = torch.arange(n, device=device) if ctx.index is None else ctx.index
        of, votes_for = table[: len(part)][index], table[len(part) :]

        early = ctx.early_cls_attention.float().mean(dim=0).nan_to_num(nan=0.0)
        early = early.masked_fill(of != 0, -1.0)
        voters = top(early, min(int(whole.tokens * (1 - self.alpha)), n))
        vote = votes_for[index[voters].clamp(max=whole.tokens - 1)] * (of[voters] == 0)
        votes = torch.zeros(crops + 2, dtype=torch.int64, device=device).scatter_add(0, vote, torch.ones_like(vote))
        first = min(int(ctx.keep * self.alpha), whole.tokens)
        counts = (ctx.keep - first) * votes // votes[1:].sum().clamp(min=1)
        counts[0] = first

        order = scores.sort(descending=True, stable=True).indices
        order = order[of[order].sort(stable=True).indices]  # part by part, the best first
        sizes = torch.zeros_like(votes).scatter_add(0, of, torch.ones_like(of))
        place = torch.arange(n, device=device) - (sizes.cumsum(0) - sizes)[of[order]]
        chosen = torch.zeros_like(scores).scatter(0, order, (place < counts[of[order]]).float())
        return Selection(top(scores + chosen * (scores.max() + 1), ctx.keep), scores=scores)


def layout(grids: tuple[Grid, ...]) -> tuple[Tensor, Tensor, int]:
    """Which part each cell belongs to, which crop shows a cell of the whole view, and how many crops there are.

    Parts are 0 for the whole view, and from 1 on the crops in reading order. Crops have the whole view's size; the grid
    behind it is all of them without the padding, which was the same on opposite sides, and a separator ends each row: these
    are the last part. Further grids count as one crop each.
    """
    whole, packed, *rest = grids
    rows, columns = -(-packed.height // whole.height), -(-(packed.width - 1) // whole.width)
    rows, columns = max(rows, 1), max(columns, 1)

    def crop(row: Tensor, column: Tensor) -> Tensor:
        above = (rows * whole.height - packed.height) // 2
        before = (columns * whole.width - (packed.width - 1)) // 2
        down = ((row + above) // whole.height).clamp(max=rows - 1)
        return down * columns + ((column + before) // whole.width).clamp(max=columns - 1) + 1

    row, column = (
        x.flatten() for x in torch.meshgrid(torch.arange(packed.height), torch.arange(packed.width), indexing="ij")
    )
    y, x = (x.flatten() for x in torch.meshgrid(torch.arange(whole.height), torch.arange(whole.width), indexing="ij"))
    middle = (
        (2 * y + 1) * packed.height // (2 * whole.height),
        (2 * x + 1) * max(packed.width - 1, 1) // (2 * whole.width),
    )
    crops = rows * columns + len(rest)
    tiles = crop(row, column).masked_fill(column == packed.width - 1, crops + 1)
    parts = [torch.zeros(whole.tokens, dtype=torch.int64), tiles.repeat(packed.frames)]
    parts += [torch.full((grid.tokens,), rows * columns + 1 + i) for i, grid in enumerate(rest)]
    return torch.cat(parts), crop(*middle), crops
