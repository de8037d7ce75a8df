"""LOOK-M: text stays first, and what leaves the cache is merged into the nearest key that stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruner import CachePruner, Source, Tokens, register
from vlprune.pruners.snapkv import per_key_head, share_of, with_window
from vlprune.selection import Heads, Merge, Selection, top


def into_nearest(keys: Tensor, kept: Tensor) -> Merge:
    """Every key that leaves joins the most similar one that stays, by cosine; m of them joining u make

        u' = (u + sum_j (k_j + u) / 2) / (1 + m)

    and the values likewise, with the same weights. keys: [Hkv, N, d]. kept: [Hkv, K], ascending.
    """
    (heads, n, width), keep = keys.shape, kept.shape[1]
    stays = torch.zeros(heads, n, dtype=torch.bool, device=keys.device).scatter(1, kept, True)
    leaves = (~stays).to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, : n - keep]
    unit = F.normalize(keys.float(), dim=-1)
    ends = [unit.gather(1, at[..., None].expand(-1, -1, width)) for at in (leaves, kept)]
    slot = (ends[0] @ ends[1].mT).argmax(dim=2)  # [Hkv, N - K]
    joined = unit.new_zeros(heads, keep).scatter_add(1, slot, unit.new_ones(slot.shape))
    own = torch.arange(keep, device=keys.device).expand(heads, -1)
    weight = torch.cat([(1 + joined / 2) / (1 + joined), 0.5 / (1 + joined.gather(1, slot))], 1)
    return Merge(torch.cat([kept, leaves], 1), torch.cat([own, slot], 1), weight)


@register("lookm")
@dataclass(frozen=True)
class LookM(CachePruner):
    """H2O's column sums with text before pictures, and merging in the cache: see `into_nearest`.

    tokens: "visual" leaves all text alone; tokens of a picture merge into others of it. "all" is the authors' form: K of
        all tokens, the last ``window K`` always, then text, then pictures, and pictures merge into text as well.

    Differs: the default is ours, tokens=all agrees with a port to vision-language models, but for its rounding to bfloat16
    and for ties among pictures that subtracting 10000 makes there. In layers with a sliding window, where heads share one
    choice, nothing is merged.
    """

    tokens: Tokens = "visual"
    heads: Literal["each", "shared"] = "each"
    window: float = 0.1

    batched = True
    needs = property(
        lambda self: frozenset({"prompt_attention", "keys"} | ({"is_text"} if self.tokens == "all" else set()))
    )
    source = Source(paper="arXiv:2406.18139", code="EffiVLM-Bench/EffiVLM-Bench@ab3ee18 (port)", fidelity="approximate")

    def __post_init__(self) -> None:
        if not 0 <= self.window <= 1:
            raise SpecError(f"lookm: window={self.window} is a share of K")

    def score(self, ctx: Context) -> Tensor:
        seen = per_key_head(ctx.prompt_attention.float(), len(ctx.keys))
        if self.tokens == "visual":
            return seen
        first = seen + ctx.is_text * (seen.amax(dim=1, keepdim=True) + 1)
        return with_window(first, share_of(ctx.keep, self.window))

    def select(self, ctx: Context) -> Selection:
        scores = self.score(ctx)
        total = scores.sum(dim=0)
        shared = top(total, ctx.keep)
        own = top(scores, ctx.keep) if self.heads == "each" else shared.expand(len(scores), -1)
        return Selection(shared, scores=total, heads=Heads(own, into_nearest(ctx.keys, own)))
