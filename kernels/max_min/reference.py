"""The definition of max_min in plain torch; one row of distances a pick, never the N x N matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlprune.kernels.dispatch import wide

ROWS = 512  # rows of the cosine matrix held at a time


def nearest_distance(unit: Tensor) -> Tensor:
    """[B, N, D] unit rows -> [B, N], 1 - cosine to the nearest other row."""
    n = unit.shape[1]
    index = torch.arange(n, device=unit.device)
    parts = []
    for start in range(0, n, ROWS):
        cosine = unit[:, start : start + ROWS] @ unit.transpose(1, 2)  # [B, r, N]
        own = index[start : start + ROWS, None] == index
        parts.append(1 - cosine.masked_fill(own, -torch.inf).amax(dim=-1))
    return torch.cat(parts, dim=1)


def max_min(features: Tensor, keep: int, weights: Tensor | None, first: str, order: bool) -> Tensor:
    """[B, N, D] -> [B, K]."""
    b, n, _ = features.shape
    unit = normalize(features.to(wide(features)), dim=-1)
    weight = torch.ones((), dtype=unit.dtype, device=unit.device) if weights is None else weights.to(unit.dtype)
    score = weight * nearest_distance(unit) if first == "official" else weight
    distance = unit.new_full((b, n), torch.inf)
    taken = torch.zeros(b, n, dtype=torch.bool, device=unit.device)
    picks = []
    for _ in range(keep):
        pick = score.masked_fill(taken, -torch.inf).argmax(dim=-1, keepdim=True)  # [B, 1]
        picks.append(pick)
        taken = taken.scatter(1, pick, True)
        chosen = unit.gather(1, pick[..., None].expand(-1, -1, unit.shape[-1]))  # [B, 1, D]
        distance = torch.minimum(distance, 1 - (unit @ chosen.transpose(1, 2)).squeeze(-1))
        score = weight * distance
    found = torch.cat(picks, dim=1)
    return found if order else found.sort(dim=1).values
