"""HiPrune: objects stand out in the middle of the tower, the whole picture in its last layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.context import Context, Grid
from vlprune.errors import SpecError
from vlprune.pruner import Pruner, Source, register
from vlprune.selection import Selection, top


@register("hiprune")
@dataclass(frozen=True)
class HiPrune(Pruner):
    """Anchors from an object layer of the tower, their neighbours, and the best of a deep layer for the rest of K.

        a_i = mean_h mean_r A[h, r, i]    over all query rows r, CLS among them

    Anchors are the ``round(alpha K / 5)`` largest a of the object layer, half to even; with each come the tokens one
    place before and behind and one row above and below, in reading order: a row's end is followed by the next row's
    start, and the picture's ends are their own neighbours. a of the layer that the projector reads fills up to K.

    object_layer: counted from 1; the authors take 9 of LLaVA's 24 layers and 16 of Qwen2.5-VL's 32. 0 stands for 9 / 24
        of the depth.

    Differs: crops of one picture share K, of which the authors give every crop its part.
    """

    alpha: float = 0.1
    object_layer: int = 0

    stage = "encoder"
    batched = True
    needs = frozenset({"early_received_attention", "received_attention", "grids", "index"})
    source = Source(paper="arXiv:2508.00553", code="Danielement321/HiPrune@6e83a12", licence="MIT")

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.object_layer < 0:
            raise SpecError(
                f"hiprune: alpha={self.alpha} lies in [0, 1] and object_layer={self.object_layer} is at least 0"
            )

    def early_block(self, blocks: int) -> int:
        return (self.object_layer or max(1, 9 * blocks // 24)) - 1

    def select(self, ctx: Context) -> Selection:
        early, deep = (
            x.float().mean(dim=0).nan_to_num(nan=0.0) for x in (ctx.early_received_attention, ctx.received_attention)
        )
        anchors = top(early, round(self.alpha * ctx.keep / 5))
        index = torch.arange(len(deep), device=deep.device) if ctx.index is None else ctx.index
        near = around(index[anchors], ctx.grids)
        chosen = torch.zeros(sum(g.tokens for g in ctx.grids), device=deep.device).scatter(0, near, 1.0)[index]
        return Selection(top(deep + chosen * (deep.max() + 1), ctx.keep), scores=deep)


def around(cells: Tensor, grids: tuple[Grid, ...]) -> Tensor:
    """Cells, the ones before and behind and a row above and below each, as far as their picture goes: [n] -> [5 n]."""
    frames = [(g.height * g.width, g.width) for g in grids for _ in range(g.frames)]
    sizes = torch.tensor([size for size, _ in frames])
    start = sizes.cumsum(0) - sizes
    table = torch.stack([start, start + sizes - 1, torch.tensor([width for _, width in frames])])
    first, last, width = table.repeat_interleave(sizes, 1).to(cells.device, non_blocking=True)[:, cells]
    moved = torch.stack([cells, cells - 1, cells + 1, cells - width, cells + width])
    return torch.minimum(torch.maximum(moved, first), last).flatten()
