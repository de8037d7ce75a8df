"""Decode attention that reads only some rows of the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.kernels.dispatch import FLOATS, KernelError, choose, shapes
from vlprune.kernels.indexed_decode.reference import indexed_decode as _reference

Span = tuple[int, int] | Tensor


def indexed_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Span | None,
    index: Tensor | None,
    suffix: Span | None,
    *,
    scale: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of one query token over three disjoint sets of cache rows, read where they lie.

        rows(b) = prefix(b) + index(b) + suffix(b);  out = softmax(scale * q . k[rows]) v[rows];  lse = log sum exp

    Typically the text before the picture, the visual tokens chosen for this step, and everything after the picture.

    Args:
        query: [B, H, 1, d] after RoPE.
        key: [B, Hkv, S, d]; H is a multiple of Hkv.
        value: [B, Hkv, S, dv].
        prefix, suffix: (start, stop) for all sequences, or [B, 2] int64; None is empty.
        index: [B, P] int64 rows, -1 marks a pad; None is empty.
    Returns:
        out [B, H, 1, dv] with the dtype of query, and lse [B, H] float32 (float64 for float64 inputs). With no row at
        all they are 0 and -inf.
    Raises:
        KernelError: shapes that do not fit.
    """
    if any(t.dim() != 4 for t in (query, key, value)) or query.shape[2] != 1 or query.shape[3] != key.shape[3]:
        found = shapes(query=query, key=key, value=value)
        raise KernelError(f"indexed_decode needs query [B, H, 1, d], key and value [B, Hkv, S, d]; got {found}")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[1] % key.shape[1]:
        found = shapes(query=query, key=key, value=value)
        raise KernelError(f"batch, heads or lengths do not fit together; got {found}")
    b = query.shape[0]
    if index is not None and (index.dim() != 2 or index.shape[0] != b or index.dtype != torch.int64):
        raise KernelError(f"index must be [{b}, P] int64; got {tuple(index.shape)} of {index.dtype}")
    for name, span in (("prefix", prefix), ("suffix", suffix)):
        if isinstance(span, Tensor):
            if tuple(span.shape) != (b, 2) or span.dtype != torch.int64:
                raise KernelError(f"{name} must be (start, stop) or [{b}, 2] int64; got {tuple(span.shape)}")
        elif span is not None and not 0 <= span[0] <= span[1] <= key.shape[2]:
            raise KernelError(f"{name} {tuple(span)} is no range of the {key.shape[2]} cached rows")
    prefix = (0, 0) if prefix is None else prefix
    suffix = (0, 0) if suffix is None else suffix
    index = torch.empty(b, 0, dtype=torch.int64, device=query.device) if index is None else index
    covered = query.dtype in FLOATS and query.dtype == key.dtype == value.dtype
    if choose(backend, query, key, value, covered=covered) == "reference":
        return _reference(query, key, value, prefix, index, suffix, scale)
    from vlprune.kernels.indexed_decode.triton import indexed_decode as fast

    return fast(query, key, value, prefix, index, suffix, scale)
