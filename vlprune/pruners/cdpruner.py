"""CDPruner: a determinantal point process over the tokens, conditioned on the question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprune.context import Context
from vlprune.ops import greedy_dpp
from vlprune.pruner import Pruner, Source, register
from vlprune.selection import Selection

EPS = 1e-6


@register("cdpruner")
@dataclass(frozen=True)
class CDPruner(Pruner):
    """Greedy MAP of the process with kernel ``L_ij = r_i cos(x_i, x_j) r_j`` over the projected tokens x.

        r = (q - min q + 1e-6) / (max q - min q);    q_i = cos(x_i, mean of the text tokens' embeddings)

    Approximate: the process is the authors', the relevance q is not. Theirs is the negated similarity of the patch and
    the prompt in CLIP's joint space, and a vision-language model does not ship CLIP's text tower. Here both sides are
    in the language model's embedding space. Whoever has CLIP's relevance calls `select_dpp` with it. The authors also
    take min and max over the whole batch; here each picture has its own.
    """

    stage = "projector"
    batched = True
    needs = frozenset({"features", "text_embeddings"})
    source = Source(
        paper="arXiv:2506.10967", code="Theia-4869/CDPruner@9541616", licence="Apache-2.0", fidelity="approximate"
    )

    def select(self, ctx: Context) -> Selection:
        text = ctx.text_embeddings.float().mean(dim=0)
        q = F.cosine_similarity(ctx.features.float(), text[None], dim=-1)
        r = unit_range(q)
        return Selection(select_dpp(ctx.features, r, ctx.keep), scores=r)


def unit_range(q: Tensor) -> Tensor:
    """``(q - min q + 1e-6) / (max q - min q)`` over the whole of q; ones where q is constant."""
    low, high = q.aminmax()
    return torch.where(high > low, (q - low + EPS) / (high - low), 1.0)


def select_dpp(features: Tensor, relevance: Tensor, keep: int) -> Tensor:
    """Greedy MAP of the kernel ``r_i cos(x_i, x_j) r_j``.

    Args:
        features: x, [N, D], any float dtype; compared in float32.
        relevance: r, [N], not negative; see `unit_range`.
        keep: K, 1 <= K <= N.
    Returns:
        [K] int64, strictly increasing. Beyond the rank of the kernel the most relevant tokens left are taken.
    """
    return greedy_dpp((features, relevance.float()), keep)
