"""The definition of token_entropy in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WIDTH = 128
FLOOR = 1e-10  # smallest eigenvalue


def token_entropy(queries: Tensor, normalize: str, dtype: torch.dtype) -> Tensor:
    """[B, H, N, d] -> [B, N]."""
    b, h, n, d = queries.shape
    x = queries.to(dtype).transpose(1, 2)  # [B, N, H, d]
    if d > WIDTH and d % WIDTH == 0:
        x = x.reshape(b, n, h, WIDTH, d // WIDTH).mean(dim=-1)
    x = x - x.mean(dim=2, keepdim=True)
    gram = x @ x.transpose(2, 3) / h  # [B, N, H, H]
    values = torch.linalg.eigvalsh(gram)
    if normalize == "trace":
        values = values / gram.diagonal(dim1=2, dim2=3).sum(dim=-1, keepdim=True).clamp(min=FLOOR)
    values = values.clamp(min=FLOOR)
    return -(values * values.log()).sum(dim=-1) / math.log(h)
