"""What a pruner answers: which visual tokens stay, and what each of them absorbs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.errors import PruningError
from vlprune.kernels.top_k import top_k

top = top_k  # what every rule ranks by


@dataclass(frozen=True, eq=False)
class Merge:
    """A sparse linear map onto the kept slots: ``out[slot[e]] += weight[e] * x[source[e]]`` over the E entries.

    Every kept slot that shall hold its own token needs an entry of its own: what is not named is zero.
    """

    source: Tensor  # [E] int64 in 0..N-1
    slot: Tensor  # [E] int64 in 0..K-1
    weight: Tensor  # [E] float


@dataclass(frozen=True, eq=False)
class Heads:
    """What each key head keeps, where heads choose for themselves: in the key-value cache."""

    kept: Tensor  # [Hkv, K] int64, strictly increasing along K
    merge: Merge | None = None  # of cached rows: source, slot and weight are [Hkv, E]; None means plain gather

    def apply(self, x: Tensor) -> Tensor:
        """[Hkv, N, d] -> [Hkv, K, d]; merged rows are summed in float32."""
        if self.merge is None:
            return x.gather(1, self.kept[..., None].expand(-1, -1, x.shape[2]))
        m, width = self.merge, (-1, -1, x.shape[2])
        rows = x.float().gather(1, m.source[..., None].expand(width)) * m.weight[..., None].float()
        out = x.new_zeros(*self.kept.shape, x.shape[2], dtype=torch.float32)
        return out.scatter_add(1, m.slot[..., None].expand(width), rows).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Selection:
    """Which of N tokens stay, in reading order. Every output token sits at a kept index and takes its position."""

    kept: Tensor  # [K] int64, strictly increasing; with `heads`, what they keep together
    merge: Merge | None = None  # None means plain gather
    scores: Tensor | None = None  # [N] float32, for drawing only
    heads: Heads | None = None  # as many tokens per head; the rules of stages "cache" and "decode" may answer so

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
        if self.heads is not None:
            h = self.heads.kept
            if h.dim() != 2 or h.shape[1] != len(k) or h.dtype != torch.int64:
                raise PruningError(
                    f"heads must keep {len(k)} tokens each, int64; got {h.dtype} of shape {tuple(h.shape)}"
                )
            k = torch.cat([k[None], h])
        if k.device.type == "cpu" and k.numel():
            if bool((k[..., 1:] <= k[..., :-1]).any()) or int(k.min()) < 0 or int(k.max()) >= n:
                raise PruningError(f"kept must be strictly increasing within 0..{n - 1}")
        return self
