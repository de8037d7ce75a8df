"""VisionZip: keep the tokens CLS attends to, and merge the others into a few evenly spaced ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruner import Pruner, Source, register
from vlprune.pruners.fastervlm import Attention, saliency
from vlprune.selection import Merge, Selection, top


@register("visionzip")
@dataclass(frozen=True)
class VisionZip(Pruner):
    """K = D dominant + M contextual tokens, chosen and merged before the projector.

    Dominant: the D largest ``a_i = mean_h A[h, CLS, i]``. Of the R others, in reading order, every
    ``max(1, floor(R / M))``-th is a target, the first M of these. Each other token joins the target whose key is the
    most similar, by the cosine of the keys' mean over heads, and

        contextual_j = x_j + mean of the tokens that joined j

    which is the authors' sum: about twice as long as an ordinary token.

    contextual: M / K, rounded half up; the default gives the paper's 54+10, 108+20 and 162+30.
    attention: "received" serves encoders without CLS with the attention a token receives, averaged over all query rows.

    Differs: the authors count CLS among the dominant tokens and send it through the projector (54 = CLS + 53 patches).
    CLS is none of the N tokens here, so the same K keeps one patch more. Tokens come out in reading order; the authors
    append the contextual ones.
    """

    contextual: float = 10 / 64
    attention: Attention = "cls"

    stage = "encoder"
    merges = True
    batched = True
    needs = property(lambda self: frozenset({f"{self.attention}_attention", "keys"}))
    source = Source(paper="arXiv:2412.04467", code="dvlab-research/VisionZip@3151f6d", licence="Apache-2.0")

    def __post_init__(self) -> None:
        if not 0 <= self.contextual < 1:
            raise SpecError(f"visionzip: contextual={self.contextual} is the share of merged tokens, in [0, 1)")

    def select(self, ctx: Context) -> Selection:
        scores = saliency(ctx, self.attention)
        n, keep, device = len(scores), ctx.keep, scores.device
        m = min(int(keep * self.contextual + 0.5), keep - 1)
        dominant = top(scores, keep - m)
        if m == 0:
            return Selection(dominant, scores=scores)

        others = top(torch.ones_like(scores).scatter(0, dominant, 0.0), n - keep + m)  # [R], ascending
        step = max(1, len(others) // m)
        targets = others[torch.arange(0, step * m, step, device=device)]  # [M]
        place = torch.arange(len(others), device=device)
        joining = others[top(((place % step != 0) | (place >= step * m)).float(), len(others) - m)]  # [R - M]

        metric = F.normalize(ctx.keys.float().mean(dim=0), dim=-1)  # [Hkv, N, d] -> [N, d]
        joined = (metric[joining] @ metric[targets].T).argmax(dim=1)  # [R - M], which target
        size = torch.zeros(m, device=device).scatter_add(0, joined, torch.ones(len(joined), device=device))

        kept = torch.cat([dominant, targets]).sort().values
        merge = Merge(
            source=torch.cat([kept, joining]),
            slot=torch.cat([torch.arange(keep, device=device), torch.searchsorted(kept, targets)[joined]]),
            weight=torch.cat([torch.ones(keep, device=device), 1 / size[joined]]),
        )
        return Selection(kept, merge, scores)
