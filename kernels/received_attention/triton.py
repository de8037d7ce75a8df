"""received_attention in two passes over the map, which never leaves the chip.

Pass 1 walks along each query row and leaves its maximum and its sum of exponentials. Pass 2 walks down each key column
with those and adds up probabilities. Both passes compute the logits, so memory traffic is O(L d) per head and block.
attention_rows takes the same two passes when it reduces over many rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels.dispatch import cdiv, interpreted, opaque, power_of_two
from vlprune.kernels.plan import Buffer, Launch, Plan, Slot, planned

BLOCK, WARPS, STAGES = 64, 4, 2  # rows and columns of a tile of the map, warps, tiles in flight


@triton.jit
def visible_logits(
    logits, b, h, r, s, exists, inside, mask, mb, mh, mr, ms, limit, lb, lr, MASK: tl.constexpr, LIMIT: tl.constexpr
):  # fmt: skip
    """A tile of logits with everything hidden at -inf. h, r, exists: [M, 1]; s, inside: [1, C]."""
    seen = exists & inside
    if MASK == 1:
        seen = seen & (tl.load(mask + b * mb + h * mh + r * mr + s * ms, mask=seen, other=0) != 0)
    if MASK == 2:
        logits += tl.load(mask + b * mb + h * mh + r * mr + s * ms, mask=seen, other=0.0).to(tl.float32)
    if LIMIT:
        last = tl.load(limit + b * lb + r * lr, mask=exists, other=-1)
        seen = seen & (s <= last)
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def row_statistics(
    q, k, mask, limit, peaks, sums, scale, H, G, R, S,
    qb, qh, qr, qd, kb, kh, ks, kd, mb, mh, mr, ms, lb, lr,
    MASK: tl.constexpr, LIMIT: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exponentials of BLOCK_R rows of one head."""
    qb, qh, qr, kb, kh, ks = qb * UNIT, qh * UNIT, qr * UNIT, kb * UNIT, kh * UNIT, ks * UNIT
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    dim = tl.arange(0, BLOCK_D)
    rows = tl.load(q + b * qb + h * qh + r * qr + dim[None, :] * qd, mask=(r < R) & (dim[None, :] < D), other=0.0)
    if UPCAST:
        rows = rows.to(tl.float32)
    keys = k + b * kb + (h // G) * kh
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, S, BLOCK_S):
        s = (start + tl.arange(0, BLOCK_S)).to(tl.int64)[None, :]
        tile = tl.load(keys + s * ks + dim[:, None] * kd, mask=(s < S) & (dim[:, None] < D), other=0.0)
        if UPCAST:
            tile = tile.to(tl.float32)
        logits = tl.dot(rows, tile, input_precision="ieee") * scale
        logits = visible_logits(logits, b, h, r, s, r < R, s < S, mask, mb, mh, mr, ms, limit, lb, lr, MASK, LIMIT)
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - safe) + tl.sum(tl.exp(logits - safe[:, None]), axis=1)
        peak = higher
    row = (b * H + h) * R + tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R) < R
    tl.store(peaks + row, tl.where(peak == float("-inf"), 0.0, peak), mask=inside)
    tl.store(sums + row, total, mask=inside)


