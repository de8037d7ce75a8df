"""greedy_dpp: the cosine matrix of max_min, then all K picks in one program per item.

Pick t reads t earlier factor rows, so one item moves about K^2 N / 2 floats through one multiprocessor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels.dispatch import opaque, power_of_two
from vlprune.kernels.greedy_dpp.reference import EXHAUSTED
from vlprune.kernels.max_min.triton import cosine_matrix
from vlprune.kernels.plan import Buffer, Launch, Plan, Slot, planned

STEP = 4  # factor rows subtracted at a time
LANES = 8  # tokens a thread holds


@triton.jit
def pick_all(
    matrix, relevance, factors, out, N, K, mb, mi, mj, rb, rn, exhausted,
    RELEVANCE: tl.constexpr, ORDER: tl.constexpr, STEP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All picks of one item. factors: [B, K, N] scratch; a row is written once, then read by the whole program."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_N)
    inside = i < N
    matrix += b * mb
    factors += b * K * N
    own = tl.full([BLOCK_N], 1.0, tl.float32)
    if RELEVANCE:
        own = tl.load(relevance + b * rb + i * rn, mask=inside, other=0.0).to(tl.float32)
    diagonal = tl.load(matrix + i.to(tl.int64) * (mi + mj), mask=inside, other=0.0).to(tl.float32) * own * own
    left = diagonal
    turn = tl.full([BLOCK_N], -1, tl.int32)  # at which pick a token was taken
    step = tl.arange(0, STEP)
    for t in range(K):
        free = inside & (turn < 0)
        gain = tl.where(free, tl.where(left > exhausted * diagonal, left, 0.0), float("-inf"))
        best = tl.max(gain, axis=0)
        spent = best <= 0
        pick = tl.argmax(tl.where(spent, tl.where(free, diagonal, float("-inf")), gain), axis=0)
        pick = tl.minimum(pick, N - 1).to(tl.int64)
        turn = tl.where(i == pick, t, turn)
        row = tl.load(matrix + pick * mi + i.to(tl.int64) * mj, mask=inside, other=0.0).to(tl.float32) * own
        if RELEVANCE:
            row *= tl.load(relevance + b * rb + pick * rn).to(tl.float32)
        for s in range(0, t, STEP):
            known = s + step < t
            here = tl.load(factors + (s + step) * N + pick, mask=known, other=0.0)
            rows = tl.load(
                factors + (s + step)[:, None] * N + i[None, :],
                mask=known[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            row -= tl.sum(rows * here[:, None], axis=0)
        row = tl.where(spent, 0.0, row / tl.sqrt(tl.where(spent, 1.0, best)))
        tl.store(factors + t * N + i, row, mask=inside)
        left -= row * row
        tl.debug_barrier()  # the next pick reads single entries of this row from other threads
    place = turn if ORDER else tl.cumsum((turn >= 0).to(tl.int32), axis=0) - 1
    tl.store(out + b * K + place, i.to(tl.int64), mask=turn >= 0)


@planned
def _plan(inputs, keep: int, order: bool) -> Plan:
    x, relevance = inputs
    b, n, _ = x.shape
    picks, factors = Buffer((b, keep), torch.int64), Buffer((b, keep, n), torch.float32)
    if not b:
        return Plan((picks,), ())
    buffers, launches, matrix, strides = (), (), Slot(0), x.stride()
    if relevance is not None:
        matrix, strides = Slot(4), (n * n, n, 1)
        buffers, launches = cosine_matrix(x, (Slot(0), *(Slot(which) for which in range(4, 9))), best=False)
    block = power_of_two(n)
    choose = Launch(
        pick_all, (b,), matrix, matrix if relevance is None else Slot(1), Slot(3), Slot(2), n, keep, *strides,
        *((0, 0) if relevance is None else relevance.stride()), EXHAUSTED, RELEVANCE=relevance is not None,
        ORDER=order, STEP=STEP, BLOCK_N=block, num_warps=power_of_two(block // (32 * LANES), 4, 16),
    )  # fmt: skip
    return Plan((picks, factors, *buffers), (*launches, choose))


def _fake(x: Tensor, keep: int, relevance: Tensor | None, order: bool) -> Tensor:
    return x.new_empty(x.shape[0], keep, dtype=torch.int64)


@opaque("greedy_dpp", _fake)
def greedy_dpp(x: Tensor, keep: int, relevance: Tensor | None, order: bool) -> Tensor:
    """[B, N, D] with relevance, or a kernel [B, N, N] -> [B, K]."""
    return _plan((x, relevance), keep, order)[0]
