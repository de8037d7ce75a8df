"""DivPrune: keep the tokens that lie farthest apart."""

from __future__ import annotations

from dataclasses import dataclass

from vlprune.context import Context
from vlprune.ops import max_min
from vlprune.pruner import Pruner, Source, register
from vlprune.selection import Selection


@register("divprune")
@dataclass(frozen=True)
class DivPrune(Pruner):
    """Greedy max-min diversity of the projected tokens x, with ``D_ij = 1 - cos(x_i, x_j)``.

        s_1 = argmax_i min_{j != i} D_ij;    s_{t+1} = argmax_{i not in S_t} min_{j in S_t} D_ij

    Differs: a token that was picked cannot be picked again. The authors' code leaves it in the race at distance 0, so
    it returns duplicates once fewer than K distinct vectors are there.
    """

    stage = "projector"
    batched = True
    needs = frozenset({"features"})
    source = Source(paper="arXiv:2503.02175", code="vbdi/divprune@799e2d9", licence="CC BY-NC 4.0")

    def select(self, ctx: Context) -> Selection:
        return Selection(max_min(ctx.features, ctx.keep))
