"""H2O: keep the heavy hitters, the cached keys that the whole prompt has attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruner import CachePruner, Source, Tokens, register
from vlprune.pruners.snapkv import per_key_head, share_of, with_window


@register("h2o")
@dataclass(frozen=True)
class H2O(CachePruner):
    """``s_v = sum_h sum_t A[h, t, v]`` over all rows t of the prompt, layer by layer in the cache.

    A is the causal attention of the layer itself, h the query heads of one key head; every key head keeps its own K. A
    sum over causal rows favours early tokens, which are in more rows. It costs all rows of the map, a few at a time.

    tokens: "visual" leaves all text. "all" is the method as published: K of all tokens, among them always the last
        ``window K``, rounded down, at least 1.

    Differs: the choice is made once, behind the prefill; the authors go on replacing tokens while they decode.
    """

    tokens: Tokens = "visual"
    heads: Literal["each", "shared"] = "each"
    window: float = 0.1

    batched = True
    needs = frozenset({"prompt_attention", "keys"})
    source = Source(paper="arXiv:2306.14048", code="EffiVLM-Bench/EffiVLM-Bench@ab3ee18 (port)", fidelity="approximate")

    def __post_init__(self) -> None:
        if not 0 <= self.window <= 1:
            raise SpecError(f"h2o: window={self.window} is a share of K")

    def score(self, ctx: Context) -> Tensor:
        seen = per_key_head(ctx.prompt_attention.float(), len(ctx.keys))
        return with_window(seen, share_of(ctx.keep, self.window)) if self.tokens == "all" else seen
