"""FasterVLM: keep the tokens that the vision encoder's CLS token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlprune.context import Context
from vlprune.pruner import Scorer, Source, register

Attention = Literal["cls", "received"]


def saliency(ctx: Context, attention: Attention) -> Tensor:
    """``a_i = mean_h A[h, CLS, i]``, [N] float32; "received" takes the column means of encoders without CLS.

    Tokens the encoder never saw, row separators that a packing marks by NaN, get 0.
    """
    rows = ctx.cls_attention if attention == "cls" else ctx.received_attention
    return rows.float().mean(dim=0).nan_to_num(nan=0.0)  # [H, N] -> [N]


@register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(Scorer):
    """``a_i = mean_h A[h, CLS, i]`` with A the attention of the vision layer whose output the projector reads.

    attention="received" serves encoders without a CLS token, which the authors' code does not: a_i is then the
    attention token i receives, averaged over all query rows.
    """

    attention: Attention = "cls"

    stage = "encoder"
    batched = True
    needs = property(lambda self: frozenset({f"{self.attention}_attention"}))
    source = Source(paper="arXiv:2412.01818", code="Theia-4869/FasterVLM@f5d5f12", licence="Apache-2.0")

    def score(self, ctx: Context) -> Tensor:
        return saliency(ctx, self.attention)
