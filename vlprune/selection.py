"""What a pruner answers: which visual tokens stay, and what each of them absorbs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.errors import PruningError


@dataclass(frozen=True, eq=False)
class Merge:
    """A sparse linear map onto the kept slots: ``out[slot[e]] += weight[e] * x[source[e]]`` over the E entries.

    Every kept slot that shall hold its own token needs an entry of its own: what is not named is zero.
    """

    source: Tensor  # [E] int64 in 0..N-1
    slot: Tensor  # [E] int64 in 0..K-1
    weight: Tensor  # [E] float


@dataclass(frozen=True, eq=False)
class Selection:
    """Which of N tokens stay, in reading order. Every output token sits at a kept index and takes its position."""

    kept: Tensor  # [K] int64, strictly increasing
    merge: Merge | None = None  # None means plain gather
    scores: Tensor | None = None  # [N] float32, for drawing only

    def apply(self, x: Tensor) -> Tensor:
        """[N, D] -> [K, D]; merged rows are summed in float32."""
        if self.merge is None:
            return x.index_select(0, self.kept)
        m = self.merge
        out = x.new_zeros(len(self.kept), x.shape[-1], dtype=torch.float32)
        out = out.index_add(0, m.slot, x[m.source].float() * m.weight[:, None].float())
        return out.to(x.dtype)

    def check(self, n: int, keep: int, adaptive: bool = False) -> Selection:
        """Raise PruningError unless this is a well-formed choice of `keep` out of `n` tokens; returns itself.

        The count is always checked. Order and range are read only on the CPU, where looking costs no synchronisation.
        """
        k = self.kept
        if k.dim() != 1 or k.dtype != torch.int64:
            raise PruningError(f"kept must be one-dimensional int64, got {k.dtype} of shape {tuple(k.shape)}")
        if len(k) != keep and not (adaptive and 1 <= len(k) <= keep):
            raise PruningError(f"{keep} of {n} tokens were asked for, the pruner kept {len(k)}")
        if k.device.type == "cpu" and len(k):
            if bool((k[1:] <= k[:-1]).any()) or int(k[0]) < 0 or int(k[-1]) >= n:
                raise PruningError(f"kept must be strictly increasing within 0..{n - 1}")
        return self


def top(scores: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` largest scores, ascending. Ties go to the earlier token; NaN counts as the lowest score.

    Args:
        scores: [..., N], any float dtype; compared in float32.
        keep: K, 1 <= K <= N.
    Returns:
        [..., K] int64, strictly increasing.
    """
    scores = scores.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return scores.sort(descending=True, stable=True).indices[..., :keep].sort().values
