"""The definition of greedy_dpp in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlprune.kernels.dispatch import wide

EXHAUSTED = 1e-5  # share of its diagonal entry below which a token's remainder is rounding noise


def greedy_dpp(features: Tensor, keep: int, relevance: Tensor | None, order: bool) -> Tensor:
    """[B, N, D] and relevance [B, N], or a kernel [B, N, N] -> [B, K]."""
    x = features.detach().to(wide(features))
    if relevance is not None:
        unit = normalize(x, dim=-1) * relevance.detach().to(x.dtype)[..., None]
        x = unit @ unit.transpose(1, 2)
    b, n, _ = x.shape
    diagonal = x.diagonal(dim1=1, dim2=2)
    left = diagonal.clone()  # [B, N]
    taken = torch.zeros_like(left, dtype=torch.bool)
    factors = x.new_zeros(b, keep, n)  # the rows c_s
    picks = []
    for t in range(keep):
        gain = torch.where(left > EXHAUSTED * diagonal, left, 0.0).masked_fill(taken, -torch.inf)
        best, pick = gain.max(dim=-1, keepdim=True)  # [B, 1]
        spent = best <= 0
        pick = torch.where(spent, diagonal.masked_fill(taken, -torch.inf).argmax(dim=-1, keepdim=True), pick)
        picks.append(pick)
        taken = taken.scatter(1, pick, True)
        column = pick[..., None]  # [B, 1, 1]
        row = x.gather(1, column.expand(-1, -1, n))  # [B, 1, N]
        row = row - factors[:, :t].gather(2, column.expand(-1, t, -1)).transpose(1, 2) @ factors[:, :t]
        row = torch.where(spent, 0.0, row.squeeze(1) / torch.where(spent, 1.0, best).sqrt())
        factors[:, t] = row
        left = left - row * row
    found = torch.cat(picks, dim=1)
    return found if order else found.sort(dim=1).values
