"""top_k in one launch: a row stays in registers, and the K-th largest of its scores is found bit by bit.

A float32 read as an integer, with the lower bits of negative ones turned around, has the order of the numbers. Counting
how many scores reach a threshold settles two bits of the K-th largest at a time; sixteen counts settle it. What is above
it is kept, of what equals it the earliest, and one running count says where each kept index goes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels.dispatch import opaque, power_of_two
from vlprune.kernels.plan import Buffer, Launch, Plan, Slot, planned

LANES = 8  # scores a thread holds, where a row is short enough


@triton.jit
def pick_top(x, out, N, K, xb, xn, BLOCK_N: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_N)
    score = tl.load(x + b * xb + i * xn, mask=i < N, other=float("-inf")).to(tl.float32)
    score = tl.where(score == score, score, float("-inf"))
    score = tl.where(score == 0, 0.0, score)  # -0 and 0 are a tie
    bits = score.to(tl.int32, bitcast=True)
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    rank = tl.where(i < N, rank, -0x80000000)  # below -inf

    one = tl.full([], 1, tl.int64)
    half = one << 31
    found = one - 1  # the K-th largest rank, as far as it is settled, plus 2^31
    for step in range(16):
        part = one << (30 - 2 * step)
        tally = (rank >= (found + part - half).to(tl.int32)).to(tl.int64)
        tally += (rank >= (found + 2 * part - half).to(tl.int32)).to(tl.int64) << 21
        tally += (rank >= (found + 3 * part - half).to(tl.int32)).to(tl.int64) << 42
        reached = tl.sum(tally, axis=0)  # three counts in one
        digit = ((reached & 0x1FFFFF) >= K).to(tl.int64)
        digit += (((reached >> 21) & 0x1FFFFF) >= K).to(tl.int64)
        digit += ((reached >> 42) >= K).to(tl.int64)
        found += digit * part
    least = (found - half).to(tl.int32)

    above = rank > least
    level = rank == least
    seen = tl.cumsum(above.to(tl.int64) + (level.to(tl.int64) << 32), axis=0)
    higher = seen & 0xFFFFFFFF
    equal = seen >> 32
    wanted = K - tl.sum(above.to(tl.int32), axis=0)
    place = higher + tl.minimum(equal, wanted) - 1
    tl.store(out + b * K + place, i.to(tl.int64), mask=above | (level & (equal <= wanted)))


@planned
def _plan(inputs, keep: int) -> Plan:
    (x,) = inputs
    b, n = x.shape
    found = Buffer((b, keep), torch.int64)
    if not b:
        return Plan((found,), ())
    block = power_of_two(n, 32)
    pick = Launch(
        pick_top, (b,), Slot(0), Slot(1), n, keep, *x.stride(), BLOCK_N=block,
        num_warps=power_of_two(block // (32 * LANES), 1, 32),
    )  # fmt: skip
    return Plan((found,), (pick,))


def _fake(x: Tensor, keep: int) -> Tensor:
    return x.new_empty(x.shape[0], keep, dtype=torch.int64)


@opaque("top_k", _fake)
def top_k(x: Tensor, keep: int) -> Tensor:
    """[B, N] -> [B, K]."""
    return _plan((x,), keep)[0]
