"""The definition of gather_cache in plain torch, for one tensor."""

from __future__ import annotations

from torch import Tensor


def gather_cache(x: Tensor, index: Tensor) -> Tensor:
    """[B, H, S, d], [B, P] -> [B, H, P, d]."""
    wanted = index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, wanted.clamp(min=0)).masked_fill(wanted < 0, 0)
