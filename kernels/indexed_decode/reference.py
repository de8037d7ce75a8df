"""The definition of indexed_decode in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.kernels.dispatch import wide


def span_rows(span: tuple[int, int] | Tensor, batch: int, rows: int, device: torch.device) -> Tensor:
    """[B, m] row numbers, -1 where a sequence's own span is shorter."""
    if not isinstance(span, Tensor):
        return torch.arange(span[0], span[1], device=device).expand(batch, -1)
    every = torch.arange(rows, device=device).expand(batch, -1)
    return torch.where((every >= span[:, :1]) & (every < span[:, 1:]), every, -1)


def indexed_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: tuple[int, int] | Tensor,
    index: Tensor,
    suffix: tuple[int, int] | Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    b, h, _, d = query.shape
    hkv, s, dv = value.shape[1:]
    dtype = wide(query, key, value)
    spans = [span_rows(span, b, s, query.device) for span in (prefix, suffix)]
    rows = torch.cat([spans[0], index, spans[1]], dim=1)[:, None, :, None]  # [B, 1, T, 1]
    k = key.gather(2, rows.clamp(min=0).expand(-1, hkv, -1, d)).to(dtype)
    v = value.gather(2, rows.clamp(min=0).expand(-1, hkv, -1, dv)).to(dtype)
    logits = query.to(dtype).view(b, hkv, h // hkv, d) @ k.transpose(2, 3) * scale
    logits = logits.masked_fill(rows.transpose(2, 3) < 0, -torch.inf)  # [B, Hkv, G, T]
    lse = logits.logsumexp(dim=-1, keepdim=True)
    weights = (logits - lse).exp().masked_fill(lse == -torch.inf, 0.0)
    return (weights @ v).view(b, h, 1, dv).to(query.dtype), lse.view(b, h)
