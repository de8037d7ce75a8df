"""DART: keep a few pivot tokens and, for each, the tokens least like it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.kernels.dispatch import leading
from vlprune.pruner import Pruner, Source, register
from vlprune.selection import Selection, top


@register("dart")
@dataclass(frozen=True)
class Dart(Pruner):
    """Pivots are the P_v visual and P_t text tokens whose keys have the largest L1 norm, heads concatenated.

    One pivot p after the other takes, of the visual tokens neither pivot nor taken, the n_p with the smallest
    ``cos(h_p, h_i)``; h are the hidden states entering the stage, after the decoder's final norm. The visual pivots and
    what was taken stay. K - P_v is shared equally by the pivots, the first ones taking one more if it does not divide.

    visual, text: P_v and P_t, lowered to K and M where there are fewer.

    Approximate: the authors visit pivots in the iteration order of a Python set of sequence positions, which is no
    rule; here they come in reading order, visual before text. They keep ``P_v + (P_v + P_t) floor(K / (P_v + P_t))``
    tokens, 132 for 128; here K is K. Their own code could not be read: this follows ModelTC/LightCompress's port.
    """

    visual: int = 4
    text: int = 4

    stage = "2"
    batched = True
    needs = frozenset({"keys", "text_keys", "features", "text_features", "norm"})
    source = Source(
        paper="arXiv:2502.11494", code="ModelTC/LightCompress@9701d03", licence="Apache-2.0", fidelity="approximate"
    )

    def __post_init__(self) -> None:
        if self.visual < 1 or self.text < 0:
            raise SpecError(f"dart: visual={self.visual} must be at least 1 and text={self.text} at least 0")

    def select(self, ctx: Context) -> Selection:
        n, m = ctx.keys.shape[1], ctx.text_keys.shape[1]
        strength = _l1(ctx.keys)
        visual = top(strength, min(self.visual, ctx.keep))
        text = top(_l1(ctx.text_keys), min(self.text, m))
        pivots = self.visit(visual, n + text)
        hidden = leading(ctx.norm, torch.cat([ctx.features, ctx.text_features]))  # [N + M, D]
        taken = unlike(hidden, n, visual, pivots, ctx.keep - len(visual))
        return Selection(torch.cat([visual, taken]).sort().values, scores=strength)

    def visit(self, visual: Tensor, text: Tensor) -> Tensor:
        """Pivots in the order in which they take tokens; text token i is number N + i."""
        return torch.cat([visual, text])


def _l1(keys: Tensor) -> Tensor:
    """[Hkv, N, d] -> [N]."""
    return keys.float().abs().sum(dim=(0, 2))


def unlike(hidden: Tensor, n: int, excluded: Tensor, pivots: Tensor, keep: int) -> Tensor:
    """`keep` of the first n tokens but `excluded`: each pivot in turn takes those of smallest cosine to it."""
    x = F.normalize(hidden.float(), dim=-1)
    distance = -(x[pivots] @ x[:n].T)  # [P, n]
    gone = torch.zeros(n, device=x.device).scatter(0, excluded, -torch.inf)
    taken = []
    for i in range(len(pivots)):
        share = keep // len(pivots) + (i < keep % len(pivots))
        taken.append(top(distance[i] + gone, share))
        gone = gone.scatter(0, taken[-1], -torch.inf)
    return torch.cat(taken)
