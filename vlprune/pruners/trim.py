"""TRIM: rank visual tokens against the whole text, and let one more stand for all that goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlprune.context import Context
from vlprune.pruner import Pruner, Source, register
from vlprune.selection import Merge, Selection, top


@register("trim")
@dataclass(frozen=True)
class Trim(Pruner):
    """``s_i = -x_i . t``; the K - 1 highest stay, and one token holds the mean of all others.

    x are the projected tokens, t the mean of the text embeddings after the picture, neither of them normalised. The
    sign is the authors': the tokens least similar to the text stay. The mean takes the place of the best that goes.

    Differs: the authors take both from CLIP, whose text tower these models do not ship, x behind its last layer norm
    and projection. They append the mean at the end, and count by an outlier rule where ours is the budget.
    """

    stage = "projector"
    merges = True
    batched = True
    needs = frozenset({"features", "text_embeddings"})
    source = Source(
        paper="arXiv:2409.10994",
        code="FreedomIntelligence/TRIM@f5a232d",
        licence="Apache-2.0",
        fidelity="approximate",
    )

    def select(self, ctx: Context) -> Selection:
        scores = -(ctx.features.float() @ ctx.text_embeddings.float().mean(dim=0))
        n, keep, device = len(scores), ctx.keep, scores.device
        kept, stays = top(scores, keep), top(scores, keep - 1)
        goes = top(torch.ones(n, device=device).scatter(0, stays, 0.0), n - keep + 1)
        is_mean = torch.ones(keep, device=device).scatter(0, torch.searchsorted(kept, stays), 0.0)
        merge = Merge(
            source=torch.cat([stays, goes]),
            slot=torch.cat([torch.searchsorted(kept, stays), is_mean.argmax().expand(len(goes))]),
            weight=torch.cat(
                [torch.ones(keep - 1, device=device), torch.full((len(goes),), 1 / len(goes), device=device)]
            ),
        )
        return Selection(kept, merge, scores)
