"""The definition of greedy_dpp in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlprune.kernels.dispatch import wide

EXHAUSTED = 1e-5  # share of its diagonal entry below which a token's remainder is rounding noise


def greedy_dpp(features: Tensor, keep: int, relevance: Tensor | None) -> Tensor:
    """[B, N, D] and relevance [B, N], or a kernel [B, N, N] -> [B, K] in pick order."""
    x = features.to(wide(features))
    if relevance is not None:
        unit = normalize(x, dim=-1) * relevance.to(x.dtype)[..., None]
        x = unit @ unit.transpose(1, 2)
    diagonal = x.diagonal(dim1=1, dim2=2)
    left = diagonal.clone()  # [B, N]
    taken = torch.zeros_like(left, dtype=torch.bool)
    factors: list[Tensor] = []  # the rows c_s, [B, N] each
    picks = []
    for _ in range(keep):
        gain = torch.where(left > EXHAUSTED * diagonal, left, 0.0).masked_fill(taken, -torch.inf)
        best, pick = gain.max(dim=-1, keepdim=True)  # [B, 1]
        spent = best <= 0
        pick = torch.where(spent, diagonal.masked_fill(taken, -torch.inf).argmax(dim=-1, keepdim=True), pick)
        picks.append(pick)
        taken = taken.scatter(1, pick, True)
        row = x.gather(1, pick[..., None].expand(-1, -1, x.shape[2])).squeeze(1)
        for factor in factors:
            row = row - factor.gather(1, pick) * factor
        row = torch.where(spent, 0.0, row / torch.where(spent, 1.0, best).sqrt())
        factors.append(row)
        left = left - row * row
    return torch.cat(picks, dim=1)
