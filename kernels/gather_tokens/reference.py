"""The definition of gather_tokens in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """[B or 1, T(, D)], [B, P] -> [B, P(, D)]."""
    batch = torch.arange(index.shape[0], device=index.device)[:, None] if x.shape[0] > 1 else 0
    rows = x[batch, index.clamp(min=0)]
    pad = (index < 0).view(*index.shape, *[1] * (x.dim() - 2))
    return rows.masked_fill(pad, 0)
