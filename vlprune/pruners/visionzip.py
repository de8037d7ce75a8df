"""VisionZip: keep the tokens CLS attends to, and merge the others into a few evenly spaced ones."""

from __future__ import annotations

from collections.abc import Sequence
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
    needs = property(lambda self: frozenset({f"{self.attention}_attention", "keys"}))
    source = Source(paper="arXiv:2412.04467", code="dvlab-research/VisionZip@3151f6d", licence="Apache-2.0")

    def __post_init__(self) -> None:
        if not 0 <= self.contextual < 1:
            raise SpecError(f"visionzip: contextual={self.contextual} is the share of merged tokens, in [0, 1)")

    def select(self, ctx: Context) -> Selection:
        return self.select_many([ctx])[0]

    def select_many(self, contexts: Sequence[Context]) -> list[Selection]:
        scores = torch.stack([saliency(ctx, self.attention) for ctx in contexts])  # [G, N]
        (g, n), keep, device = scores.shape, contexts[0].keep, scores.device
        m = min(int(keep * self.contextual + 0.5), keep - 1)
        dominant = top(scores, keep - m)
        if m == 0:
            return [Selection(k, scores=s) for k, s in zip(dominant, scores, strict=True)]

        others = top(torch.ones_like(scores).scatter(1, dominant, 0.0), n - keep + m)  # [G, R], ascending
        step = max(1, others.shape[1] // m)
        targets = others[:, : step * m : step]  # [G, M]
        place = torch.arange(others.shape[1], device=device)
        joining = others[:, top(((place % step != 0) | (place >= step * m)).float(), others.shape[1] - m)]  # [G, R - M]

        keys = torch.stack([ctx.keys.float().mean(dim=0) for ctx in contexts])  # [Hkv, N, d] -> [G, N, d]
        metric = F.normalize(keys, dim=-1)
        rows = torch.arange(g, device=device)[:, None]
        joined = (metric[rows, joining] @ metric[rows, targets].mT).argmax(dim=2)  # [G, R - M], which target
        size = scores.new_zeros(g, m).scatter_add(1, joined, scores.new_ones(joined.shape))

        kept = torch.cat([dominant, targets], 1).sort().values  # [G, K]
        source = torch.cat([kept, joining], 1)
        own = torch.arange(keep, device=device).expand(g, -1)
        slot = torch.cat([own, torch.searchsorted(kept, targets.contiguous()).gather(1, joined)], 1)
        weight = torch.cat([scores.new_ones(g, keep), 1 / size.gather(1, joined)], 1)
        return [Selection(kept[i], Merge(source[i], slot[i], weight[i]), scores[i]) for i in range(g)]
