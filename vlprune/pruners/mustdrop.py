"""MustDrop: a token goes when all of the text together, and every text token alone, hardly looks at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruner import Pruner, Source, register
from vlprune.selection import Selection, top


@register("mustdrop")
@dataclass(frozen=True)
class MustDrop(Pruner):
    """The dual attention filter, with A the layer that has just run and t the text tokens after the picture.

        b_ti = mean_h A[h, t, i]
        s_i = max(sum_t b_ti / (`overall` sum_i sum_t b_ti), max_t b_ti / `single`)

    The authors drop a token whose s is below 1, less than both of their thresholds. count="budget" keeps the K largest s
    instead; count="thresholds" is theirs, at most K and at least one token. Their schedule is steps at 3, 7, 11 and 15, as
    they run layers 2, 6, 10 and 14 on all tokens and cut behind them.

    overall, single: their 0.001 and 0.001 for 192 tokens of LLaVA-1.5 (128: 0.0012 and 0.001, 64: 0.011 and 0.01).

    Differs: the filter alone. Neither are windows of alike patches merged in the tower, nor are the 8 % of tokens that CLS
    attends to most kept in any case, and what is left keeps its positions.
    """

    overall: float = 0.001
    single: float = 0.001
    count: Literal["budget", "thresholds"] = "budget"

    stage = "3"
    adaptive = property(lambda self: self.count == "thresholds")
    batched = property(lambda self: self.count == "budget")
    needs = frozenset({"text_attention"})
    source = Source(paper="arXiv:2411.10803", code="liuting20/MustDrop@909afa5", fidelity="approximate")

    def __post_init__(self) -> None:
        if min(self.overall, self.single) <= 0:
            raise SpecError(f"mustdrop: overall={self.overall} and single={self.single} are above 0")

    def score(self, ctx: Context) -> Tensor:
        """[N], of which 1 and more stay by the authors' thresholds."""
        rows = ctx.text_attention.float().mean(dim=1)  # [M, H, N] -> [M, N]
        if len(rows) == 0:
            return rows.new_zeros(rows.shape[1])
        total = rows.sum(dim=0)
        return (total / (self.overall * total.sum()).clamp(min=1e-30)).maximum(rows.amax(dim=0) / self.single)

    def select(self, ctx: Context) -> Selection:
        scores = self.score(ctx)
        keep = ctx.keep
        if self.count == "thresholds":  # the host waits for the count
            keep = min(keep, max(1, int((scores >= 1).sum())))
        return Selection(top(scores, keep), scores=scores)
