"""EntropyPrune: keep the tokens whose query heads differ in many directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlprune.context import Context
from vlprune.ops import token_entropy
from vlprune.pruner import Scorer, Source, register


@register("entropyprune")
@dataclass(frozen=True)
class EntropyPrune(Scorer):
    """Matrix entropy of a token's queries in decoder layer ``stage - 1``, rows of ``R in R^{H x d}`` being its heads.

        R <- R - mean_h R;    G = R R^T / H;    S = -sum_i lam_i log(lam_i) / log(H),    lam = max(eig(G), 1e-10)

    G is the H x H dual of the d x d covariance: the same non-zero eigenvalues. Heads wider than 128 are first averaged
    to 128 in consecutive groups.

    normalize: "none" is the authors' code, whose eigenvalues do not sum to 1: above 1/e a larger eigenvalue lowers the
        score, so tokens whose heads differ a lot rank last. "trace" divides G by its trace, which makes S the entropy
        the method is named after, independent of the queries' length.
    dtype: what the eigenvalues are computed in; the authors take float64.

    Papers quote its budget as an average over layers; ``Budget.equivalent`` turns that into the count kept.
    """

    normalize: Literal["none", "trace"] = "none"
    dtype: Literal["float64", "float32"] = "float64"

    stage = "2"
    batched = True
    needs = frozenset({"queries"})
    source = Source(paper="arXiv:2602.17196", code="YahongWang1/EntropyPrune@9fc1cbb")

    def score(self, ctx: Context) -> Tensor:
        return token_entropy(ctx.queries, normalize=self.normalize, dtype=getattr(torch, self.dtype))
