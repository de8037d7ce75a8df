"""A few query rows of the attention map, without the map."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.kernels.attention_rows.reference import attention_rows as _reference
from vlprune.kernels.dispatch import FLOATS, KernelError, choose, shapes

REDUCTIONS = ("none", "mean", "max", "sum")


def attention_rows(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    limit: Tensor | None = None,
    heads: str = "none",
    rows: str = "none",
    columns: tuple[int, int] | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention probabilities of R query rows over all S keys, cut to some columns and reduced.

        P[b, h, r, s] = softmax_s(scale * q[b, h, r] . k[b, h // (H // Hkv), s] + mask);  reduced over h, then over r

    The softmax always runs over the whole row, in float32. A row with no visible key gives zeros.

    Args:
        query: [B, H, R, d] rows already chosen, after RoPE.
        key: [B, Hkv, S, d]; H is a multiple of Hkv.
        mask: [B or 1, H or 1, R or 1, S], bool (True is visible) or a float that is added.
        limit: [R] or [B, R] int64, last visible key of each row (inclusive); -1 hides the whole row.
        heads, rows: "none", "mean", "max" or "sum", applied after the softmax, heads first. A mean counts every row,
            hidden ones too; for ragged rows take the sum and divide.
        columns: which key columns to return: a (start, stop) slice, or an index [N] or [B, N] where -1 gives 0.
    Returns:
        [B, H, R, C] float32 (float64 for float64 inputs); reduced dimensions are gone. C is S without `columns`.
    Raises:
        KernelError: shapes that do not fit.
    """
    _check(query, key, mask, limit, heads, rows, columns)
    covered = query.dtype in FLOATS and key.dtype == query.dtype
    if choose(backend, query, key, covered=covered) == "reference":
        return _reference(query, key, scale, mask, limit, heads, rows, columns)
    from vlprune.kernels.attention_rows.triton import attention_rows as fast

    return fast(query, key, scale, mask, limit, heads, rows, columns)


def _check(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    limit: Tensor | None,
    heads: str,
    rows: str,
    columns: tuple[int, int] | Tensor | None,
) -> None:
    if query.dim() != 4 or key.dim() != 4 or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise KernelError(
            f"attention_rows needs query [B, H, R, d] and key [B, Hkv, S, d]; got {shapes(query=query, key=key)}"
        )
    b, h, r, _ = query.shape
    s = key.shape[2]
    if h % key.shape[1]:
        raise KernelError(
            f"the number of query heads must be a multiple of the key heads; got {shapes(query=query, key=key)}"
        )
    for reduction in (heads, rows):
        if reduction not in REDUCTIONS:
            raise KernelError(f"unknown reduction {reduction!r}; heads and rows take one of {', '.join(REDUCTIONS)}")
    if mask is not None:
        fits = mask.dim() == 4 and all(have in (1, need) for have, need in zip(mask.shape[:3], (b, h, r), strict=True))
        if not fits or mask.shape[3] != s:
            raise KernelError(
                f"mask must be [B or 1, H or 1, R or 1, S]; got {tuple(mask.shape)} for {shapes(query=query, key=key)}"
            )
    if limit is not None and tuple(limit.shape) not in ((r,), (b, r)):
        raise KernelError(f"limit must be [R] or [B, R]; got {tuple(limit.shape)} for {shapes(query=query, key=key)}")
    if isinstance(columns, Tensor):
        if columns.dim() not in (1, 2) or (columns.dim() == 2 and columns.shape[0] != b):
            raise KernelError(
                f"columns must be [N] or [B, N]; got {tuple(columns.shape)} for {shapes(query=query, key=key)}"
            )
        if columns.dtype != torch.int64:
            raise KernelError(f"columns must be int64, got {columns.dtype}")
    elif columns is not None and not 0 <= columns[0] <= columns[1] <= s:
        raise KernelError(f"columns {tuple(columns)} is no slice of {s} keys")
