"""AgilePruner: attention picks, and clears a neighbourhood that grows with the complexity of the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruner import Pruner, Source, register
from vlprune.pruners.fastervlm import Attention, saliency
from vlprune.selection import Selection


def effective_rank(x: Tensor) -> Tensor:
    """``exp(-sum q log q), q = s / sum s`` with s the singular values of X, not centred.

    [N, D] to a 0-dimensional float64 tensor between 1 and min(N, D), by the eigenvalues of the smaller Gram matrix.
    """
    x = x.double()
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    s = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    return torch.special.entr(s / s.sum().clamp(min=1e-300)).sum().exp()


@register("agilepruner")
@dataclass(frozen=True)
class AgilePruner(Pruner):
    """Tokens are visited by falling attention; each one kept removes all later ones nearer than its threshold.

        tau_i = min(tau_max, i (erank(X) / average) step)        removed:  1 - cos(x_i, x_j) < tau_i

    X are the projected tokens; i is the token's rank by attention, from 1, or with order="selected" one more than the
    tokens kept so far. A picture of more independent content has a larger effective rank and spreads its tokens wider.
    If fewer than K are left, removed tokens come back by attention.

    average: mean effective rank over pictures of the user's model; 90 is what is reported for LLaVA-1.5 (50 for text,
        110 for scenes).
    tau_max: not published; ours. attention: "received" is for encoders without CLS.

    From the project page and a reader's notes: there is no public code. What happens when candidates run out, which
    features X are and which layer's attention is meant are our reading. The visit is N small steps on the device.
    """

    average: float = 90.0
    tau_max: float = 0.3
    step: float = 0.01
    order: Literal["rank", "selected"] = "rank"
    attention: Attention = "cls"

    stage = "projector"
    batched = True
    needs = property(lambda self: frozenset({"features", f"{self.attention}_attention"}))
    source = Source(paper="arXiv:2603.01236", fidelity="idea")

    def __post_init__(self) -> None:
        if self.average <= 0 or min(self.tau_max, self.step) < 0:
            raise SpecError("agilepruner: average is above 0, tau_max and step are at least 0")

    def select(self, ctx: Context) -> Selection:
        scores = saliency(ctx, self.attention)
        ranked = scores.sort(descending=True, stable=True).indices
        unit = F.normalize(ctx.features.float(), dim=-1)[ranked]
        distance = 1 - unit @ unit.T  # [N, N] in order of attention
        slope = (effective_rank(ctx.features) / self.average * self.step).float()
        gone = self.removed(distance, slope)
        place = torch.arange(len(gone), device=gone.device)
        first = (place + gone * len(gone)).sort().indices[: ctx.keep]  # who stays, then who is gone, each by attention
        return Selection(ranked[first].sort().values, scores=scores)

    def removed(self, distance: Tensor, slope: Tensor) -> Tensor:
        """[N] bool, in order of attention."""
        n, device = len(distance), distance.device
        gone = torch.zeros(n, dtype=torch.bool, device=device)
        later = torch.ones(n, n, dtype=torch.bool, device=device).triu(1)
        number = torch.arange(1, n + 1, device=device)
        kept = torch.zeros((), dtype=torch.int64, device=device)
        for i in range(n):
            rank = number[i] if self.order == "rank" else kept + 1
            near = (distance[i] < (rank * slope).clamp(max=self.tau_max)) & later[i]
            stays = ~gone[i]
            kept = kept + stays
            gone = gone | (near & stays)
        return gone
