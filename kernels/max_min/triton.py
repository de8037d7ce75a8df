"""max_min in three launches: norms, the cosine matrix on the matrix units with every row's nearest neighbour, all K picks.

The picks are sequential, and each depends on the whole of one row of distances. Reading that row from a finished matrix
(33 MB at N = 2880) costs a microsecond; making it from the features each time would cost several.

Half-precision features are multiplied as they are, which is exact. A float32 row is scaled to length 2^14 and written as
high + low, two float16 with 22 bits between them; three products (all but low * low) then give float32 accuracy at half
the cost of tf32 in three parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels.dispatch import cdiv, interpreted, opaque, power_of_two
from vlprune.kernels.plan import Buffer, Launch, Plan, Slot, planned

SMALL = (64, 128, 4, 3)  # side and depth of a tile of the matrix, warps, tiles in flight; for N <= 1024
LARGE = (128, 64, 8, 3)
FLOAT32 = (64, 64, 4, 3)
LANES = 8  # tokens a thread of `pick_all` holds
LENGTH = 2.0**14  # of scaled float32 rows: no part overflows float16, and what underflows is below 2^-39 of the row


@triton.jit
def prepare_rows(
    x, norms, best, high, low, N, D, pitch, xb, xn, xd, LENGTH: tl.constexpr, SPLIT: tl.constexpr, BEST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """1 / |x_n|, 0 for a row of zeros; with SPLIT the two halves of the scaled row instead. Starts `best` at -2."""
    row = tl.program_id(0).to(tl.int64)
    start = x + (row // N) * xb + (row % N) * xn
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, D, BLOCK_D):
        dim = first + tl.arange(0, BLOCK_D)
        part = tl.load(start + dim * xd, mask=dim < D, other=0.0).to(tl.float32)
        total += part * part
    norm = tl.sqrt(tl.sum(total, axis=0))
    inverse = tl.where(norm > 0, 1.0 / tl.maximum(norm, 1e-12), 0.0)
    if SPLIT:
        for first in range(0, D, BLOCK_D):
            dim = first + tl.arange(0, BLOCK_D)
            part = tl.load(start + dim * xd, mask=dim < D, other=0.0) * (inverse * LENGTH)
            upper = part.to(tl.float16)
            tl.store(high + row * pitch + dim, upper, mask=dim < D)
            tl.store(low + row * pitch + dim, (part - upper.to(tl.float32)).to(tl.float16), mask=dim < D)
    else:
        tl.store(norms + row, inverse)
    if BEST:
        tl.store(best + row, -2.0)


@triton.jit
def cosine_tiles(
    x, low, norms, best, out, N, D, xb, xn, xd, LENGTH: tl.constexpr,
    UPCAST: tl.constexpr, SPLIT: tl.constexpr, BEST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One BLOCK x BLOCK tile on or above the diagonal of [N, N], stored on both sides of it.

    best: [B, N], raised to the largest cosine of each row to another row; the order of the raises does not matter.
    """
    across = tl.program_id(0)
    down = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    if down <= across:
        i = (down * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        j = (across * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        tile = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(0, D, BLOCK_D):
            dim = start + tl.arange(0, BLOCK_D)
            here = b * xb + i[:, None] * xn + dim[None, :] * xd
            there = b * xb + j[None, :] * xn + dim[:, None] * xd
            known = (i < N)[:, None] & (dim < D)[None, :]
            needed = (j < N)[None, :] & (dim < D)[:, None]
            left = tl.load(x + here, mask=known, other=0.0)
            right = tl.load(x + there, mask=needed, other=0.0)
            if UPCAST:
                left = left.to(tl.float32)
                right = right.to(tl.float32)
            if SPLIT:
                tile = tl.dot(left, tl.load(low + there, mask=needed, other=0.0), tile)
                tile = tl.dot(tl.load(low + here, mask=known, other=0.0), right, tile)
            tile = tl.dot(left, right, tile, input_precision="ieee")
        inside = (i < N)[:, None] & (j < N)[None, :]
        if SPLIT:
            tile *= 1.0 / (LENGTH * LENGTH)
        else:
            tile *= tl.load(norms + b * N + i, mask=i < N, other=0.0)[:, None]
            tile *= tl.load(norms + b * N + j, mask=j < N, other=0.0)[None, :]
        tl.store(out + (b * N + i[:, None]) * N + j[None, :], tile, mask=inside)
        if down < across:
            tl.store(out + (b * N + j[:, None]) * N + i[None, :], tl.trans(tile), mask=tl.trans(inside))
        if BEST:
            others = tl.where(inside & (i[:, None] != j[None, :]), tile, -2.0)
            tl.atomic_max(best + b * N + i, tl.max(others, axis=1), mask=i < N, sem="relaxed")
            if down < across:
                tl.atomic_max(best + b * N + j, tl.max(others, axis=0), mask=j < N, sem="relaxed")


@triton.jit
def pick_all(
    cosines, best, weights, out, N, K, wb, wn,
    OFFICIAL: tl.constexpr, WEIGHTED: tl.constexpr, ORDER: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All picks of one item; the distances to the nearest pick stay in registers, -inf once a token is taken."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_N)
    inside = i < N
    weight = tl.full([BLOCK_N], 1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(weights + b * wb + i * wn, mask=inside, other=1.0).to(tl.float32)
    score = weight
    if OFFICIAL:
        score = weight * (1 - tl.load(best + b * N + i, mask=inside, other=0.0))
    score = tl.where(inside, score, float("-inf"))
    distance = tl.where(inside, float("inf"), float("-inf"))
    turn = tl.full([BLOCK_N], -1, tl.int32)  # at which pick a token was taken
    for t in range(K):
        pick = tl.minimum(tl.argmax(score, axis=0), N - 1)
        turn = tl.where(i == pick, t, turn)
        row = tl.load(cosines + (b * N + pick) * N + i, mask=inside, other=0.0)
        distance = tl.where(i == pick, float("-inf"), tl.minimum(distance, 1 - row))
        score = tl.where(distance == float("-inf"), float("-inf"), weight * distance)
    place = turn if ORDER else tl.cumsum((turn >= 0).to(tl.int32), axis=0) - 1
    tl.store(out + b * K + place, i.to(tl.int64), mask=turn >= 0)


def cosine_matrix(x: Tensor, slots: tuple[Slot, ...], best: bool) -> tuple[tuple[Buffer, ...], tuple[Launch, ...]]:
    """Buffers and launches for cosines [B, N, N] float32 and, if asked for, the best of every row, [B, N].

    slots: where x and the five buffers stand, in this order.
    """
    b, n, d = x.shape
    source, cosines, most, norms, high, low = slots
    split = x.dtype == torch.float32
    block, block_d, warps, stages = FLOAT32 if split else SMALL if n <= 1024 else LARGE
    block_d = power_of_two(d, 16, block_d)
    pitch = cdiv(d, 16) * 16 if split else 0
    single, half = torch.float32, torch.float16
    shapes = ((b, n, n), single), ((b, n), single), ((b, n), single), ((b, n, pitch), half), ((b, n, pitch), half)
    both = {"LENGTH": LENGTH, "SPLIT": split, "BEST": best}
    prepare = Launch(
        prepare_rows, (b * n,), source, norms, most, high, low, n, d, pitch, *x.stride(),
        BLOCK_D=power_of_two(d, 1, 4096), **both,
    )  # fmt: skip
    rows = (high, low, norms, most, cosines, n, d, n * pitch, pitch, 1)
    if not split:
        rows = (source, high, norms, most, cosines, n, d, *x.stride())
    tiles = cdiv(n, block)
    multiply = Launch(
        cosine_tiles, (tiles, tiles, b), *rows, UPCAST=interpreted() and not split, BLOCK=block, BLOCK_D=block_d,
        num_warps=warps, num_stages=stages, **both,
    )  # fmt: skip
    return tuple(Buffer(*shape) for shape in shapes), (prepare, multiply)


@planned
def _plan(inputs, keep: int, first: str, order: bool) -> Plan:
    x, weights = inputs
    b, n, _ = x.shape
    picks = Buffer((b, keep), torch.int64)
    if not b:
        return Plan((picks,), ())
    official = first == "official"
    slots = tuple(Slot(which) for which in (0, 3, 4, 5, 6, 7))
    buffers, launches = cosine_matrix(x, slots, official)
    block = power_of_two(n)
    choose = Launch(
        pick_all, (b,), slots[1], slots[2], slots[1] if weights is None else Slot(1), Slot(2), n, keep,
        *((0, 0) if weights is None else weights.stride()), OFFICIAL=official, WEIGHTED=weights is not None,
        ORDER=order, BLOCK_N=block, num_warps=power_of_two(block // (32 * LANES), 4, 16),
    )  # fmt: skip
    return Plan((picks, *buffers), (*launches, choose))


def _fake(x: Tensor, keep: int, weights: Tensor | None, first: str, order: bool) -> Tensor:
    return x.new_empty(x.shape[0], keep, dtype=torch.int64)


@opaque("max_min", _fake)
def max_min(x: Tensor, keep: int, weights: Tensor | None, first: str, order: bool) -> Tensor:
    """[B, N, D] -> [B, K]."""
    return _plan((x, weights), keep, first, order)[0]
