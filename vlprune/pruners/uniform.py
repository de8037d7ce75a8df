"""Uniform: K tokens spread evenly over the picture. The row that shows what content-blind coverage is worth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from vlprune.context import Context, Grid
from vlprune.pruner import Pruner, Source, register
from vlprune.selection import Selection


@register("uniform")
@dataclass(frozen=True)
class Uniform(Pruner):
    """A regular lattice of K tokens; it depends on the grids and on K alone.

    Every frame of every grid gets ``floor(K b / N + 1/2) - floor(K a / N + 1/2)`` tokens, with a..b the range of its
    tokens among all N. Inside a frame of H x W that gets k tokens, ``r = sqrt(k H / W)`` rows, rounded to what fits,
    lie at ``floor((i + 1/2) H / r)``; the k tokens are dealt out evenly to these rows and lie in each of them at
    ``floor((j + 1/2) W / c)``.

    Where the grids do not describe the tokens one to one (after an earlier stage has removed some), the choice is
    ``floor((i + 1/2) N / K)`` in reading order.
    """

    stage = "projector"
    needs = frozenset({"grids", "index"})
    source = Source(fidelity="exact")

    def select(self, ctx: Context) -> Selection:
        n = ctx.tokens
        lattice = sum(g.tokens for g in ctx.grids) == n
        kept = [i for g in _frames(ctx.grids, n, ctx.keep) for i in g] if lattice else list(_spread(n, ctx.keep))
        return Selection(torch.tensor(kept).to(ctx.device, non_blocking=True))

    def select_many(self, contexts: Sequence[Context]) -> list[Selection]:
        return [self.select(contexts[0])] * len(contexts)  # equal grids, equal tokens


def _frames(grids: tuple[Grid, ...], n: int, keep: int) -> Iterator[list[int]]:
    """Kept token numbers of each frame; the shares of all frames sum to `keep` and none exceeds its frame."""
    start = 0
    for grid in grids:
        cells = grid.height * grid.width
        for _ in range(grid.frames):
            share = _edge(start + cells, n, keep) - _edge(start, n, keep)
            yield [start + i for i in _lattice(grid.height, grid.width, share)]
            start += cells


def _edge(token: int, n: int, keep: int) -> int:
    return (2 * token * keep + n) // (2 * n)


def _lattice(height: int, width: int, k: int) -> Iterator[int]:
    if k == 0:
        return
    rows = min(max(round(math.sqrt(k * height / width)), math.ceil(k / width), 1), height, k)
    for i, row in enumerate(_spread(height, rows)):
        in_row = (i + 1) * k // rows - i * k // rows
        yield from (row * width + column for column in _spread(width, in_row))


def _spread(n: int, k: int) -> Iterator[int]:
    """``floor((i + 1/2) n / k)`` for i in 0..k-1: k distinct numbers below n."""
    return ((2 * i + 1) * n // (2 * k) for i in range(k))
