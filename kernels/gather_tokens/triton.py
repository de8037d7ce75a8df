"""gather_tokens: one launch for all tensors, copying 4-byte words wherever a row consists of them.

A merge is summed in the same launch, in a fixed order; grouping its entries by row takes a sort before it.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels.dispatch import cdiv, opaque, power_of_two
from vlprune.kernels.plan import Buffer, Launch, Plan, Slot, planned

TILE, WARPS = 2048, 4  # words a program copies, warps
AT_ONCE = 8  # tensors of one launch; each adds its own branch to the kernel
SPAN, ENTRIES = 1024, 8  # columns a program sums, entries in flight
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@triton.jit
def merge_row(
    x, out, index, starts, order, source, weight, row, column, P, width, xb, xn, xd, ib, ip,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """One span of one row: the sum of its entries, or a copy where it has none."""
    inside = column < width
    here = x + (row // P) * xb + column.to(tl.int64) * xd
    there = out + row * width + column
    start = tl.load(starts + row)
    stop = tl.load(starts + row + 1)
    if start == stop:
        token = tl.load(index + (row // P) * ib + (row % P) * ip)
        known = column < tl.where(token >= 0, width, 0)
        tl.store(there, tl.load(here + token * xn, mask=known, other=0.0), mask=inside)
    else:
        total = tl.zeros_like(column).to(tl.float32)
        for first in range(start, stop, ENTRIES):
            place = first + tl.arange(0, ENTRIES)
            known = place < stop
            entry = tl.load(order + place, mask=known, other=0)
            token = tl.load(source + entry, mask=known, other=0)
            share = tl.load(weight + entry, mask=known, other=0.0).to(tl.float32)
            rows = tl.load(here[None, :] + token[:, None] * xn, mask=known[:, None] & inside[None, :], other=0.0)
            total += tl.sum(rows.to(tl.float32) * share[:, None], axis=0)
        tl.store(there, total, mask=inside)


@triton.jit
def copy_rows(
    sources, targets, index, starts, order, source, weight, P, rows, firsts, widths, batches, tokens, units, ib, ip,
    COUNT: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr, MERGE: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """One TILE of one tensor; programs firsts[i] .. firsts[i + 1] - 1 belong to tensor i, [rows, widths[i]] words."""
    program = tl.program_id(0)
    for i in tl.static_range(COUNT):
        if (program >= firsts[i]) & (program < firsts[i + 1]):
            across = tl.cdiv(widths[i], BLOCKS[i])
            local = program - firsts[i]
            word = (local % across) * BLOCKS[i] + tl.arange(0, BLOCKS[i])
            if MERGE and i == 0:
                merge_row(
                    sources[i], targets[i], index, starts, order, source, weight, (local // across).to(tl.int64), word,
                    P, widths[i], batches[i], tokens[i], units[i], ib, ip, ENTRIES,
                )  # fmt: skip
            else:
                row = ((local // across) * (TILE // BLOCKS[i]) + tl.arange(0, TILE // BLOCKS[i])).to(tl.int64)
                token = tl.load(index + (row // P) * ib + (row % P) * ip, mask=row < rows, other=-1)
                begin = (row // P) * batches[i] + token * tokens[i]
                inside = (word < widths[i])[None, :]
                x = tl.load(
                    sources[i] + begin[:, None] + word[None, :].to(tl.int64) * units[i],
                    mask=(token >= 0)[:, None] & inside, other=0,
                )  # fmt: skip
                tl.store(targets[i] + row[:, None] * widths[i] + word[None, :], x, mask=(row < rows)[:, None] & inside)


def word_size(*tensors: Tensor) -> int:
    """Bytes, 4, 2 or 1, of the widest word that divides every row of all of them.

    Copies are of bits, so the type is free. Tensors whose last dimension is not contiguous keep their element size.
    """
    size = tensors[0].element_size()
    apart = all(t.stride(-1) == 1 for t in tensors)
    steps = [n * size for t in tensors for n in (t.storage_offset(), t.shape[-1], *t.stride()[:-1])]
    for unit in (4, 2, 1):
        if unit == size or (apart and all(step % unit == 0 for step in steps)):
            return unit
    return size


def in_words(n: int, t: Tensor, unit: int) -> int:
    """n elements of t, counted in words."""
    return n * t.element_size() // unit


@planned
def _plan(inputs) -> Plan:
    index, starts, _, _, _, *tensors = inputs
    buffers = tuple(Buffer((*index.shape, *t.shape[2:]), t.dtype) for t in tensors)
    busy = [i for i, buffer in enumerate(buffers) if prod(buffer.shape)]
    several = [busy[start : start + AT_ONCE] for start in range(0, len(busy), AT_ONCE)]
    return Plan(buffers, tuple(_copy(inputs, some, starts is not None and some[0] == 0) for some in several))


def _copy(inputs, some: list[int], merge: bool) -> Launch:
    """The launch that copies the tensors numbered `some`; the first is merged, perhaps."""
    index, *parts = inputs
    tensors = parts[4:]
    rows = index.numel()
    sources, targets, widths, blocks, firsts, steps = [], [], [], [], [0], []
    for place, i in enumerate(some):
        flat = tensors[i] if tensors[i].dim() == 3 else tensors[i][..., None]
        summed = merge and place == 0
        unit = flat.element_size() if summed else word_size(flat)
        dtype = None if summed else WORDS[unit]
        width = in_words(flat.shape[2], flat, unit)
        block = power_of_two(width, 1, SPAN if summed else TILE)
        sources.append(Slot(5 + i, dtype))
        targets.append(Slot(len(inputs) + i, dtype))
        widths.append(width)
        blocks.append(block)
        firsts.append(firsts[-1] + (rows if summed else cdiv(rows, TILE // block)) * cdiv(width, block))
        batch, token, element = flat.stride()
        last = element if unit == flat.element_size() else 1
        steps.append((0 if len(flat) == 1 else in_words(batch, flat, unit), in_words(token, flat, unit), last))
    batches, tokens, units = zip(*steps, strict=True)
    entries = (Slot(1), Slot(2), Slot(3), Slot(4)) if merge else (Slot(0),) * 4
    return Launch(
        copy_rows, (firsts[-1],), tuple(sources), tuple(targets), Slot(0), *entries, index.shape[1], rows,
        tuple(firsts), tuple(widths), batches, tokens, units, *index.stride(), COUNT=len(some), BLOCKS=tuple(blocks),
        TILE=TILE, MERGE=merge, ENTRIES=ENTRIES, num_warps=WARPS,
    )  # fmt: skip


def _fake(tensors: list[Tensor], index: Tensor, merge: list[Tensor]) -> list[Tensor]:
    return [t.new_empty(*index.shape, *t.shape[2:]) for t in tensors]


@opaque("gather_tokens", _fake)
def _launch(tensors: list[Tensor], index: Tensor, merge: list[Tensor]) -> list[Tensor]:
    grouped: tuple[Tensor | None, ...] = (None,) * 4
    if merge:
        source, slot, weight = merge
        ordered, order = slot.sort(stable=True)
        starts = torch.searchsorted(ordered, torch.arange(index.numel() + 1, device=slot.device))
        grouped = (starts, order, source.contiguous(), weight.contiguous())
    return _plan((index, *grouped, *tensors))


def gather_tokens(
    tensors: tuple[Tensor, ...], index: Tensor, merge: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, ...]:
    return tuple(_launch(list(tensors), index, list(merge or ())))
