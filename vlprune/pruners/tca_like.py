"""TCA-like: runs of the cache whose keys say much the same get few places, the others more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruner import CachePruner, Source, register
from vlprune.pruners.snapkv import per_key_head


@register("tca_like")
@dataclass(frozen=True)
class TCALike(CachePruner):
    """Blocks are runs of b tokens, k a token's key in one key head, a what the prompt's last token pays to it.

        rho_B = mean_{i in B} cos(k_i, mean of k over B)        score_i = (1 - rho_B + eps) / (rank of a_i in B + 1/2)

    with ranks from 0. The K best of a key head are then a division of its K places among the blocks by highest
    averages, each block's claim being how little its keys agree, and in a block the most attended tokens take them.

    block: b. The last block is shorter where b does not divide N.

    Ours, after the abstract of TCA-Attention and a review of it: the paper has no public code, and its redundancy
    measure is not known to us. Its other half is missing here: it picks for every head, offline, how many tokens blocks
    may keep, but a cache stores equally many rows for all heads of a layer, so all heads keep K.
    """

    heads: Literal["each", "shared"] = "each"
    block: int = 16

    batched = True
    needs = frozenset({"keys", "last_attention"})
    source = Source(paper="arXiv:2512.09238", fidelity="idea")

    def __post_init__(self) -> None:
        if self.block < 1:
            raise SpecError(f"tca_like: block={self.block} is a number of tokens, at least 1")

    def score(self, ctx: Context) -> Tensor:
        attention = per_key_head(ctx.last_attention.float(), len(ctx.keys))  # [Hkv, N]
        keys = F.normalize(ctx.keys.float(), dim=-1)
        parts = zip(keys.split(self.block, dim=1), attention.split(self.block, dim=1), strict=True)
        return torch.cat([claims(k, a) for k, a in parts], dim=1)


def claims(keys: Tensor, attention: Tensor) -> Tensor:
    """Scores of one block, [Hkv, b], from its keys of unit length [Hkv, b, d] and the attention paid to them [Hkv, b]."""
    centre = F.normalize(keys.mean(dim=1, keepdim=True), dim=-1)
    spread = 1 - (keys * centre).sum(dim=-1).mean(dim=1, keepdim=True)  # [Hkv, 1]
    rank = attention.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (spread.clamp(min=0) + 1e-3) / (rank + 0.5)
