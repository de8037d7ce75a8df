"""The largest scores of every row, with one answer to ties."""

from __future__ import annotations

from torch import Tensor

from vlprune.errors import BudgetError
from vlprune.kernels.dispatch import FLOATS, choose, leading
from vlprune.kernels.top_k.reference import top_k as _reference

LARGEST = 32768  # scores of a row that one program holds


def top_k(scores: Tensor, keep: int, *, backend: str = "auto") -> Tensor:
    """Indices of the `keep` largest scores, ascending. Ties go to the earlier one; NaN counts as the lowest score.

    Args:
        scores: [..., N], any float dtype; compared in float32.
        keep: K, 0 <= K <= N.
    Returns:
        [..., K] int64, strictly increasing.
    Raises:
        BudgetError: keep outside [0, N].
    """
    n = scores.shape[-1]
    if not 0 <= keep <= n:
        raise BudgetError(f"{keep} of {n} scores were asked for; the count is between 0 and {n}")

    def picks(scores: Tensor) -> Tensor:
        rows = scores.reshape(scores.shape[:-1].numel(), n)
        if choose(backend, rows, covered=rows.dtype in FLOATS and n <= LARGEST) == "reference":
            found = _reference(rows, keep)
        else:
            from vlprune.kernels.top_k.triton import top_k as fast

            found = fast(rows, keep)
        return found.view(*scores.shape[:-1], keep)

    return leading(picks, scores)
