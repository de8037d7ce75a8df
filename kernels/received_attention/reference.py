"""The definition of received_attention in plain torch: a block of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.kernels.attention_rows.reference import probabilities, reduce
from vlprune.kernels.dispatch import wide

ROWS = 128  # query rows held at a time


def received_attention(query: Tensor, key: Tensor, scale: float, mask: Tensor | None, heads: str) -> Tensor:
    b, h, n, _ = query.shape
    total = torch.zeros(b, h, n, dtype=wide(query, key), device=query.device)
    for start in range(0, n, ROWS):
        some = slice(start, start + ROWS)
        part = probabilities(query[:, :, some], key, scale, None if mask is None else mask[:, :, some], None)
        total = total + part.sum(dim=2)  # [B, H, r, L] -> [B, H, L]
    return reduce(total / n, heads, 1)
