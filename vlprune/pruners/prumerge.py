"""PruMerge: keep the tokens that stand out to CLS, add to each its nearest neighbours, and let one stand for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruner import Pruner, Source, register
from vlprune.selection import Merge, Selection, top


def outliers(a: Tensor) -> int:
    """How many entries of [N] lie above the third quartile by more than 1.5 interquartile ranges. The host waits."""
    low, high = a.quantile(0.25), a.quantile(0.75)
    return int((a > high + 1.5 * (high - low)).sum())


def spacing(n: int, standing_out: int) -> int:
    """Distance of the tokens that PruMerge+ samples: a third of N over the number of outliers, in whole numbers."""
    return max(1, n // max(1, standing_out) // 3)


@register("prumerge")
@dataclass(frozen=True)
class PruMerge(Pruner):
    """K - 1 tokens by ``a = softmax(q_CLS . k / sqrt C)`` over the tower's last layer, its heads joined into one.

        x_i' = x_i + sum of a_j x_j over the `neighbours` tokens j whose keys are the most similar to i's, by cosine
        rest = sum of a_j x_j over all tokens that go, in the place of the one of them with the largest a

    Neither sum is divided by its weights, and neighbours may be kept tokens. x are the features the projector reads.

    plus: PruMerge+, every s-th token in reading order is among the K - 1 and a decides about the others only. s is the
        authors' for a quarter of K outliers, see `spacing`, or more if these samples alone exceeded the budget.
    count: "budget" keeps K tokens. "outliers" is the authors' adaptive count: as many as stand out of a by the
        interquartile rule, with their samples, and at most K.

    Differs: tokens come out in reading order, where the authors' are in order of attention with the rest behind.
    """

    plus: bool = False
    count: Literal["budget", "outliers"] = "budget"
    neighbours: int = 32

    stage = "encoder"
    merges = True
    adaptive = property(lambda self: self.count == "outliers")
    batched = property(lambda self: self.count == "budget")
    needs = frozenset({"features", "final_cls_attention", "final_keys"})
    source = Source(paper="arXiv:2403.15388", code="42Shawn/LLaVA-PruMerge@097c041", licence="Apache-2.0")

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise SpecError(f"prumerge: neighbours={self.neighbours} must be at least 1")

    def select(self, ctx: Context) -> Selection:
        a = ctx.final_cls_attention.float()[0].nan_to_num(nan=0.0)
        n, device = len(a), a.device
        ranking, own = self.rank(a, ctx.keep - 1)
        stays = top(ranking, own)
        goes = top(torch.ones(n, device=device).scatter(0, stays, 0.0), n - own)
        best = goes[top(a[goes], 1)]
        kept = torch.cat([stays, best]).sort().values

        unit = F.normalize(ctx.final_keys.float().transpose(0, 1).flatten(1), dim=1)  # [H, N, d] -> [N, C]
        similar = (unit[stays] @ unit.T).scatter(1, stays[:, None], -torch.inf)
        near = similar.sort(dim=1, descending=True, stable=True).indices[:, : min(self.neighbours, n - 1)]
        slot = torch.searchsorted(kept, stays)
        merge = Merge(
            source=torch.cat([stays, near.flatten(), goes]),
            slot=torch.cat(
                [slot, slot.repeat_interleave(near.shape[1]), torch.searchsorted(kept, best).expand(n - own)]
            ),
            weight=torch.cat([torch.ones(own, device=device), a[near.flatten()], a[goes]]),
        )
        return Selection(kept, merge, a)

    def rank(self, a: Tensor, most: int) -> tuple[Tensor, int]:
        """Scores by which tokens stay, [N], and how many of them, at most `most`."""
        n = len(a)
        found = outliers(a) if self.count == "outliers" else None
        own = most if found is None else min(found, most)
        if not self.plus or most == 0:
            return a, own
        step = spacing(n, (most + 1) // 4 if found is None else found)
        while len(range(0, n - 1, step)) > most:
            step += 1
        sampled = torch.zeros_like(a)
        sampled[: n - 1 : step] = 1.0
        if found is not None:
            own = min(most, int(sampled.scatter(0, top(a, found), 1.0).sum()) if found else int(sampled.sum()))
        return a + sampled * (a.max() + 1), own
