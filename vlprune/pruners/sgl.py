"""SGL: a smaller model has answered already, and its attention says which tokens the large one needs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlprune.context import Context
from vlprune.pruner import Scorer, Source, register


@register("sgl")
@dataclass(frozen=True)
class SGL(Scorer):
    """The `keep` tokens of highest score, whatever the scores given to `vlprune.guided` are.

    The authors' are attention summed over all layers, heads, prompt rows behind the picture and answer rows of a smaller
    model of the same family: `vlprune.gathered_attention`. Both models must cut a picture into the same tokens. They cut
    before layer ``floor(p L)`` and keep a share p of the tokens with the same p: 0.4 for 64 % of the tokens on layer
    average, 0.2 for 35 %, 0.1 for 18 %, 0.05 for 9 %. Whether the large model need be asked at all is told by
    `vlprune.gathered.confidence` and `consistency`. The small model's whole answer is part of the cost.

    Any other score does as well: of a detector, of a person's gaze, of an OCR engine.
    """

    stage = "6"
    batched = True
    needs = frozenset({"guide"})
    source = Source(paper="arXiv:2412.03324", code="NUS-HPC-AI-Lab/SGL@7e76fd2")

    def score(self, ctx: Context) -> Tensor:
        return ctx.guide.float()
