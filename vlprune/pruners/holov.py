"""HoloV: share the budget among crops of the picture, then keep what each crop's attention is on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruner import Pruner, Source, register
from vlprune.pruners.fastervlm import Attention, saliency
from vlprune.selection import Merge, Selection, top

EPS = 1e-6
SCALE = 1000  # the authors' factor on attention


@register("holov")
@dataclass(frozen=True)
class HoloV(Pruner):
    """Crops are C consecutive runs of the N tokens Z, as equal as possible; A is the attention of CLS, mean over heads.

        S = cosines within a crop of M tokens, diagonal 0;    mu_i = sum_j S_ij / (M - 1)
        V_i = sum_j (S_ij - mu_i)^2 / (M - 1);    gamma = mean(1000 A) / (mean V + eps)
        h_c = mean_i (1000 A_i + beta gamma V_i);    w_c = h_c / (sum h + eps);    q_c = floor(w_c K)

    The crops with the largest w get the K - sum q left over, one each. A crop keeps its q_c tokens of largest A.
    gamma V has the mean of 1000 A, so beta hardly moves the shares: h_c is near (1 + beta) 1000 mean A.

    crops: C; None is the authors' rule for Qwen, ``max(1, floor(16/9 N / K))``, which gives the 16 they set for LLaVA
        at 64 of 576.
    compat: where a quota exceeds its crop, "official" loses the excess, as the authors' code does, which puts zero
        embeddings in its place; here these stand at the last free positions. "corrected" gives the excess to the other
        crops by highest averages with ``w_c (M_c - q_c)`` as their claims. Both agree while no quota overflows.
    attention: "received" serves encoders without CLS; the authors take it for Qwen.

    Differs: tokens come out in reading order, the authors emit them crop by crop and by attention within a crop; a crop
    of one token is scored 1000 A like the others under "corrected", A alone under "official".
    """

    crops: int | None = None
    beta: float = 0.09
    compat: Literal["corrected", "official"] = "corrected"
    attention: Attention = "cls"

    stage = "projector"
    merges = property(lambda self: self.compat == "official")
    batched = True
    needs = property(lambda self: frozenset({"features", f"{self.attention}_attention"}))
    source = Source(paper="arXiv:2510.02912", code="obananas/HoloV@1d2e65e")

    def __post_init__(self) -> None:
        if self.crops is not None and self.crops < 1:
            raise SpecError(f"holov: crops={self.crops}; it is at least 1, or none for the authors' rule")

    def select(self, ctx: Context) -> Selection:
        attention = saliency(ctx, self.attention)
        n, keep, official = len(attention), ctx.keep, self.compat == "official"
        wanted = self.crops or max(1, int(1024 / 576 * n / keep))
        blocks = _blocks(n, min(wanted, n))
        h = crop_scores(ctx.features, attention, blocks, self.beta, 1 if official else SCALE)
        weights, quota = allocate(h, keep)

        size = torch.cat([torch.full((c,), m, device=quota.device) for c, m in blocks])
        crop = torch.cat([torch.arange(c).repeat_interleave(m) + i * blocks[0][0] for i, (c, m) in enumerate(blocks)])
        crop = crop.to(quota.device, non_blocking=True)  # [N] which crop a token is in
        rank = _rank(attention, blocks)
        within = rank < quota[crop]
        if official:
            position = torch.arange(n, device=quota.device) / n
            kept = top(torch.where(within, 2.0, position), keep)
            ones = within[kept].float()
            return Selection(kept, Merge(kept, torch.arange(keep, device=kept.device), ones), attention)
        claim = (weights * (size - quota).clamp(min=0))[crop] / (rank - quota[crop] + 0.5)
        return Selection(top(torch.where(within, torch.inf, claim), keep), scores=attention)


def _blocks(n: int, crops: int) -> list[tuple[int, int]]:
    """(number of crops, tokens in each), longer crops first."""
    size, longer = divmod(n, crops)
    return [(c, m) for c, m in ((longer, size + 1), (crops - longer, size)) if c]


def _by_crop(x: Tensor, blocks: list[tuple[int, int]]) -> list[Tensor]:
    """[N, ...] -> [crops, tokens of a crop, ...] for each block."""
    return [
        p.reshape(*b, *p.shape[1:]) for p, b in zip(torch.split(x, [c * m for c, m in blocks]), blocks, strict=True)
    ]


def _rank(attention: Tensor, blocks: list[tuple[int, int]]) -> Tensor:
    """[N] place of each token in its crop by descending attention, ties to the earlier token."""
    order = [a.argsort(dim=1, descending=True, stable=True) for a in _by_crop(attention, blocks)]
    return torch.cat([o.argsort(dim=1).flatten() for o in order])


def crop_scores(z: Tensor, attention: Tensor, blocks: list[tuple[int, int]], beta: float, single: float) -> Tensor:
    """h, [C] float32, from z [N, D] and attention [N]; a crop of one token has h = single * A."""
    out = []
    for f, a in zip(_by_crop(z, blocks), _by_crop(attention, blocks), strict=True):
        m = a.shape[1]
        if m == 1:
            out.append(single * a[:, 0])
            continue
        f = f.float()
        f = f / (f.norm(dim=-1, keepdim=True) + EPS)
        s = (f @ f.transpose(1, 2)) * (1 - torch.eye(m, device=f.device))  # [C, M, M]
        mu = s.sum(dim=-1, keepdim=True) / (m - 1)
        v = (s - mu).square().sum(dim=-1) / (m - 1)  # the zero diagonal counts, as in the authors' code
        a = SCALE * a
        gamma = a.mean(dim=1) / (v.mean(dim=1) + EPS)
        out.append((a + beta * gamma[:, None] * v).mean(dim=1))
    return torch.cat(out)


def allocate(h: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Weights w [C] and quotas q [C] int64 with sum K; a quota may exceed its crop."""
    weights = h / (h.sum() + EPS)
    quota = (weights * keep).floor().long()
    place = weights.argsort(descending=True, stable=True).argsort()
    return weights, quota + (place < keep - quota.sum())
