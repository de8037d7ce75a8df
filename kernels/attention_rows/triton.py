"""attention_rows with keys read once.

Pass 1: every program takes a chunk of the keys of one key head, multiplies it with all query rows that share the head,
and leaves the logits and, per row, the chunk's maximum and sum of exponentials. Pass 2 reads those back, completes the
softmax and reduces. Logits are 4 bytes per row and key where a bfloat16 key of width 128 is 256, so pass 2 is small.
Where many rows are reduced the logits would outweigh the keys; then the two passes of received_attention run.
On Hopper and later, pass 2 is set up while pass 1 still runs (programmatic dependent launch).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels.attention_rows.reference import reduce
from vlprune.kernels.dispatch import cdiv, opaque, overlaps, power_of_two, processors
from vlprune.kernels.plan import Buffer, Launch, Plan, Slot, planned
from vlprune.kernels.received_attention.triton import (
    limit_arguments,
    mask_arguments,
    reduced_rows,
    upcast,
    visible_logits,
)

KINDS = {"none": 0, "sum": 1, "mean": 1, "max": 2}
STORED = 64  # query rows per key head up to which logits are stored
CHUNKS = 128  # most chunks one row is cut into: pass 2 reads all their statistics
KEYS, WARPS, STAGES = 128, 4, 3  # keys per tile, warps, tiles in flight
OVERSUBSCRIBE = 8  # programs per multiprocessor
TILE = 8192  # probabilities one program of pass 2 holds


@triton.jit
def chunk_logits(
    q, k, mask, limit, logits, statistics, scale, HKV, G, R, S, pitch, chunks,
    qb, qh, qr, qd, kb, kh, ks, kd, mb, mh, mr, ms, lb, lr,
    MASK: tl.constexpr, LIMIT: tl.constexpr, UPCAST: tl.constexpr, D: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Logits and statistics of TILES * BLOCK_S keys for BLOCK_M of the G * R rows that share a key head.

    statistics: [rows, chunks, 2], maximum and sum of exponentials.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    chunk = tl.program_id(0)
    b = (tl.program_id(1) // HKV).to(tl.int64)
    head = (tl.program_id(1) % HKV).to(tl.int64)
    m = (tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    h = (head * G + m // R)[:, None]
    r = (m % R)[:, None]
    exists = (m < G * R)[:, None]
    dim = tl.arange(0, BLOCK_D)
    rows = tl.load(q + b * qb + h * qh + r * qr + dim[None, :] * qd, mask=exists & (dim[None, :] < D), other=0.0)
    if UPCAST:
        rows = rows.to(tl.float32)
    row = (b * HKV + head) * G * R + m
    keys = k + b * kb + head * kh
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(TILES):
        s = ((chunk * TILES + tile) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)[None, :]
        part = tl.load(keys + s * ks + dim[:, None] * kd, mask=(s < S) & (dim[:, None] < D), other=0.0)
        if UPCAST:
            part = part.to(tl.float32)
        x = tl.dot(rows, part, input_precision="ieee") * scale
        x = visible_logits(x, b, h, r, s, exists, s < S, mask, mb, mh, mr, ms, limit, lb, lr, MASK, LIMIT)
        tl.store(logits + row[:, None] * pitch + s, x, mask=exists & (s < S))
        higher = tl.maximum(peak, tl.max(x, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - safe) + tl.sum(tl.exp(x - safe[:, None]), axis=1)
        peak = higher
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    here = statistics + (row * chunks + chunk) * 2
    tl.store(here, peak, mask=m < G * R)
    tl.store(here + 1, total, mask=m < G * R)


@triton.jit
def finish(
    logits, statistics, index, out, factor, H, R, C, start, pitch, chunks, out_heads, out_rows, ib, ic,
    INDEX: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """BLOCK_C probabilities of one output row, reduced over its heads and rows (0 no, 1 sum, 2 maximum)."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    target = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = target // (out_heads * out_rows)
    if INDEX:
        column = tl.load(index + b * ib + c.to(tl.int64) * ic, mask=c < C, other=-1)[None, :]
        inside = column >= 0
    else:
        column = (c + start).to(tl.int64)[None, :]
        inside = (c < C)[None, :]
    if HEADS == 0:
        h = (target // out_rows) % H + tl.arange(0, BLOCK_H)[:, None]  # BLOCK_H is 1
    else:
        h = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    exists = h < H
    piece = tl.arange(0, BLOCK_CHUNKS)[None, :]
    found = tl.zeros([BLOCK_C], tl.float32)
    steps = 1 if ROWS == 0 else R
    for step in range(steps):
        row = (b * H + h) * R + (target % out_rows if ROWS == 0 else step)  # [BLOCK_H, 1]
        some = exists & (piece < chunks)
        there = statistics + (row * chunks + piece) * 2
        peak = tl.load(there, mask=some, other=float("-inf"))
        part = tl.load(there + 1, mask=some, other=0.0)
        x = tl.load(logits + row * pitch + column, mask=exists & inside, other=float("-inf"))
        highest = tl.max(peak, axis=1)
        safe = tl.where(highest == float("-inf"), 0.0, highest)[:, None]
        total = tl.sum(part * tl.exp(peak - safe), axis=1)
        shares = tl.exp(x - safe) * (1.0 / tl.where(total > 0, total, 1.0))[:, None]  # a hidden row's are 0 already
        one = tl.max(shares, axis=0) if HEADS == 2 else tl.sum(shares, axis=0)
        found = tl.maximum(found, one) if ROWS == 2 else found + one
    tl.store(out + target * C + c, found * factor, mask=c < C)


def _shape(query: Tensor, heads: str, rows: str, count: int) -> tuple[int, ...]:
    b, h, r, _ = query.shape
    return (b, *([h] if heads == "none" else []), *([r] if rows == "none" else []), count)


@planned
def _plan(inputs, scale: float, heads: str, rows: str, start: int, count: int) -> Plan:
    query, key, mask, limit, index = inputs
    b, h, r, d = query.shape
    hkv, s = key.shape[1:3]
    out = Buffer(_shape(query, heads, rows, count), torch.float32)
    if not b * count:
        return Plan((out,), ())
    shared = h // hkv * r  # query rows per key head
    wide = upcast(query, key)
    block_d = power_of_two(d, 16)
    block_m = power_of_two(shared, 16, 64)
    block_s = 32 if wide or block_d > 128 else KEYS if block_m == 16 else KEYS // 2
    groups = b * hkv * cdiv(shared, block_m)
    wanted = cdiv(OVERSUBSCRIBE * processors(query.device), groups)
    chunks = max(1, min(CHUNKS, wanted, cdiv(s, block_s)))
    tiles = power_of_two(cdiv(s, block_s * chunks))
    chunks = cdiv(s, block_s * tiles)
    pitch = cdiv(s, 16) * 16  # rows start aligned, so that pass 2 loads in vectors
    out_heads, out_rows = (h if heads == "none" else 1), (r if rows == "none" else 1)
    factor = (1.0 / h if heads == "mean" else 1.0) * (1.0 / r if rows == "mean" else 1.0)
    block_h = 1 if heads == "none" else power_of_two(h)
    block_c = power_of_two(TILE // block_h, 32, min(1024, power_of_two(count, 32)))
    targets = b * out_heads * out_rows
    while block_c > 32 and targets * cdiv(count, block_c) < 2 * processors(query.device):
        block_c //= 2
    q, k, result, logits, statistics = Slot(0), Slot(1), Slot(5), Slot(6), Slot(7)
    mask_slot, mask_strides, mask_kind = mask_arguments(mask, Slot(2), logits)
    limit_slot, limit_strides, limited = limit_arguments(limit, Slot(3), logits)
    index_slot, index_strides, indexed = limit_arguments(index, Slot(4), logits)
    overlap = overlaps(query.device)
    options = {"launch_pdl": True} if overlap else {}
    score = Launch(
        chunk_logits, (chunks, b * hkv, cdiv(shared, block_m)), q, k, mask_slot, limit_slot, logits, statistics, scale,
        hkv, h // hkv, r, s, pitch, chunks, *query.stride(), *key.stride(), *mask_strides, *limit_strides,
        MASK=mask_kind, LIMIT=limited, UPCAST=wide, D=d, OVERLAP=overlap, BLOCK_M=block_m, BLOCK_S=block_s,
        BLOCK_D=block_d, TILES=tiles, num_warps=WARPS, num_stages=STAGES, **options,
    )  # fmt: skip
    complete = Launch(
        finish, (targets, cdiv(count, block_c)), logits, statistics, index_slot, result, factor, h, r, count, start,
        pitch, chunks, out_heads, out_rows, *index_strides, INDEX=indexed, HEADS=KINDS[heads], ROWS=KINDS[rows],
        OVERLAP=overlap, BLOCK_H=block_h, BLOCK_C=block_c, BLOCK_CHUNKS=power_of_two(chunks), **options,
    )  # fmt: skip
    scratch = (Buffer((b, h, r, pitch), torch.float32), Buffer((b, h, r, chunks, 2), torch.float32))
    return Plan((out, *scratch), (score, complete))


def _fake(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, limit: Tensor | None, heads: str, rows: str,
    start: int, count: int, index: Tensor | None,
) -> Tensor:  # fmt: skip
    return query.new_empty(_shape(query, heads, rows, count), dtype=torch.float32)


@opaque("attention_rows", _fake)
def _launch(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, limit: Tensor | None, heads: str, rows: str,
    start: int, count: int, index: Tensor | None,
) -> Tensor:  # fmt: skip
    shared = query.shape[1] // key.shape[1] * query.shape[2]
    orders_agree = heads == "none" or (heads == "max") == (rows == "max")
    if shared > STORED and rows != "none" and orders_agree:
        per_head = reduced_rows(query, key, scale, mask, limit, rows, start, count, index)
        return reduce(per_head, heads, 1)
    return _plan((query, key, mask, limit, index), scale, heads, rows, start, count)[0]


def attention_rows(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, limit: Tensor | None, heads: str, rows: str,
    columns: tuple[int, int] | Tensor | None,
) -> Tensor:  # fmt: skip
    if isinstance(columns, Tensor):
        return _launch(query, key, scale, mask, limit, heads, rows, 0, columns.shape[-1], columns)
    start, stop = (0, key.shape[2]) if columns is None else columns
    return _launch(query, key, scale, mask, limit, heads, rows, start, stop - start, None)
