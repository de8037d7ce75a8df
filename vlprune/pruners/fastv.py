"""FastV: keep the visual tokens that the last prompt token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlprune.context import Context
from vlprune.pruner import Scorer, Source, register


@register("fastv")
@dataclass(frozen=True)
class FastV(Scorer):
    """``s_i = mean_h A[h, last, i]`` with A the attention of decoder layer ``stage - 1``, which has just run.

    query="text" averages the rows of all text tokens after the picture instead: the paper's wording ("attention
    received"), restricted to the rows that ask the question. The authors' code uses the last token alone.
    """

    query: Literal["last", "text"] = "last"

    stage = "2"
    batched = True
    needs = property(lambda self: frozenset({"last_attention" if self.query == "last" else "text_attention"}))
    source = Source(paper="arXiv:2403.06764", code="pkunlp-icler/FastV", fidelity="exact")

    def score(self, ctx: Context) -> Tensor:
        if self.query == "text":
            return ctx.text_attention.float().mean(dim=(0, 1))  # [M, H, N] -> [N]
        return ctx.last_attention.float().mean(dim=0)  # [H, N] -> [N]
