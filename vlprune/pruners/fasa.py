"""FASA: a few of the frequencies that positions rotate by tell which keys a head is going to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruner import DecodePruner, Source, register
from vlprune.pruners.snapkv import per_key_head
from vlprune.selection import Heads, Selection, top

Pairing = Literal["rope", "adjacent"]
Chunks = dict[int | None, Tensor]  # layer -> [H, c] its dominant chunks


def chunks_of(x: Tensor, pairing: Pairing) -> Tensor:
    """[..., d] as [..., d / 2, 2]: the two dimensions that one frequency rotates.

    "rope" pairs i with i + d / 2, as the models of transformers do; "adjacent" pairs 2 i with 2 i + 1.
    """
    return x.unflatten(-1, (2, -1)).transpose(-1, -2) if pairing == "rope" else x.unflatten(-1, (-1, 2))


def agreement(query: Tensor, keys: Tensor, keep: int, pairing: Pairing) -> Tensor:
    """How well each chunk i alone ranks the keys: ``CA_i = |top_K(q . k) and top_K(q_i . k_i)| / K``.

    query: [H, d]. keys: [Hkv, N, d]. Returns [H, d / 2].
    """
    keys = keys.float().repeat_interleave(len(query) // len(keys), 0)
    parts = (chunks_of(query.float(), pairing)[:, None] * chunks_of(keys, pairing)).sum(dim=-1)  # [H, N, d / 2]
    best = torch.zeros_like(parts[..., 0], dtype=torch.bool).scatter(1, top(parts.sum(dim=-1), keep), True)
    alone = top(parts.mT, keep)  # [H, d / 2, K]
    return best[:, None].expand(-1, alone.shape[1], -1).gather(2, alone).float().mean(dim=2)


@register("fasa")
@dataclass(frozen=True)
class Fasa(DecodePruner):
    """Every layer but the first chooses before it attends, from the dimensions of its query that matter most:

        s_v = sum_h sum_{c in dominant chunks of h} q_hc . k_vc

    summed over the query heads h of one key head, which keeps its own K tokens; text is always read. Dominant are the
    `share` of chunks, of two rotated dimensions each, that rank the picture's tokens most like the whole head does: see
    `agreement`. They are found at the first decode step of every answer, layer by layer, and stay.

    pairing: what makes a chunk, see `chunks_of`. "adjacent" is the released code, whose pairs are not those that
        transformers' models rotate.
    dense_layers: first layers that read everything.

    Differs: the authors find the chunks once per model, on calibration text, and let every query head choose among all
    tokens of the cache. There is no speed to gain where N is small: all K's keys are gathered by head.
    """

    share: float = 0.25
    pairing: Pairing = "rope"
    dense_layers: int = 1

    reads = "own"
    needs = frozenset({"last_query", "keys"})
    source = Source(
        paper="arXiv:2602.03152", code="AMAP-ML/FASA-ICLR2026@215dbe2", licence="Apache-2.0", fidelity="approximate"
    )

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.dense_layers < 0:
            raise SpecError(
                f"fasa: share={self.share} lies in (0, 1] and dense_layers={self.dense_layers} is at least 0"
            )

    def focal(self, layers: int) -> tuple[int, ...]:
        return tuple(range(self.dense_layers, layers))

    def start(self, ctx: Context) -> Chunks:
        return {}

    def step(self, ctx: Context, state: Chunks) -> tuple[Selection, Chunks]:
        if ctx.layer not in state:
            state = {**state, ctx.layer: self.dominant(ctx)}
        scores = self.scores(ctx, state[ctx.layer])
        total = scores.sum(dim=0)
        return Selection(top(total, ctx.keep), scores=total, heads=Heads(top(scores, ctx.keep))), state

    def dominant(self, ctx: Context) -> Tensor:
        """[H, c] chunks, the best first; ties go to the lower frequency's number."""
        found = agreement(ctx.last_query, ctx.keys, ctx.keep, self.pairing)
        count = max(1, int(found.shape[1] * self.share + 0.5))
        return found.sort(dim=1, descending=True, stable=True).indices[:, :count]

    def scores(self, ctx: Context, dominant: Tensor) -> Tensor:
        """[Hkv, N]"""
        heads, n = len(dominant), ctx.keys.shape[1]
        group = heads // len(ctx.keys)
        keys = chunks_of(ctx.keys.float(), self.pairing).repeat_interleave(group, 0)  # [H, N, d / 2, 2]
        query = chunks_of(ctx.last_query.float(), self.pairing)
        k = keys.gather(2, dominant[:, None, :, None].expand(-1, n, -1, 2)).flatten(2)
        q = query.gather(1, dominant[..., None].expand(-1, -1, 2)).flatten(1)
        return per_key_head((k @ q[..., None])[..., 0], len(ctx.keys))
