"""gather_tokens: one launch for all tensors, copying 4-byte words wherever a row consists of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels.dispatch import cdiv, on_device, opaque, power_of_two

TILE, WARPS = 2048, 4  # words a program copies, warps
AT_ONCE = 8  # tensors of one launch; each adds its own branch to the kernel


@triton.jit
def copy_rows(
    sources, targets, index, P, rows, firsts, widths, batches, tokens, units, ib, ip,
    COUNT: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One TILE of one tensor; programs firsts[i] .. firsts[i + 1] - 1 belong to tensor i, [rows, widths[i]] words."""
    program = tl.program_id(0)
    for i in tl.static_range(COUNT):
        if (program >= firsts[i]) & (program < firsts[i + 1]):
            across = tl.cdiv(widths[i], BLOCKS[i])
            local = program - firsts[i]
            row = ((local // across) * (TILE // BLOCKS[i]) + tl.arange(0, TILE // BLOCKS[i])).to(tl.int64)
            word = (local % across) * BLOCKS[i] + tl.arange(0, BLOCKS[i])
            token = tl.load(index + (row // P) * ib + (row % P) * ip, mask=row < rows, other=-1)
            start = (row // P) * batches[i] + token * tokens[i]
            inside = (word < widths[i])[None, :]
            x = tl.load(
                sources[i] + start[:, None] + word[None, :].to(tl.int64) * units[i],
                mask=(token >= 0)[:, None] & inside, other=0,
            )  # fmt: skip
            tl.store(targets[i] + row[:, None] * widths[i] + word[None, :], x, mask=(row < rows)[:, None] & inside)


def words(*tensors: Tensor) -> list[Tensor]:
    """The tensors as int32, int16 or uint8, the widest that divides every row of all of them.

    Copies are of bits, so the type is free. A tensor whose last dimension is not contiguous keeps its element size.
    """
    size = tensors[0].element_size()
    for unit, dtype in ((4, torch.int32), (2, torch.int16), (1, torch.uint8)):
        apart = all(t.stride(-1) == 1 for t in tensors)
        steps = [t.storage_offset() * size for t in tensors]
        steps += [n * size for t in tensors for n in (t.shape[-1], *t.stride()[:-1])]
        if unit == size or (apart and all(step % unit == 0 for step in steps)):
            return [t.view(dtype) for t in tensors]
    return [t.view(torch.int64) for t in tensors]  # 8 bytes, last dimension not contiguous


def _fake(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
    return [t.new_empty(*index.shape, *t.shape[2:]) for t in tensors]


@opaque("gather_tokens", _fake)
def _launch(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
    outs = _fake(tensors, index)
    busy = [(t, out) for t, out in zip(tensors, outs, strict=True) if out.numel()]
    for start in range(0, len(busy), AT_ONCE):
        _copy(busy[start : start + AT_ONCE], index)
    return outs


def _copy(pairs: list[tuple[Tensor, Tensor]], index: Tensor) -> None:
    rows = index.numel()
    sources, targets = [], []
    for t, out in pairs:
        flat = t if t.dim() == 3 else t[..., None]
        source, target = words(flat, out.view(*index.shape, -1))
        sources.append(source)
        targets.append(target)
    widths = [s.shape[2] for s in sources]
    blocks = [power_of_two(width, 1, TILE) for width in widths]
    firsts = [0]
    for width, block in zip(widths, blocks, strict=True):
        firsts.append(firsts[-1] + cdiv(rows, TILE // block) * cdiv(width, block))
    with on_device(index):
        copy_rows[firsts[-1],](
            tuple(sources), tuple(targets), index, index.shape[1], rows, tuple(firsts), tuple(widths),
            tuple(0 if s.shape[0] == 1 else s.stride(0) for s in sources), tuple(s.stride(1) for s in sources),
            tuple(s.stride(2) for s in sources), *index.stride(), COUNT=len(sources), BLOCKS=tuple(blocks), TILE=TILE,
            num_warps=WARPS,
        )  # fmt: skip


def gather_tokens(tensors: tuple[Tensor, ...], index: Tensor) -> tuple[Tensor, ...]:
    return tuple(_launch(list(tensors), index))
