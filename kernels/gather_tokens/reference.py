"""The definition of gather_tokens in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.kernels.dispatch import wide


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """[B or 1, T(, D)], [B, P] -> [B, P(, D)]."""
    batch = torch.arange(index.shape[0], device=index.device)[:, None] if x.shape[0] > 1 else 0
    rows = x[batch, index.clamp(min=0)]
    pad = (index < 0).view(*index.shape, *[1] * (x.dim() - 2))
    return rows.masked_fill(pad, 0)


def merge_tokens(x: Tensor, index: Tensor, source: Tensor, slot: Tensor, weight: Tensor) -> Tensor:
    """gather_tokens, except that the rows `slot` names hold weighted sums of the rows `source`."""
    copies = gather_tokens(x, index).flatten(0, 1)  # [B * P(, D)]
    sequence = slot // index.shape[1] if x.shape[0] > 1 else 0
    shares = x[sequence, source].to(wide(x)) * weight.to(wide(x)).view(-1, *[1] * (x.dim() - 2))
    sums = torch.zeros_like(copies, dtype=shares.dtype).index_add(0, slot, shares)
    merged = torch.zeros(len(copies), dtype=torch.bool, device=x.device).index_fill(0, slot, True)
    out = torch.where(merged.view(-1, *[1] * (x.dim() - 2)), sums.to(x.dtype), copies)
    return out.view(*index.shape, *x.shape[2:])
