"""How sure a comparison is: bootstrap intervals of relative scores, and a paired test."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap interval at LEVEL; low and high are None where items are too few."""

    value: float
    low: float | None
    high: float | None


def relative(pruned: Sequence[Scores], base: Sequence[Scores], seed: int = 0) -> Interval:
    """Mean over tasks of ``mean(pruned_t) / mean(base_t)``, with a percentile bootstrap interval.

    Items are resampled within each task, the same items for both arms: the arms answered the same questions.

    Args:
        pruned, base: one array [items] per task, in the same order of items.
        seed: of the resampling.
    Returns:
        value that is not finite where the base scores nothing on a task.
    """
    from scipy.stats import bootstrap

    def statistic(*chosen: NDArray[Any], axis: int = -1) -> Any:
        parts = []
        for p, b, index in zip(pruned, base, chosen, strict=True):
            i = np.asarray(index, dtype=np.int64)
            with np.errstate(divide="ignore", invalid="ignore"):
                parts.append(p[i].mean(axis=axis) / b[i].mean(axis=axis))
        return np.mean(parts, axis=0)

    items = [np.arange(len(p)) for p in pruned]
    value = float(statistic(*items))
    if min(map(len, items)) < 2 or not np.isfinite(value):
        return Interval(value, None, None)
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings():  # a resample in which the base scores nothing has no ratio, and then no interval
        warnings.simplefilter("ignore", category=RuntimeWarning)
        found = bootstrap(items, statistic, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", rng=rng)
    low, high = found.confidence_interval
    return Interval(value, *(float(x) if np.isfinite(x) else None for x in (low, high)))


@dataclass(frozen=True)
class Paired:
    """Items answered worse and better than by the other arm, and how likely so uneven a split is by chance."""

    worse: int
    better: int
    p: float


def paired(pruned: Scores, base: Scores) -> Paired:
    """Exact sign test on the items where the arms differ; on right-or-wrong scores this is McNemar's exact test."""
    from scipy.stats import binomtest

    worse, better = int((pruned < base).sum()), int((pruned > base).sum())
    p = float(binomtest(worse, worse + better).pvalue) if worse + better else 1.0
    return Paired(worse, better, p)
