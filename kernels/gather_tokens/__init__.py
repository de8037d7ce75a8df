"""Rows of several per-token tensors, picked by one index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from vlprune.kernels.dispatch import KernelError, choose
from vlprune.kernels.gather_tokens.reference import gather_tokens as _reference


@overload
def gather_tokens(x: Tensor, index: Tensor, *, backend: str = "auto") -> Tensor: ...
@overload
def gather_tokens(x: Sequence[Tensor], index: Tensor, *, backend: str = "auto") -> tuple[Tensor, ...]: ...


def gather_tokens(x: Tensor | Sequence[Tensor], index: Tensor, *, backend: str = "auto") -> Tensor | tuple[Tensor, ...]:
    """Copy the rows `index` names: ``out[b, p] = x[b, index[b, p]]``, and zeros where the index is -1.

    One call serves everything that goes along with the tokens (hidden states, cos, sin, masks, deepstack rows).

    Args:
        x: one tensor [B or 1, T] or [B or 1, T, D], of any dtype, or a sequence of them with T in common.
        index: [B, P] int64 in -1..T-1; -1 marks a pad slot.
    Returns:
        [B, P] or [B, P, D] with the dtype of x; a tuple where a sequence was given.
    Raises:
        KernelError: shapes that do not fit.
    """
    single = isinstance(x, Tensor)
    tensors = (x,) if isinstance(x, Tensor) else tuple(x)
    if index.dim() != 2 or index.dtype != torch.int64:
        raise KernelError(f"index must be [B, P] int64; got {tuple(index.shape)} of {index.dtype}")
    for t in tensors:
        if t.dim() not in (2, 3) or t.shape[0] not in (1, index.shape[0]) or t.shape[1] != tensors[0].shape[1]:
            raise KernelError(
                f"gather_tokens needs [B or 1, T(, D)] with B = {index.shape[0]} and T in common;"
                f" got {[tuple(t.shape) for t in tensors]}"
            )
    if not tensors:
        return ()
    if choose(backend, *tensors, index) == "reference":
        out = tuple(_reference(t, index) for t in tensors)
    else:
        from vlprune.kernels.gather_tokens.triton import gather_tokens as fast

        out = fast(tensors, index)
    return out[0] if single else out
