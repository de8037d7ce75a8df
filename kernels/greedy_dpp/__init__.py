"""Greedy MAP inference of a determinantal point process."""

from __future__ import annotations

from torch import Tensor

from vlprune.errors import BudgetError
from vlprune.kernels.dispatch import FLOATS, KernelError, choose, leading
from vlprune.kernels.greedy_dpp.reference import greedy_dpp as _reference
from vlprune.kernels.max_min import LARGEST


def greedy_dpp(
    source: Tensor | tuple[Tensor, Tensor], keep: int, *, order: bool = False, backend: str = "auto"
) -> Tensor:
    """Tokens that greedily maximise the log-determinant of their kernel matrix.

        L_ij = r_i cos(f_i, f_j) r_j;  d_i = L_ii;  j = argmax d;  e = (L_j - sum_s c_s c_s[j]) / sqrt(d_j);  d -= e^2

    What is left of a token, d_i, is rounding noise once it falls to 1e-5 of L_ii. When no token has more, the rank of
    the kernel is used up and the remaining picks are the tokens with the largest L_ii, that is relevance.

    Args:
        source: the kernel L, [N, N] or [B, N, N], symmetric and positive semi-definite; or (features, relevance) with
            features [N, D] or [B, N, D] and relevance r >= 0, [N] or [B, N], from which L is made in float32.
        keep: K, 1 <= K <= N.
        order: return the picks in the order they were made.
    Returns:
        [K] or [B, K] int64, strictly increasing unless `order`. Ties go to the earlier token.
    Raises:
        BudgetError: keep outside [1, N]. KernelError: shapes that do not fit.
    Source: CDPruner, arXiv:2506.10967; the greedy algorithm is Chen et al., arXiv:1709.05135. Differs: the fallback.
    """
    features, relevance = (source, None) if isinstance(source, Tensor) else source
    if features.dim() not in (2, 3):
        raise KernelError(f"greedy_dpp needs [N, D] or [B, N, D]; got {tuple(features.shape)}")
    n = features.shape[-2]
    if relevance is None and features.shape[-1] != n:
        raise KernelError(f"a kernel must be square, got {tuple(features.shape)}; pass (features, relevance) otherwise")
    if relevance is not None and relevance.shape != features.shape[:-1]:
        raise KernelError(f"relevance must be {tuple(features.shape[:-1])}; got {tuple(relevance.shape)}")
    if not 1 <= keep <= n:
        raise BudgetError(f"greedy_dpp was asked to keep {keep} of {n} tokens")

    def picks(features: Tensor, relevance: Tensor | None) -> Tensor:
        x = features[None] if features.dim() == 2 else features.flatten(0, -3)
        r = None if relevance is None else relevance.reshape(x.shape[:2])
        covered = x.dtype in FLOATS and n <= LARGEST
        if choose(backend, x, covered=covered) == "reference":
            found = _reference(x, keep, r, order)
        else:
            from vlprune.kernels.greedy_dpp.triton import greedy_dpp as fast

            found = fast(x, keep, r, order)
        return found.view(*features.shape[:-2], keep)

    return leading(picks, features, relevance)
