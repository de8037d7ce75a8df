"""ToMe: merge tokens into their most similar neighbours until K are left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vlprune.context import Context
from vlprune.pruner import Pruner, Source, register
from vlprune.selection import Merge, Selection


@register("tome")
@dataclass(frozen=True)
class ToMe(Pruner):
    """Rounds of bipartite matching; a token that is left is the mean of the r_i tokens merged into it.

    In a round every second token is offered to the others. Its partner is the one whose key, averaged over heads and
    over the tokens merged so far, has the largest cosine; the best pairs merge, as many as are to go, at most all that
    were offered. A merged token takes the place of the one that was not offered.

    class_token: whether a class token stands in front of the patches in the tower, which shifts who is offered: then
        the second, fourth, ... patch, else the first, third, ...

    Differs: the authors merge a few tokens in every layer of the tower; this is one place, for a given K. Later rounds
    take turns in reading order, theirs in the order the last round left. No attention is corrected by log size.
    """

    class_token: bool = True

    stage = "encoder"
    merges = True
    batched = True
    needs = frozenset({"keys"})
    source = Source(
        paper="arXiv:2210.09461", code="facebookresearch/ToMe@af95e4b", licence="CC BY-NC 4.0", fidelity="approximate"
    )

    def select(self, ctx: Context) -> Selection:
        keys = ctx.keys.float().mean(dim=0)  # [H, N, d] -> [N, d]
        n, device = len(keys), keys.device
        kept = torch.arange(n, device=device)
        home = kept  # [N], the token each one has become part of
        size = torch.ones(n, device=device)
        while len(kept) > ctx.keep:
            offered, others = kept[int(self.class_token) :: 2], kept[int(not self.class_token) :: 2]
            sums = torch.zeros_like(keys).scatter_add(0, home[:, None].expand_as(keys), keys)
            metric = F.normalize(sums, dim=-1)  # the mean has the same cosine
            value, partner = (metric[offered] @ metric[others].T).max(dim=1)
            order = value.sort(descending=True, stable=True).indices
            count = min(len(offered), len(kept) - ctx.keep)
            merged = order[:count]
            home = torch.arange(n, device=device).scatter(0, offered[merged], others[partner[merged]])[home]
            size = torch.zeros_like(size).scatter_add(0, home, torch.ones_like(size))
            kept = torch.cat([others, offered[order[count:]]]).sort().values
        return Selection(kept, Merge(torch.arange(n, device=device), torch.searchsorted(kept, home), 1 / size[home]))
