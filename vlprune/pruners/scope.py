"""SCOPE: greedily cover the picture, weighted by CLS attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vlprune.context import Context
from vlprune.pruner import Pruner, Source, register
from vlprune.pruners.fastervlm import Attention, saliency
from vlprune.selection import Selection


@register("scope")
@dataclass(frozen=True)
class Scope(Pruner):
    """Facility location over the vision encoder's tokens x, with a_i the attention of CLS to token i.

        m_j = max(0, max_{s in S} cos(x_j, x_s));    gain_i = a_i^alpha sum_j max(0, cos(x_i, x_j) - m_j)

    K times the token of largest gain joins S. Ties go to the earlier token.

    alpha: weight of attention against coverage; 1 is the authors' setting.
    attention: "received" serves encoders without CLS, which the authors' code does not.
    """

    alpha: float = 1.0
    attention: Attention = "cls"

    stage = "encoder"
    batched = True
    needs = property(lambda self: frozenset({"features", f"{self.attention}_attention"}))
    source = Source(paper="arXiv:2510.24214", code="kinredon/SCOPE@6bf7306")

    def select(self, ctx: Context) -> Selection:
        scores = saliency(ctx, self.attention)
        x = F.normalize(ctx.features.float(), dim=-1)
        cosine = x @ x.T  # [N, N]
        weight = scores**self.alpha
        covered = torch.zeros_like(weight)
        free = torch.zeros_like(weight)  # -inf once picked
        picks = []
        for _ in range(ctx.keep):
            gain = weight * (cosine - covered).relu_().sum(dim=1)
            pick = (gain + free).argmax(dim=0, keepdim=True)
            free = free.scatter(0, pick, -torch.inf)
            covered = torch.maximum(covered, cosine.index_select(0, pick)[0])
            picks.append(pick)
        return Selection(torch.cat(picks).sort().values, scores=scores)
