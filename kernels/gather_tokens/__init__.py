"""Rows of several per-token tensors, picked by one index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from vlprune.kernels.dispatch import FLOATS, KernelError, choose
from vlprune.kernels.gather_tokens.reference import gather_tokens as _reference
from vlprune.kernels.gather_tokens.reference import merge_tokens as _merging_reference

Entries = tuple[Tensor, Tensor, Tensor]


@overload
def gather_tokens(x: Tensor, index: Tensor, *, merge: Entries | None = None, backend: str = "auto") -> Tensor: ...
@overload
def gather_tokens(
    x: Sequence[Tensor], index: Tensor, *, merge: Entries | None = None, backend: str = "auto"
) -> tuple[Tensor, ...]: ...


def gather_tokens(
    x: Tensor | Sequence[Tensor], index: Tensor, *, merge: Entries | None = None, backend: str = "auto"
) -> Tensor | tuple[Tensor, ...]:
    """Copy the rows `index` names: ``out[b, p] = x[b, index[b, p]]``, and zeros where the index is -1.

    One call serves everything that goes along with the tokens (hidden states, cos, sin, masks, deepstack rows). With
    `merge`, some rows of the first tensor are weighted sums instead, taken in float32:

        out[b, p] = sum_e weight[e] x[b, source[e]] over the entries e with slot[e] = b P + p, where there is one

    Args:
        x: one tensor [B or 1, T] or [B or 1, T, D], of any dtype, or a sequence of them with T in common.
        index: [B, P] int64 in -1..T-1; -1 marks a pad slot.
        merge: source [E] int64 in 0..T-1, slot [E] int64 in 0..B*P-1 and weight [E] float, in any order. A row that
            shall be zero needs an entry of weight 0; a row without an entry is a copy.
    Returns:
        [B, P] or [B, P, D] with the dtype of x; a tuple where a sequence was given.
    Raises:
        KernelError: shapes or dtypes that do not fit.
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
    if merge is not None:
        _check_merge(tensors, *merge)
    if not tensors:
        return ()
    covered = merge is None or tensors[0].dtype in FLOATS
    if choose(backend, *tensors, index, *(merge or ()), covered=covered) == "reference":
        first = (_merging_reference(tensors[0], index, *merge) if merge else _reference(tensors[0], index),)
        out = first + tuple(_reference(t, index) for t in tensors[1:])
    else:
        from vlprune.kernels.gather_tokens.triton import gather_tokens as fast

        out = fast(tensors, index, merge)
    return out[0] if single else out


def _check_merge(tensors: tuple[Tensor, ...], source: Tensor, slot: Tensor, weight: Tensor) -> None:
    if not tensors or not tensors[0].is_floating_point():
        found = tensors[0].dtype if tensors else "no tensor"
        raise KernelError(f"merge sums rows of the first tensor, which must be floating; got {found}")
    if source.dim() != 1 or slot.shape != source.shape or weight.shape != source.shape:
        found = f"{tuple(source.shape)}, {tuple(slot.shape)} and {tuple(weight.shape)}"
        raise KernelError(f"merge takes source, slot and weight of one length [E]; got {found}")
    if source.dtype != torch.int64 or slot.dtype != torch.int64 or not weight.is_floating_point():
        found = f"{source.dtype}, {slot.dtype} and {weight.dtype}"
        raise KernelError(f"merge takes source and slot int64 and weight floating; got {found}")
