"""token_entropy in two launches, in float64 unless float32 is asked for.

Launch 1, one program per token: the centred H x H Gram matrix, made tridiagonal by Householder reflections.
Launch 2, one eigenvalue per lane: bisection with Sturm counts. No iteration depends on the data, and nothing is sorted.
The Gram matrix always accumulates in float64, because it is centred after the products are summed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels.dispatch import cdiv, opaque, power_of_two
from vlprune.kernels.plan import Buffer, Launch, Plan, Slot, planned
from vlprune.kernels.token_entropy.reference import FLOOR, WIDTH

TOKENS, WARPS = 4, 4  # tokens of one program of launch 2, its warps
REFLECT = 1  # warps of launch 1
STEPS = 44  # halvings of [0, trace]: eigenvalues to 6e-14 of the trace; half as many in float32


@triton.jit
def tridiagonal(
    q, diagonal, off, N, H, width, group, qb, qh, qn, qd, BLOCK_H: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Diagonal and squared off-diagonal, [tokens, BLOCK_H] each, of one token's Gram matrix, padded with zeros."""
    token = tl.program_id(0).to(tl.int64)
    base = q + (token // N) * qb + (token % N) * qn
    row = tl.arange(0, BLOCK_H)[:, None]
    col = tl.arange(0, BLOCK_H)[None, :]
    down, across = base + row * qh, base + col * qh
    gram = tl.zeros([BLOCK_H, BLOCK_H], tl.float64)
    for k in range(width):
        x = tl.load(down + k * group * qd, mask=row < H, other=0.0).to(tl.float32).to(tl.float64)
        y = tl.load(across + k * group * qd, mask=col < H, other=0.0).to(tl.float32).to(tl.float64)
        for part in range(1, group):
            x += tl.load(down + (k * group + part) * qd, mask=row < H, other=0.0).to(tl.float32).to(tl.float64)
            y += tl.load(across + (k * group + part) * qd, mask=col < H, other=0.0).to(tl.float32).to(tl.float64)
        gram += x * y
    gram /= H * group * group
    means = tl.sum(gram, axis=0) / H  # the Gram matrix is symmetric: these are the row means too
    gram = gram - means[None, :] - means[:, None] + tl.sum(means, axis=0) / H
    a = tl.where((row < H) & (col < H), gram, 0.0).to(WIDE)

    lane = tl.arange(0, BLOCK_H)
    main = tl.zeros([BLOCK_H], WIDE)
    beside = tl.zeros([BLOCK_H], WIDE)
    for k in range(BLOCK_H - 1):
        column = tl.sum(tl.where(row == k, a, 0.0), axis=0)
        main = tl.where(lane == k, column, main)
        x = tl.where(lane > k, column, 0.0)
        square = tl.sum(x * x, axis=0)
        first = tl.sum(tl.where(lane == k + 1, x, 0.0), axis=0)
        length = tl.where(first > 0, -tl.sqrt(square), tl.sqrt(square))  # away from `first`: no cancellation
        beside = tl.where(lane == k, square, beside)
        scale = square - length * first
        v = tl.where(lane == k + 1, x - length, x)
        v = tl.where(scale > 0, v / tl.sqrt(tl.where(scale > 0, scale, 1.0)), 0.0)  # I - v v^T reflects x onto k + 1
        p = tl.sum(a * v[:, None], axis=0)
        w = p - 0.5 * tl.sum(p * v, axis=0) * v
        a -= v[:, None] * w[None, :] + w[:, None] * v[None, :]
    last = tl.sum(tl.where(row == BLOCK_H - 1, a, 0.0), axis=0)
    main = tl.where(lane == BLOCK_H - 1, last, main)
    tl.store(diagonal + token * BLOCK_H + lane, main)
    tl.store(off + token * BLOCK_H + lane, beside)


@triton.jit
def bisect(
    diagonal, off, out, tokens, H,
    FLOOR: tl.constexpr, TRACE: tl.constexpr, STEPS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Entropy of TOKENS tokens. A floating-point argument would arrive in float32, hence FLOOR and the log of H."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    lane = tl.arange(0, BLOCK_H)[None, :]
    exists = token < tokens
    main = tl.load(diagonal + token * BLOCK_H + lane, mask=exists, other=0.0)
    trace = tl.sum(main, axis=1)[:, None]
    high = tl.maximum(trace, 0.0) + tl.zeros_like(main)  # no eigenvalue of a Gram matrix exceeds its trace
    low = tl.zeros_like(main)
    for _ in range(STEPS):
        middle = 0.5 * (low + high)
        below = tl.zeros([TOKENS, BLOCK_H], tl.int32)
        beside = tl.zeros([TOKENS, 1], main.dtype)
        pivot = tl.full([TOKENS, BLOCK_H], 1.0, main.dtype)
        for i in range(BLOCK_H):
            here = tl.load(diagonal + token * BLOCK_H + i, mask=exists, other=0.0)
            pivot = here - middle - beside / pivot
            pivot = tl.where(pivot == 0, -1e-30, pivot)
            below += (pivot < 0).to(tl.int32)
            beside = tl.load(off + token * BLOCK_H + i, mask=exists, other=0.0)
        above = below <= lane  # eigenvalue `lane`, counted from the smallest, lies at or above the middle
        low = tl.where(above, middle, low)
        high = tl.where(above, high, middle)
    value = 0.5 * (low + high)
    if TRACE:
        value = value / tl.maximum(trace, FLOOR)
    value = tl.maximum(value, FLOOR)
    one = tl.full([TOKENS, 1], 1.0, main.dtype)
    padded = (BLOCK_H - H) * FLOOR * tl.log(one * FLOOR)  # heads that are not there have eigenvalue 0
    entropy = (padded - tl.sum(value * tl.log(value), axis=1)[:, None]) / tl.log(one * H)
    tl.store(out + token, entropy, mask=exists)


@planned
def _plan(inputs, trace: bool, dtype: torch.dtype) -> Plan:
    (x,) = inputs
    b, h, n, d = x.shape
    out = Buffer((b, n), dtype)
    if not b * n:
        return Plan((out,), ())
    block = power_of_two(h)
    group = d // WIDTH if d > WIDTH and d % WIDTH == 0 else 1
    double = dtype == torch.float64
    reflect = Launch(
        tridiagonal, (b * n,), Slot(0), Slot(2), Slot(3), n, h, d // group, group, *x.stride(), BLOCK_H=block,
        WIDE=tl.float64 if double else tl.float32, num_warps=REFLECT if block <= 32 else 4,
    )  # fmt: skip
    halve = Launch(
        bisect, (cdiv(b * n, TOKENS),), Slot(2), Slot(3), Slot(1), b * n, h, FLOOR=FLOOR, TRACE=trace,
        STEPS=STEPS if double else STEPS // 2, TOKENS=TOKENS, BLOCK_H=block, num_warps=WARPS,
    )  # fmt: skip
    matrix = Buffer((b * n, block), dtype)
    return Plan((out, matrix, matrix), (reflect, halve))


def _fake(x: Tensor, trace: bool, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], dtype=dtype)


@opaque("token_entropy", _fake)
def _launch(x: Tensor, trace: bool, dtype: torch.dtype) -> Tensor:
    return _plan((x,), trace, dtype)[0]


def token_entropy(x: Tensor, normalize: str, dtype: torch.dtype) -> Tensor:
    return _launch(x, normalize == "trace", dtype)
