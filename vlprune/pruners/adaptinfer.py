"""AdaptInfer: text rows vote on visual tokens, each with the attention it exchanges with the other text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.context import Context
from vlprune.pruner import Scorer, Source, register


def votes(text_to_text: Tensor) -> Tensor:
    """Row sum plus column sum minus diagonal of every head's text-to-text attention: [M, H, M] -> [M, H]."""
    t2t = text_to_text.float()
    return t2t.sum(dim=2) + t2t.sum(dim=0).T - torch.diagonal(t2t, dim1=0, dim2=2).T


@register("adaptinfer")
@dataclass(frozen=True)
class AdaptInfer(Scorer):
    """``s_i = sum_h sum_t w[h, t] A[h, t, i]`` with A of the layer that has just run, t the text after the picture.

        Sym_h = A_h + A_h^T - diag(A_h) on the text-to-text block;    w[h, t] = sum_u Sym_h[t, u]

    The authors cut behind layers 1, 10 and 20 of 32, which are the stages 2, 11 and 21, with 133, 27 and 3 tokens for
    their average of 64 (290, 72, 18 for 128). `vlprune.calibrate.shift_layers` finds such layers from a record.

    Differs: sums in float32, the released LLaVA code softmaxes in float16; its clamp of a step to one token fewer than
    there are is the plan's business.
    """

    stage = "2"
    batched = True
    needs = frozenset({"text_attention", "text_self_attention"})
    source = Source(paper="arXiv:2508.06084", code="weiczh02/AdaptInfer-base@9dac67c", licence="Apache-2.0")

    def score(self, ctx: Context) -> Tensor:
        return torch.einsum("mh,mhn->n", votes(ctx.text_self_attention), ctx.text_attention.float())
