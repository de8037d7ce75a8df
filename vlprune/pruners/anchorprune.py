"""AnchorPrune: a prefix of the relevance ranking, widened by what is important and new."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruner import Pruner, Source, register
from vlprune.pruners.fastervlm import Attention, saliency
from vlprune.selection import Selection


def anchored(
    relevance: Tensor, importance: Tensor, features: Tensor, keep: int, least: int, tau: float, patience: int, most: int
) -> Tensor:
    """K tokens: anchors by relevance, then ``argmax_i max(p_i, 0) min_{j in S} (1 - cos(x_i, x_j))`` one by one.

    The anchors are the `least` most relevant tokens and those that follow, up to and with the `patience`-th whose
    distance to all of the first `least` exceeds `tau`, but at most `most` in all.

    Args:
        relevance, importance: [N]. features: [N, D]. A distance above 1 counts as 1.
        least: 1 <= least <= keep. most: least <= most <= keep.
    Returns:
        [K] int64, strictly increasing. Ties go to the earlier token.
    """
    unit = F.normalize(features.float(), dim=-1)
    ranked = relevance.float().sort(descending=True, stable=True).indices
    novel = (1 - unit[ranked[least:most]] @ unit[ranked[:least]].T).amin(dim=1) > tau
    anchors = least + ((novel.cumsum(dim=0) < patience).sum() + 1).clamp(max=most - least)  # stays on the device

    weight = importance.float().clamp(min=0)
    taken = torch.zeros(len(unit), dtype=torch.bool, device=unit.device).scatter(0, ranked[:least], True)
    distance = (1 - unit @ unit[ranked[:least]].T).amin(dim=1).clamp(max=1)
    for i in range(least, keep):
        widest = (weight * distance).masked_fill(taken, -torch.inf).argmax(keepdim=True)
        pick = torch.where(anchors > i, ranked[i : i + 1], widest)
        taken = taken.scatter(0, pick, True)
        distance = torch.minimum(distance, 1 - (unit @ unit[pick].T).squeeze(1))
    return (~taken).to(torch.int8).sort(stable=True).indices[:keep]


@register("anchorprune")
@dataclass(frozen=True)
class AnchorPrune(Pruner):
    """`anchored` on the projected tokens x, with

        relevance_i = max_t cos(x_i, e_t) over the text embeddings e        p_i = mean_h A[h, CLS, i]

    least: share of K that are anchors in any case (the authors: 5, 10, 20 for 32, 64, 128). most: share that may be.
    attention: "received" is for encoders without CLS.

    This is the authors' Qwen form, with CLS attention where the encoder has one. Their LLaVA form measures relevance by
    the negated similarity of CLIP's two towers, the second of which these models do not ship.
    """

    least: float = 10 / 64
    most: float = 0.5
    tau: float = 0.2
    patience: int = 3
    attention: Attention = "cls"

    stage = "projector"
    batched = True
    needs = property(lambda self: frozenset({"features", "text_embeddings", f"{self.attention}_attention"}))
    source = Source(
        paper="arXiv:2607.07033", code="MULTI-cau/AnchorPrune@9aa2774", licence="Apache-2.0", fidelity="approximate"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most <= 1 or self.patience < 1:
            raise SpecError("anchorprune: 0 <= least <= most <= 1 are shares of K, and patience is at least 1")

    def select(self, ctx: Context) -> Selection:
        x, e = F.normalize(ctx.features.float(), dim=-1), F.normalize(ctx.text_embeddings.float(), dim=-1)
        relevance = (x @ e.T).amax(dim=1)
        least = max(1, int(self.least * ctx.keep))
        most = max(least, int(self.most * ctx.keep))
        importance = saliency(ctx, self.attention)
        return Selection(anchored(relevance, importance, x, ctx.keep, least, self.tau, self.patience, most))
