"""SnapKV: keep the cached keys that the last tokens of the prompt attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruner import CachePruner, Source, Tokens, register


def share_of(keep: int, share: float) -> int:
    """``max(1, int(share K))``, at most K."""
    return min(max(1, int(share * keep + 1e-6)), keep)


def per_key_head(rows: Tensor, heads: int) -> Tensor:
    """[H, N] -> [Hkv, N]: the sum over the query heads that share a key head."""
    return rows.unflatten(0, (heads, -1)).sum(dim=1)


def with_window(scores: Tensor, window: int) -> Tensor:
    """[Hkv, N] with the last `window` tokens above all others."""
    scores = scores.clone()
    scores[:, scores.shape[1] - window :] = scores.amax(dim=1, keepdim=True) + 1
    return scores


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(CachePruner):
    """``s_v = pool_5(sum_h sum_r A[h, r, v])`` over the last w rows r of the prompt, layer by layer in the cache.

    A is the attention of the layer itself, h the query heads of one key head, pool the mean over `kernel` neighbours in
    reading order, zeros outside. Every key head keeps its own K.

    window: w / K, rounded down, at least 1; no more rows than text tokens behind the last picture.
    tokens: "visual" leaves all text, the window among it. "all" is the authors' cache compression: K of all tokens, the
        window of w always among them, and the pool runs over what is in front of it.

    Differs: pictures alone are compressed unless tokens=all, with which a port to vision-language models agrees.
    """

    tokens: Tokens = "visual"
    heads: Literal["each", "shared"] = "each"
    window: float = 0.1
    kernel: int = 5

    batched = True
    needs = frozenset({"text_attention", "keys"})
    source = Source(paper="arXiv:2404.14469", code="EffiVLM-Bench/EffiVLM-Bench@ab3ee18 (port)", fidelity="approximate")

    def __post_init__(self) -> None:
        if not 0 <= self.window <= 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise SpecError(f"snapkv: window={self.window} is a share of K and kernel={self.kernel} an odd number")

    def score(self, ctx: Context) -> Tensor:
        window = share_of(ctx.keep, self.window)
        rows = ctx.text_attention[-window:].float().sum(dim=0)  # [M, H, N] -> [H, N]
        front = rows.shape[1] - (window if self.tokens == "all" else 0)
        seen = per_key_head(rows, len(ctx.keys))
        if front == 0:
            return seen
        pooled = F.avg_pool1d(seen[None, :, :front], self.kernel, stride=1, padding=self.kernel // 2)[0]
        seen = seen.clone()
        seen[:, :front] = pooled
        return with_window(seen, window) if self.tokens == "all" else seen
