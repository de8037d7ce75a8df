"""max_min in four launches: norms, the cosine matrix on the matrix units, nearest neighbours, and all K picks.

The picks are sequential, and each depends on the whole of one row of distances. Reading that row from a finished matrix
(33 MB at N = 2880) costs a microsecond; making it from the features each time would cost several.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels.dispatch import cdiv, interpreted, on_device, opaque, power_of_two

SMALL = (64, 128, 4, 3)  # side and depth of a tile of the matrix, warps, tiles in flight; for N <= 1024
LARGE = (128, 64, 8, 3)
SMALL_FLOAT32 = (64, 64, 4, 3)
LARGE_FLOAT32 = (64, 32, 4, 3)
LANES = 8  # tokens a thread of `pick_all` holds


@triton.jit
def inverse_norms(x, out, N, D, xb, xn, xd, BLOCK_D: tl.constexpr):
    """1 / |x_n|, and 0 for a row of zeros."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        dim = start + tl.arange(0, BLOCK_D)
        part = tl.load(x + (row // N) * xb + (row % N) * xn + dim * xd, mask=dim < D, other=0.0).to(tl.float32)
        total += part * part
    norm = tl.sqrt(tl.sum(total, axis=0))
    tl.store(out + row, tl.where(norm > 0, 1.0 / tl.maximum(norm, 1e-12), 0.0))


@triton.jit
def cosine_tiles(
    x, norms, out, N, D, xb, xn, xd,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One BLOCK x BLOCK tile on or above the diagonal of [N, N], stored on both sides of it."""
    across = tl.program_id(0)
    down = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    if down <= across:
        i = (down * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        j = (across * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        tile = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(0, D, BLOCK_D):
            dim = start + tl.arange(0, BLOCK_D)
            left = tl.load(
                x + b * xb + i[:, None] * xn + dim[None, :] * xd, mask=(i < N)[:, None] & (dim < D)[None, :], other=0.0
            )
            right = tl.load(
                x + b * xb + j[None, :] * xn + dim[:, None] * xd, mask=(j < N)[None, :] & (dim < D)[:, None], other=0.0
            )
            if UPCAST:
                left = left.to(tl.float32)
                right = right.to(tl.float32)
            tile = tl.dot(left, right, tile, input_precision=PRECISION)
        tile *= tl.load(norms + b * N + i, mask=i < N, other=0.0)[:, None]
        tile *= tl.load(norms + b * N + j, mask=j < N, other=0.0)[None, :]
        inside = (i < N)[:, None] & (j < N)[None, :]
        tl.store(out + (b * N + i[:, None]) * N + j[None, :], tile, mask=inside)
        if down < across:
            tl.store(out + (b * N + j[:, None]) * N + i[None, :], tl.trans(tile), mask=tl.trans(inside))


@triton.jit
def nearest_distances(cosines, out, N, BLOCK: tl.constexpr):
    """1 - the largest cosine of row n to another row."""
    row = tl.program_id(0).to(tl.int64)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        other = (j < N) & (j != row % N)
        best = tl.maximum(best, tl.load(cosines + row * N + j, mask=other, other=float("-inf")))
    tl.store(out + row, 1 - tl.max(best, axis=0))


@triton.jit
def pick_all(
    cosines, nearest, weights, out, N, K, wb, wn,
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
        score = weight * tl.load(nearest + b * N + i, mask=inside, other=0.0)
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


def cosine_matrix(x: Tensor) -> Tensor:
    """[B, N, D] -> [B, N, N] float32."""
    b, n, d = x.shape
    norms = torch.empty(b, n, dtype=torch.float32, device=x.device)
    out = torch.empty(b, n, n, dtype=torch.float32, device=x.device)
    wide = interpreted() or x.dtype == torch.float32
    small, large = (SMALL_FLOAT32, LARGE_FLOAT32) if wide else (SMALL, LARGE)
    block, block_d, warps, stages = small if n <= 1024 else large
    block_d = power_of_two(d, 16, block_d)
    with on_device(x):
        inverse_norms[b * n,](x, norms, n, d, *x.stride(), BLOCK_D=power_of_two(d, 1, 1024))
        tiles = cdiv(n, block)
        cosine_tiles[tiles, tiles, b](
            x, norms, out, n, d, *x.stride(), UPCAST=wide, PRECISION="ieee" if interpreted() else "tf32x3",
            BLOCK=block, BLOCK_D=block_d, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


def _fake(x: Tensor, keep: int, weights: Tensor | None, first: str, order: bool) -> Tensor:
    return x.new_empty(x.shape[0], keep, dtype=torch.int64)


@opaque("max_min", _fake)
def max_min(x: Tensor, keep: int, weights: Tensor | None, first: str, order: bool) -> Tensor:
    """[B, N, D] -> [B, K]."""
    b, n, _ = x.shape
    out = torch.empty(b, keep, dtype=torch.int64, device=x.device)
    if not b:
        return out
    cosines = cosine_matrix(x)
    nearest = torch.empty(b, n, dtype=torch.float32, device=x.device) if first == "official" else cosines
    block = power_of_two(n)
    warps = power_of_two(block // (32 * LANES), 4, 16)
    with on_device(x):
        if first == "official":
            nearest_distances[b * n,](cosines, nearest, n, BLOCK=power_of_two(n, 1, 1024))
        pick_all[b,](
            cosines, nearest, cosines if weights is None else weights, out, n, keep,
            *((0, 0) if weights is None else weights.stride()), OFFICIAL=first == "official",
            WEIGHTED=weights is not None, ORDER=order, BLOCK_N=block, num_warps=warps,
        )  # fmt: skip
    return out
