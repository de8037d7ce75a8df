"""Greedy max-min diversity."""

from __future__ import annotations

from torch import Tensor

from vlprune.errors import BudgetError
from vlprune.kernels.dispatch import FLOATS, KernelError, choose, leading
from vlprune.kernels.max_min.reference import max_min as _reference

FIRST = ("official", "weight")
LARGEST = 8192  # tokens beyond which the kernel's N x N matrix is too large to be worth it


def max_min(
    features: Tensor,
    keep: int,
    *,
    weights: Tensor | None = None,
    first: str = "official",
    order: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Greedy max-min diversity: each pick maximises its cosine distance to the nearest token picked so far.

        D_ij = 1 - cos(f_i, f_j)
        i_1 = argmax_i w_i min_{j != i} D_ij;   i_{t+1} = argmax_{i not in S_t} w_i min_{j in S_t} D_ij

    Args:
        features: [N, D] or [B, N, D], any float dtype; compared in float32.
        keep: K, 1 <= K <= N.
        weights: [N] or [B, N], w above; ones if absent.
        first: "official" is i_1 above (DivPrune), "weight" starts at the largest weight (ZOO-Prune).
        order: return the picks in the order they were made.
    Returns:
        [K] or [B, K] int64, strictly increasing unless `order`. Ties go to the earlier token; a vector of zeros has
        distance 1 to all others.
    Raises:
        BudgetError: keep outside [1, N]. KernelError: shapes that do not fit.
    Source: DivPrune, arXiv:2503.02175; vbdi/divprune, llava_arch.py; with weights ZOO-Prune, arXiv:2509.24837.
        Differs: reading order, not pick order; a picked token cannot be picked again.
    """
    if features.dim() not in (2, 3):
        raise KernelError(f"max_min needs features [N, D] or [B, N, D]; got {tuple(features.shape)}")
    if weights is not None and weights.shape != features.shape[:-1]:
        raise KernelError(f"weights must be {tuple(features.shape[:-1])} like features; got {tuple(weights.shape)}")
    if first not in FIRST or (first == "weight" and weights is None):
        raise KernelError(f"first is 'official', or 'weight' together with weights; got {first!r}")
    if not 1 <= keep <= features.shape[-2]:
        raise BudgetError(f"max_min was asked to keep {keep} of {features.shape[-2]} tokens")

    def picks(features: Tensor, weights: Tensor | None) -> Tensor:
        x = features[None] if features.dim() == 2 else features.flatten(0, -3)
        w = None if weights is None else weights.reshape(x.shape[:2])
        covered = x.dtype in FLOATS and x.shape[1] <= LARGEST
        if choose(backend, x, covered=covered) == "reference":
            found = _reference(x, keep, w, first, order)
        else:
            from vlprune.kernels.max_min.triton import max_min as fast

            found = fast(x, keep, w, first, order)
        return found.view(*features.shape[:-2], keep)

    return leading(picks, features, weights)
