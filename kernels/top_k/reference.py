"""The definition of top_k in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores: Tensor, keep: int) -> Tensor:
    """[B, N] -> [B, K]."""
    scores = scores.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return scores.sort(descending=True, stable=True).indices[:, :keep].sort().values
