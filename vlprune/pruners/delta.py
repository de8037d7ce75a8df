"""DELTA: a few layers look at everything and pick pages of tokens, the layers behind them read these pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruner import DecodePruner, Source, register
from vlprune.selection import Selection

TIE = 1e-7  # per page number: the earlier of two equal pages wins


@register("delta")
@dataclass(frozen=True)
class Delta(DecodePruner):
    """Pages of `page` consecutive tokens, ranked at every decode step in the Delta layers, which attend densely.

        u_j = max_h A[h, j]        P_b = sum of u over page b - 1e-7 b

    The best pages go into the choice while they fit into K; of the page that does not fit come its tokens of largest u.
    Layers before the first Delta layer are dense, those behind one read text and its choice: groups of layers share it.

    delta_layers: numbers joined by "/". Empty stands for the authors' 2/14/22 of 28 layers, in proportion.
    recent: last pages that are always chosen. The authors' 8 keep the newest text; here all text is always read.

    Differs: the authors page the whole cache, 16 tokens a page and K = 1024; ours pages a picture's tokens in reading
    order, and text needs no page.
    """

    delta_layers: str | int = ""
    page: int = 16
    recent: int = 0

    source = Source(paper="arXiv:2510.09883", code="hoenza/DELTA@c354073", licence="Apache-2.0", fidelity="approximate")

    def __post_init__(self) -> None:
        object.__setattr__(self, "delta_layers", str(self.delta_layers))  # a plan's text reads "2" as a number
        if self.delta_layers and not all(part.isdecimal() for part in str(self.delta_layers).split("/")):
            raise SpecError(
                f"delta: delta_layers={self.delta_layers!r} are layer numbers joined by '/', such as 2/14/22"
            )
        if self.page < 1 or self.recent < 0:
            raise SpecError(f"delta: page={self.page} is at least 1 and recent={self.recent} at least 0")

    def focal(self, layers: int) -> tuple[int, ...]:
        if not self.delta_layers:
            return tuple(sorted({part * layers // 28 for part in (2, 14, 22)}))
        chosen = sorted({int(part) for part in str(self.delta_layers).split("/")})
        if chosen[-1] >= layers:
            raise SpecError(f"delta: layer {chosen[-1]} of a model with layers 0 to {layers - 1}")
        return tuple(chosen)

    def dense(self, layers: int) -> tuple[int, ...]:
        return tuple(range(self.focal(layers)[0]))

    def step(self, ctx: Context, state: Any) -> tuple[Selection, Any]:
        attention = ctx.last_attention.float().amax(dim=0)  # [H, N] -> [N]
        first = attention.sort(descending=True, stable=True).indices  # in a page the largest come first
        rank = self.pages(attention).sort(descending=True, stable=True).indices.argsort()
        order = rank[first // self.page].sort(stable=True).indices
        return Selection(first[order[: ctx.keep]].sort().values, scores=attention), state

    def pages(self, attention: Tensor) -> Tensor:
        """Scores of the pages: [N] -> [ceil(N / page)]."""
        n = len(attention)
        count = -(-n // self.page)
        sums = F.pad(attention, (0, count * self.page - n)).view(count, self.page).sum(dim=1)
        scores = sums - TIE * torch.arange(count, device=sums.device)
        scores[max(0, count - self.recent) :] = torch.inf
        return scores
