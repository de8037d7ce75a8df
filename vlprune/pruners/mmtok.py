"""MMTok: choose the tokens that best cover the text and the picture at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruner import Pruner, Source, register
from vlprune.selection import Selection


def cover(similarity: Tensor, keep: int) -> Tensor:
    """Greedy coverage: ``j = argmax_j sum_r max(0, S_rj - max_{chosen} S_rc)``; [R, N] >= 0 -> [K] ascending."""
    best = torch.zeros_like(similarity[:, :1])
    taken = torch.zeros(similarity.shape[1], dtype=torch.bool, device=similarity.device)
    for _ in range(keep):
        gain = (similarity - best).relu_().sum(dim=0)
        pick = gain.masked_fill(taken, -1.0).argmax(keepdim=True)
        taken = taken.scatter(0, pick, True)
        best = torch.maximum(best, similarity.index_select(1, pick))
    return (~taken).to(torch.int8).sort(stable=True).indices[:keep]


@register("mmtok")
@dataclass(frozen=True)
class MMTok(Pruner):
    """Greedy coverage of the rows of [P; Q] by K columns.

        P_tj = softmax_j(e_t . x_j / text_temperature) / M      Q_ij = alpha softmax_j(f_i . f_j / temperature) / N

    with e the text embeddings, x the projected tokens and f the encoder's features, all of unit length. The next token
    is the one by which ``sum over rows of the largest chosen entry`` grows most; ties go to the earlier token.
    """

    alpha: float = 0.5
    text_temperature: float = 0.01
    temperature: float = 0.2

    stage = "projector"
    batched = True
    needs = frozenset({"features", "encoder_features", "text_embeddings"})
    source = Source(paper="arXiv:2508.18264", code="Ironieser/MMTok@d1522cd", licence="Apache-2.0")

    def __post_init__(self) -> None:
        if self.alpha < 0 or min(self.text_temperature, self.temperature) <= 0:
            raise SpecError("mmtok: alpha is at least 0, both temperatures are above 0")

    def select(self, ctx: Context) -> Selection:
        x, f, e = (F.normalize(t.float(), dim=-1) for t in (ctx.features, ctx.encoder_features, ctx.text_embeddings))
        text = (e @ x.T / self.text_temperature).softmax(dim=1) / len(e)
        picture = self.alpha * (f @ f.T / self.temperature).softmax(dim=1) / len(f)
        return Selection(cover(torch.cat([text, picture]), ctx.keep))
