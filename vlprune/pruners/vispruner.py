"""VisPruner: half of the budget by CLS attention, the rest by dropping near-duplicates."""

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

DROPPED = 8  # tokens removed in one round


@register("vispruner")
@dataclass(frozen=True)
class VisPruner(Pruner):
    """``floor(r K)`` important tokens of largest ``a_i = mean_h A[h, CLS, i]``, and diverse ones among the others.

    The others form a list by descending a. While it is longer than what is left of the budget, its even places E are
    compared with its odd places O, ``s_e = max_o cos(x_e, x_o)``, and the 8 of E (or fewer) with the largest s are
    dropped. The next list is what remains of E by descending s, then O.

    important: r. The authors leave it to the caller; their examples use 0.5, and 0.75 for 64 tokens.
    attention: "received" serves encoders without CLS, which the authors' code does not.

    Which places are even hangs on the order of near-equal s, so rounding the features to half precision exchanges most
    of the diverse tokens (26 of 32 on a golden case).

    Differs: lists of odd length work here (E is then one longer than O); the authors' code stops with an error.
    """

    important: float = 0.5
    attention: Attention = "cls"

    stage = "encoder"
    batched = True
    needs = property(lambda self: frozenset({"features", f"{self.attention}_attention"}))
    source = Source(paper="arXiv:2412.01818", code="Theia-4869/VisPruner@aefa01a", licence="Apache-2.0")

    def __post_init__(self) -> None:
        if not 0 <= self.important <= 1:
            raise SpecError(f"vispruner: important={self.important} is a share of the budget, in [0, 1]")

    def select(self, ctx: Context) -> Selection:
        scores = saliency(ctx, self.attention)
        order = scores.argsort(descending=True, stable=True)
        important = int(ctx.keep * self.important)
        x = F.normalize(ctx.features.double(), dim=-1)
        diverse = _distinct(x @ x.T, order[important:], ctx.keep - important)
        return Selection(torch.cat([order[:important], diverse]).sort().values, scores=scores)


def _distinct(cosine: Tensor, left: Tensor, keep: int) -> Tensor:
    """`keep` of the tokens `left`, by cosine [N, N]; the counts are known, so nothing waits for the device."""
    if keep == 0:
        return left[:0]
    while len(left) > keep:
        even, odd = left[::2], left[1::2]
        nearest = cosine[even[:, None], odd].amax(dim=1)
        survivors = nearest.argsort(descending=True, stable=True)[min(DROPPED, len(left) - keep) :]
        left = torch.cat([even[survivors], odd])
    return left