@triton.jit
def column_reduce(
    q, k, mask, limit, peaks, sums, index, out, scale, factor, H, G, R, start, C,
    qb, qh, qr, qd, kb, kh, ks, kd, mb, mh, mr, ms, lb, lr, ib, ic,
    MASK: tl.constexpr, LIMIT: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr,
    INDEX: tl.constexpr, MAX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum or maximum over all rows of the probabilities of BLOCK_C columns of one head."""
    qb, qh, qr, kb, kh, ks = qb * UNIT, qh * UNIT, qr * UNIT, kb * UNIT, kh * UNIT, ks * UNIT
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    if INDEX:
        column = tl.load(index + b * ib + c * ic, mask=c < C, other=-1)[None, :]
        inside = column >= 0
    else:
        column = (c + start)[None, :]
        inside = (c < C)[None, :]
    dim = tl.arange(0, BLOCK_D)
    keys = tl.load(
        k + b * kb + (h // G) * kh + column * ks + dim[:, None] * kd, mask=inside & (dim[:, None] < D), other=0.0
    )
    if UPCAST:
        keys = keys.to(tl.float32)
    found = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(0, R, BLOCK_R):
        r = (first + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
        rows = tl.load(q + b * qb + h * qh + r * qr + dim[None, :] * qd, mask=(r < R) & (dim[None, :] < D), other=0.0)
        if UPCAST:
            rows = rows.to(tl.float32)
        logits = tl.dot(rows, keys, input_precision="ieee") * scale
        logits = visible_logits(
            logits, b, h, r, column, r < R, inside, mask, mb, mh, mr, ms, limit, lb, lr, MASK, LIMIT
        )
        row = (b * H + h) * R + r
        peak = tl.load(peaks + row, mask=r < R, other=0.0)
        total = tl.load(sums + row, mask=r < R, other=0.0)
        shares = tl.exp(logits - peak) * (1.0 / tl.where(total > 0, total, 1.0))  # a hidden row has no share anyway
        found = tl.maximum(found, shares) if MAX else found + shares
    result = tl.max(found, axis=0) if MAX else tl.sum(found, axis=0)
    tl.store(out + (b * H + h) * C + c, result * factor, mask=c < C)


def mask_arguments(mask: Tensor | None, slot: Slot, stand_in: Slot) -> tuple[Slot, tuple[int, ...], int]:
    """Pointer, four strides (0 where broadcast) and kind (0 none, 1 bool, 2 added) of a [b, h, r, s] mask."""
    if mask is None:
        return stand_in, (0, 0, 0, 0), 0
    strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    return (Slot(slot.which, torch.uint8), strides, 1) if mask.dtype == torch.bool else (slot, strides, 2)


def limit_arguments(limit: Tensor | None, slot: Slot, stand_in: Slot) -> tuple[Slot, tuple[int, int], bool]:
    """Pointer and two strides of an index or limit [n] or [b, n], and whether there is one."""
    if limit is None:
        return stand_in, (0, 0), False
    return slot, (limit.stride(0) if limit.dim() == 2 else 0, limit.stride(-1)), True


def shared_unit(*strides: tuple[int, ...]) -> tuple[int, list[int]]:
    """8 or 1, and the strides in that unit.

    Triton notices multiples of 16 in its arguments; it loads a head of width 72 in vectors only when told of the 8.
    """
    steps = [step for some in strides for step in some]
    unit = 8 if all(step % 8 == 0 for step in steps) else 1
    return unit, [step // unit for step in steps]


def upcast(*tensors: Tensor) -> bool:
    """Whether tiles go to float32 before a dot; the interpreter cannot multiply bfloat16."""
    return interpreted() or any(t.dtype == torch.float32 for t in tensors)


@planned
def _plan(inputs, scale: float, rows: str, start: int, count: int) -> Plan:
    query, key, mask, limit, index = inputs
    b, h, r, d = query.shape
    hkv, s = key.shape[1:3]
    out, per_row = Buffer((b, h, count), torch.float32), Buffer((b, h, r), torch.float32)
    if not b * count:
        return Plan((out,), ())
    q, k, result, peaks, sums = Slot(0), Slot(1), Slot(5), Slot(6), Slot(7)
    mask_slot, mask_strides, mask_kind = mask_arguments(mask, Slot(2), peaks)
    limit_slot, limit_strides, limited = limit_arguments(limit, Slot(3), peaks)
    index_slot, index_strides, indexed = limit_arguments(index, Slot(4), peaks)
    block_d = power_of_two(d, 16)
    wide = upcast(query, key)
    unit, steps = shared_unit(query.stride()[:3], key.stride()[:3])
    strides = (*steps[:3], query.stride(3), *steps[3:], key.stride(3), *mask_strides, *limit_strides)
    block_r, block_s = (32, 32) if wide or block_d > 128 else (BLOCK, BLOCK)
    both = {
        "MASK": mask_kind, "LIMIT": limited, "UPCAST": wide, "UNIT": unit, "D": d, "BLOCK_R": block_r,
        "BLOCK_D": block_d, "num_warps": WARPS, "num_stages": STAGES,
    }  # fmt: skip
    along = Launch(
        row_statistics, (cdiv(r, block_r), b * h), q, k, mask_slot, limit_slot, peaks, sums, scale, h, h // hkv, r, s,
        *strides, BLOCK_S=block_s, **both,
    )  # fmt: skip
    down = Launch(
        column_reduce, (cdiv(count, block_s), b * h), q, k, mask_slot, limit_slot, peaks, sums, index_slot, result,
        scale, 1.0 / r if rows == "mean" else 1.0, h, h // hkv, r, start, count, *strides, *index_strides,
        INDEX=indexed, MAX=rows == "max", BLOCK_C=block_s, **both,
    )  # fmt: skip
    return Plan((out, per_row, per_row), (along, down))


def reduced_rows(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, limit: Tensor | None, rows: str, start: int,
    count: int, index: Tensor | None,
) -> Tensor:  # fmt: skip
    """[B, H, count] float32: the mean, sum or maximum over all R query rows, for `count` columns."""
    return _plan((query, key, mask, limit, index), scale, rows, start, count)[0]


def _fake(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=torch.float32)


@opaque("received_attention", _fake)
def _launch(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    return reduced_rows(query, key, scale, mask, None, "mean", 0, key.shape[2], None)


def received_attention(query: Tensor, key: Tensor, scale: float, mask: Tensor | None, heads: str) -> Tensor:
    from vlprune.kernels.attention_rows.reference import reduce

    return reduce(_launch(query, key, scale, mask), heads, 1)
