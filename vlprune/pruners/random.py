"""Random: K distinct tokens drawn uniformly. The row every table of pruners must contain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlprune.context import Context
from vlprune.errors import PruningError
from vlprune.pruner import Pruner, Source, register
from vlprune.selection import Selection


@register("random")
@dataclass(frozen=True)
class Random(Pruner):
    """K of N tokens, uniformly without replacement; the same draw for every picture of N tokens with the same seed."""

    seed: int = 0

    stage = "projector"
    needs = frozenset({"generator"})
    source = Source(fidelity="exact")

    def select(self, ctx: Context) -> Selection:
        if ctx.generator is None:
            raise PruningError("random needs Context.generator")
        g = ctx.generator.manual_seed(self.seed)
        order = torch.randperm(ctx.tokens, generator=g)  # on the CPU: the same tokens on every device
        return Selection(order[: ctx.keep].sort().values.to(ctx.device, non_blocking=True))

    def select_many(self, contexts: Sequence[Context]) -> list[Selection]:
        return [self.select(contexts[0])] * len(contexts)
