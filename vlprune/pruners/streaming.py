"""StreamingLLM: keep the first and the last cached keys. What content-blind eviction is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruner import CachePruner, Source, Tokens, register
from vlprune.pruners.snapkv import share_of
from vlprune.selection import Selection


@register("streaming")
@dataclass(frozen=True)
class Streaming(CachePruner):
    """The first K - w and the last w tokens, in every layer and head alike; ``w = window K``, rounded down, at least 1.

    tokens: "visual" leaves all text and applies the rule to the tokens of a picture, of which it shows the top and the
        end of the last row. "all" applies it to the prompt, as the authors do.

    Differs: the authors keep four first tokens and let the window slide while they decode; this is the form that ports
    for vision-language models compare with, made once behind the prefill.
    """

    tokens: Tokens = "visual"
    window: float = 0.1

    needs = frozenset({"keys"})
    source = Source(paper="arXiv:2309.17453", code="EffiVLM-Bench/EffiVLM-Bench@ab3ee18 (port)", fidelity="approximate")

    def __post_init__(self) -> None:
        if not 0 <= self.window <= 1:
            raise SpecError(f"streaming: window={self.window} is a share of K")

    def select(self, ctx: Context) -> Selection:
        n, last = ctx.tokens, share_of(ctx.keep, self.window)
        kept = torch.arange(ctx.keep, device=ctx.device)
        return Selection(torch.where(kept < ctx.keep - last, kept, kept + n - ctx.keep))

    def select_many(self, contexts: Sequence[Context]) -> list[Selection]:
        return [self.select(contexts[0])] * len(contexts)
