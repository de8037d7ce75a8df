"""FlowCut: drop patches step by step inside the vision tower, by what CLS takes from them over the layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruner import EncoderPruner, Source, register
from vlprune.selection import Selection, top

FIELDS = {
    "cls": frozenset({"cls_attention", "cls_value", "values"}),
    "mean_query": frozenset({"queries", "keys", "values"}),
}


def strength(values: Tensor) -> Tensor:
    """``m_j = |mean_h v_hj|_1``: [H, n, d] -> [n], float32."""
    return values.float().mean(dim=0).abs().sum(dim=-1)


def flow_score(attention: Tensor, semantic: Tensor, strength: Tensor) -> Tensor:
    """``(a_j / sum a + b_j / sum b) m_j``, all [n]."""
    return (attention / attention.sum() + semantic / semantic.sum()) * strength


def drop(attention: Tensor, keep: int, remaining: int, epsilon: float = 0.0) -> Tensor:
    """How many of n patches to drop now, before rounding (half to even); a 0-dimensional float32 tensor.

        p = a / sum a;   E = -sum p log(p + epsilon);   drop = (n - keep) / sqrt(remaining) (1 - (E / log n)^2)

    Args:
        attention: [n], n > 1; 0 log 0 counts as 0.
        keep: the final count. remaining: layers until it must be reached, at least 1.
        epsilon: 0 for CLIP towers, 1e-7 in the authors' Qwen code.
    """
    p = attention.float() / attention.float().sum()
    entropy = torch.special.entr(p).sum() if epsilon == 0 else -(p * (p + epsilon).log()).sum()
    n = len(p)
    return (n - keep) / math.sqrt(remaining) * (1 - (entropy / math.log(n)) ** 2)


@register("flowcut")
@dataclass(frozen=True)
class FlowCut(EncoderPruner):
    """Patches leave after every second vision layer; the ranking accumulates over all layers.

    With A_h the CLS row of the layer that has just run, v its values, h its heads, over the n patches still there:

        a_j = mean_h A_hj            b_j = mean_h softmax_j(v_cls . v_j)           m_j = |mean_h v_hj|_1
        score_j = (a_j / sum a + b_j / sum b) m_j                cum = score at first, then (cum + score) / 2

    The softmax of b runs over CLS and the patches and is not scaled. After layer l, with r = L - last - l layers to go:
    where r is even, the round(`drop`) patches of lowest cum leave, but never so many that fewer than K stay; where
    r = 0, all but K.

    variant="mean_query" serves towers without CLS: ``a_j = mean_h softmax_j(q_mean . k_j / sqrt d)`` over the patches
    with q_mean the mean query, and score = a m, without the semantic term.
    last: the final cut comes after the `last`-th layer from the tower's end. 3 is the authors' place for towers that
    are read at layer -2; for those that are read at their end it leaves one layer more to the K tokens than needed. The
    authors' Qwen code cuts after the very last layer (1).

    Differs: counts are each picture's own. The authors take the largest drop of a batch for all its pictures, so that
    a result depends on the company; at batch size 1 both are the same. Attention that underflows to 0 counts as
    p log p = 0 where theirs gives NaN. In towers that group patches (Qwen) the n tokens are whole groups, their tensors
    the group's mean; the authors drop single patches there and let the merger pair what is left. An intermediate count
    depends on an entropy, so each pruning layer but the last waits for the device once.
    """

    variant: Literal["cls", "mean_query"] = "cls"
    last: int = 3

    needs = property(lambda self: FIELDS[self.variant])
    source = Source(paper="arXiv:2505.19536", code="TungChintao/FlowCut@a2ecd24", fidelity="exact")

    def __post_init__(self) -> None:
        if self.last < 1:
            raise SpecError(f"flowcut: last={self.last} counts layers from the tower's end, from 1")

    def flow(self, ctx: Context, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention a and accumulated score cum, both [n]."""
        m = strength(ctx.values)
        if self.variant == "cls":
            a = ctx.cls_attention.float().mean(dim=0)
            values = torch.cat([ctx.cls_value[:, None], ctx.values], dim=1).float()  # [H, 1 + n, d]
            b = (values @ values[:, 0, :, None]).squeeze(-1).softmax(dim=-1)[:, 1:].mean(dim=0)
            score = flow_score(a, b, m)
        else:
            q, k = ctx.queries.float().mean(dim=1), ctx.keys.float()  # [H, d], [Hkv, n, d]
            a = mean_attention(q, k)
            score = a * m
        return a, score if state is None else 0.5 * state + 0.5 * score

    def step(self, ctx: Context, state: Tensor | None) -> tuple[Selection | None, Tensor]:
        a, cum = self.flow(ctx, state)
        n, remaining = len(cum), ctx.layers - self.last - ctx.layer
        if n <= ctx.keep or (remaining > 0 and remaining % 2):
            return None, cum
        left = ctx.keep
        if remaining > 0:
            count = drop(a, ctx.keep, remaining, epsilon=0.0 if self.variant == "cls" else 1e-7)
            left = max(n - round(count.item()), ctx.keep)
        if left == n:
            return None, cum
        kept = top(cum, left)
        return Selection(kept, scores=cum), cum[kept]


def mean_attention(query: Tensor, keys: Tensor) -> Tensor:
    """``mean_h softmax_j(q_h . k_hj / sqrt d)``: query [H, d], keys [Hkv, n, d], float -> [n]."""
    groups = query.view(len(keys), -1, query.shape[-1])  # [Hkv, H / Hkv, d]
    return (groups @ keys.transpose(1, 2) / math.sqrt(query.shape[-1])).softmax(dim=-1).mean(dim=(0, 1))
