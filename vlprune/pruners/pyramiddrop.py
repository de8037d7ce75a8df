"""PyramidDrop: one step of the pyramid, ranked by the layer that comes next."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlprune.context import Context
from vlprune.pruner import Scorer, Source, register


@register("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(Scorer):
    """``s_i = mean_h softmax_j(q_h . k_hj / sqrt d)_i`` over the whole prompt, by the stage's own projections.

    q is the last prompt token's query and k all keys, both after RoPE. The pyramid is several steps of one plan, their
    shares those of the original count:

        pyramiddrop@8:keep=0.5+pyramiddrop@16:keep=0.25+pyramiddrop@24:keep=0.125

    is the authors' schedule for 32 layers. Differs: a budget rounds half up where theirs truncates; what is left keeps
    its positions where they number it anew; sequences are not cut to the tokenizer's maximal length after a step.
    """

    stage = "8"
    batched = True
    needs = frozenset({"next_attention"})
    source = Source(paper="arXiv:2410.17247", code="Cooperx521/PyramidDrop@6444f30", licence="MIT")

    def score(self, ctx: Context) -> Tensor:
        return ctx.next_attention.float().mean(dim=0)  # [H, N] -> [N]
