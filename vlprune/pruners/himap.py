"""HiMAP: keep the visual tokens that all text tokens together attend to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlprune.context import Context
from vlprune.pruner import Scorer, Source, register


@register("himap")
@dataclass(frozen=True)
class HiMAP(Scorer):
    """``s_i = sum_t mean_h A[h, t, i]`` over the text tokens t after the picture, A of the layer that has just run.

    This is the method's first cut. Its second one, at layer 8, ranks what is left by the attention that visual tokens
    pay each other; a Context does not hold these rows, so it is not offered.
    """

    stage = "2"
    batched = True
    needs = frozenset({"text_attention"})
    source = Source(paper="arXiv:2503.13108", code="ustc-hyin/HiMAP@6c279e7", fidelity="approximate")

    def score(self, ctx: Context) -> Tensor:
        return ctx.text_attention.float().mean(dim=1).sum(dim=0)  # [M, H, N] -> [N]
