"""Keep some rows of the keys and values of all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlprune.kernels.dispatch import KernelError, choose
from vlprune.kernels.gather_cache.reference import gather_cache as _reference


def gather_cache(
    keys: Sequence[Tensor], values: Sequence[Tensor], index: Tensor, *, backend: str = "auto"
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Copy cache rows, one index for all layers: ``out[b, h, p] = x[b, h, index[b, p]]``, zeros where it is -1.

    Args:
        keys: L tensors [B, Hkv, S, d]; layers may differ in Hkv, S and d.
        values: L tensors [B, Hkv, S, dv].
        index: [B, P] int64 in -1..S-1; -1 marks a pad slot.
    Returns:
        keys and values, two tuples of L tensors [B, Hkv, P, d]. With the kernel, layers of one shape share one block
        of memory, which lives as long as any of them.
    Raises:
        KernelError: shapes that do not fit.
    """
    if index.dim() != 2 or index.dtype != torch.int64:
        raise KernelError(f"index must be [B, P] int64; got {tuple(index.shape)} of {index.dtype}")
    if len(keys) != len(values):
        raise KernelError(f"gather_cache needs as many keys as values; got {len(keys)} and {len(values)} layers")
    tensors = (*keys, *values)
    for t in tensors:
        if t.dim() != 4 or t.shape[0] != index.shape[0]:
            raise KernelError(f"gather_cache needs [B, Hkv, S, d] with B = {index.shape[0]}; got {tuple(t.shape)}")
    if not tensors:
        return (), ()
    if choose(backend, *tensors, index) == "reference":
        out = tuple(_reference(t, index) for t in tensors)
    else:
        from vlprune.kernels.gather_cache.triton import gather_cache as fast

        out = fast(tensors, index)
    return out[: len(keys)], out[len(keys) :]
