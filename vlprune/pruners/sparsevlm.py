"""SparseVLM: visual tokens are rated by the text tokens that have to do with the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruner import Scorer, Source, register
from vlprune.selection import Merge, Selection, top


def raters(visual: Tensor, text: Tensor) -> Tensor:
    """Text tokens above the mean of ``mean_v softmax_t(V X^T)``: [N, D], [M, D] -> [M] bool, all if none stands out."""
    weight = (visual.float() @ text.float().T).softmax(dim=1).mean(dim=0)
    chosen = weight > weight.mean()
    return chosen | ~chosen.any()


def centres(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Density-peak clustering: the `count` centres among t tokens, best first, and the cluster of every token.

        d_ij = |x_i - x_j| / sqrt(D);    rho_i = exp(-mean over the `count` nearest, i among them, of d_ij^2)
        delta_i = min over the denser j of d_ij, or the largest d of all;    centres: the largest rho delta

    Args:
        x: [t, D], count <= t.
    Returns:
        [count] and [t] int64. A tie goes to the earlier token.
    """
    x = x.float()
    distance = torch.cdist(x, x) / x.shape[1] ** 0.5
    density = (-distance.topk(count, largest=False).values.square().mean(dim=1)).exp()
    denser = density[None, :] > density[:, None]
    delta = torch.where(denser, distance, distance.max()).amin(dim=1)
    centre = (density * delta).sort(descending=True, stable=True).indices[:count]
    cluster = distance[:, centre].argmin(dim=1)
    return centre, cluster.scatter(0, centre, torch.arange(count, device=x.device))


def split(n: int, keep: int) -> tuple[int, int, int]:
    """How K slots divide: tokens that stay as they are, tokens recycled, clusters these become.

    The authors keep P tokens, recycle t = int(0.3 m) + 1 of the m others into c = int(t / 10) + 1 clusters and end with
    P + c. Given K, P is the largest count with P + c <= K, but at least half of K.
    """
    for plain in range(keep, (keep - 1) // 2, -1):
        others = n - plain
        recycled = int(0.3 * others) + 1 if others else 0
        clusters = recycled // 10 + 1 if others else 0
        if plain + clusters <= keep:
            return plain, recycled, clusters
    plain = (keep + 1) // 2
    return plain, int(0.3 * (n - plain)) + 1, keep - plain


@register("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(Scorer):
    """``s_i = mean_r mean_h A[h, r, i]`` over the rater rows r of the layer that has just run.

    Raters are the text tokens after the picture whose ``mean_v softmax_t(V X^T)`` exceeds its mean over them.

    version="v1" recycles: the best 30 % of the tokens that would go are clustered by density peaks, and each cluster's
    mean takes the place of its centre. Clusters are paid from the budget, see `split`: the authors' 66 tokens and 11
    clusters of 400 are K = 77 here. version="v2" recycles nothing and averages only the `heads` heads that give the
    picture the largest total attention.

    Differs: one step of the method; the authors' schedule is steps at 3, 7 and 16 (they run layers 2, 6 and 15 on all
    tokens and cut behind them). Clusters stand at their centres, in reading order; the authors append them. Densities get no noise of
    1e-6. The position response by which v2 divides attention is left out: a Context holds no rotary tables.
    """

    version: Literal["v1", "v2"] = "v1"
    heads: int = 14

    stage = "3"
    merges = property(lambda self: self.version == "v1")
    batched = True
    needs = frozenset({"text_attention", "text_embeddings", "embeddings", "features"})
    source = Source(
        paper="arXiv:2410.04417", code="Gumpest/SparseVLMs@26a5f48", licence="Apache-2.0", fidelity="approximate"
    )

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise SpecError(f"sparsevlm: heads={self.heads} must be at least 1")

    def score(self, ctx: Context) -> Tensor:
        chosen = raters(ctx.embeddings, ctx.text_embeddings).float()  # [M]
        rows = torch.einsum("m,mhn->hn", chosen, ctx.text_attention.float()) / chosen.sum()  # [H, N]
        if self.version == "v2" and self.heads < len(rows):
            rows = rows[rows.sum(dim=1).topk(self.heads).indices]
        return rows.mean(dim=0)

    def select(self, ctx: Context) -> Selection:
        return self.choose(ctx, self.score(ctx))

    def choose(self, ctx: Context, scores: Tensor) -> Selection:
        """The selection these scores lead to, [N]; what a wrapper calls with scores of its own."""
        plain, recycled, clusters = split(len(scores), ctx.keep)
        if self.version == "v2" or clusters == 0:
            return Selection(top(scores, ctx.keep), scores=scores)
        order = scores.sort(descending=True, stable=True).indices
        pool = order[plain : plain + recycled].sort().values  # in reading order: ties go to the earlier token
        centre, cluster = centres(ctx.features[pool], clusters)
        stays = top(scores, plain)
        kept = torch.cat([stays, pool[centre]]).sort().values
        size = torch.zeros(clusters, device=kept.device).scatter_add(
            0, cluster, torch.ones_like(pool, dtype=torch.float32)
        )
        merge = Merge(
            source=torch.cat([stays, pool]),
            slot=torch.cat([torch.searchsorted(kept, stays), torch.searchsorted(kept, pool[centre])[cluster]]),
            weight=torch.cat([torch.ones(plain, device=kept.device), 1 / size[cluster]]),
        )
        return Selection(kept, merge, scores)
