"""The definition of attention_rows in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.kernels.dispatch import wide


def probabilities(query: Tensor, key: Tensor, scale: float, mask: Tensor | None, limit: Tensor | None) -> Tensor:
    """[B, H, R, d], [B, Hkv, S, d] -> [B, H, R, S], rows with no visible key zero."""
    b, h, r, d = query.shape
    hkv, s = key.shape[1:3]
    dtype = wide(query, key)
    logits = query.to(dtype).reshape(b, hkv, h // hkv * r, d) @ key.to(dtype).transpose(2, 3)
    logits = logits.view(b, h, r, s) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    if limit is not None:
        last = limit.view(-1, 1, r, 1)  # [B or 1, 1, R, 1]
        logits = logits.masked_fill(torch.arange(s, device=key.device) > last, -torch.inf)
    hidden = logits.amax(dim=-1, keepdim=True) == -torch.inf
    return logits.softmax(dim=-1).masked_fill(hidden, 0.0)


def take_columns(x: Tensor, columns: tuple[int, int] | Tensor | None) -> Tensor:
    """[B, ..., S] -> [B, ..., C]."""
    if columns is None:
        return x
    if not isinstance(columns, Tensor):
        return x[..., columns[0] : columns[1]]
    index = columns.view(columns.shape[0] if columns.dim() == 2 else 1, *[1] * (x.dim() - 2), -1)
    index = index.expand(*x.shape[:-1], -1)
    return x.gather(-1, index.clamp(min=0)).masked_fill(index < 0, 0.0)


def reduce(x: Tensor, how: str, dim: int) -> Tensor:
    if how == "none":
        return x
    return x.amax(dim) if how == "max" else x.mean(dim) if how == "mean" else x.sum(dim)


def attention_rows(
    query: Tensor,
    key: Tensor,
    scale: float,
    mask: Tensor | None,
    limit: Tensor | None,
    heads: str,
    rows: str,
    columns: tuple[int, int] | Tensor | None,
) -> Tensor:
    x = take_columns(probabilities(query, key, scale, mask, limit), columns)  # [B, H, R, C]
    x = reduce(x, heads, 1)
    return reduce(x, rows, -2)
