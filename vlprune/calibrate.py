"""What a pruner can learn from a model once, offline: the mathematics, on tensors that were recorded."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from vlprune.errors import PruningError

STRAIGHT = 0.5  # R^2 from which log-attention counts as a straight line


@dataclass(frozen=True)
class Trend:
    """How attention grows along a picture; `parameters` are those of the pruner `debias`.

    r2 is that of the straight line through log-attention, whatever form was chosen.
    """

    trend: Literal["exponential", "cubic"]
    r2: float
    kappa: float
    c1: float = 0.0
    c2: float = 0.0
    c3: float = 0.0

    @property
    def parameters(self) -> dict[str, Any]:
        names = ("kappa",) if self.trend == "exponential" else ("c1", "c2", "c3")
        return {"trend": self.trend, **{name: getattr(self, name) for name in names}}


def fit_trend(attention: Tensor, valid: Tensor | None = None) -> Trend:
    """The content-free trend of a mean score over positions, for `debias` to divide by.

        log a_i = alpha + kappa x_i,  x_i = i / (N - 1),  by least squares

    Where that leaves more than half of the variance (R^2 < 0.5), ``a_i = a_0 (1 + c1 x + c2 x^2 + c3 x^3)`` is fitted
    instead, if it stays positive on [0, 1].

    Args:
        attention: [N], a host's score averaged over many pictures, padding left out of each picture's part.
        valid: [N] bool, positions to fit; positions without attention are never used.
    Raises:
        PruningError: fewer than two positions are left.
    Source: attention debiasing, arXiv:2508.17807, for the exponential; recipe and fallback are ours.
    """
    a = attention.double().cpu()
    x = torch.linspace(0, 1, len(a), dtype=torch.float64)
    use = a > 0 if valid is None else (a > 0) & valid.cpu()
    x, a = x[use], a[use]
    if len(a) < 2:
        raise PruningError(f"a trend needs the mean attention of at least two positions, got {len(a)}")
    line, r2 = _polynomial(x, a.log(), 1)
    exponential = Trend("exponential", r2, kappa=float(line[1]))
    if r2 >= STRAIGHT or len(a) < 4:
        return exponential
    cubic, _ = _polynomial(x, a, 3)
    fine = torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None] ** torch.arange(4) @ cubic
    if bool((fine <= 0).any()):
        return exponential
    c = (cubic[1:] / cubic[0]).tolist()
    return Trend("cubic", r2, exponential.kappa, *c)


def _polynomial(x: Tensor, y: Tensor, degree: int) -> tuple[Tensor, float]:
    """Least squares: coefficients from the constant on, and R^2 (1 where y does not vary)."""
    basis = x[:, None] ** torch.arange(degree + 1)
    coefficients = torch.linalg.lstsq(basis, y[:, None]).solution[:, 0]
    left, all_ = (y - basis @ coefficients).square().sum(), (y - y.mean()).square().sum()
    flat = bool(all_ <= 1e-24 * y.square().sum())  # rounding
    return coefficients, 1.0 if flat else float(1 - left / all_)


def matrix_entropy(x: Tensor) -> Tensor:
    """Entropy of a layer's tokens, 0 (one direction) to 1 (all directions alike); a 0-dimensional float64 tensor.

        Y = rows of X - mean_i X, of length 1;    lam = eig(Y Y^T / N), summing to 1
        E = -sum lam log lam / log min(N, D)

    Args:
        x: [N, D] hidden states of the visual tokens of one picture. The smaller of the two Gram matrices is taken.
    Source: EntropyPrune, arXiv:2602.17196; our reading of its abstract.
    """
    y = torch.nn.functional.normalize(x.double() - x.double().mean(dim=0), dim=1)
    gram = y @ y.T if len(y) <= y.shape[1] else y.T @ y
    lam = torch.linalg.eigvalsh(gram).clamp(min=0)
    total = lam.sum()
    if len(gram) < 2:
        return total * 0
    return torch.special.entr(lam / total.clamp(min=1e-300)).sum() / torch.log(torch.tensor(float(len(gram))))


def entropy_collapse(curve: Sequence[float] | Tensor, fallback: int = 2) -> int:
    """The stage K at which matrix entropy collapses: where to cut, and whose queries (layer K - 1) to score with.

    The largest drop ``E_{l-1} - E_l`` with 1 <= l <= L / 2, if it is at least twice the median absolute drop of all
    layers; else `fallback`.

    Args:
        curve: E_0..E_L, the mean entropy of what enters layer 0, 1, ..., and of the last layer's output.
    Raises:
        PruningError: fewer than two layers.
    Source: EntropyPrune, arXiv:2602.17196; our reading, its detection code is not public.
    """
    e = [float(v) for v in curve]
    if len(e) < 3:
        raise PruningError(f"an entropy curve has one value more than the model has layers, at least 3; got {len(e)}")
    drops = [before - after for before, after in pairwise(e)]
    early = drops[: max(1, len(drops) // 2)]
    largest = max(early)
    stands_out = largest > 0 and largest >= 2 * statistics.median(abs(d) for d in drops)
    return early.index(largest) + 1 if stands_out else fallback


def focal_layers(record: Tensor, keep: int, count: int = 2) -> tuple[int, ...]:
    """Layers whose attention best predicts what the others will look at, ascending: `fastocr`'s ``focal_layers``.

    With a_{l,t} the attention of the token decoded at step t in layer l, and S the K tokens it is highest on,

        g_l = mean_t sum_j a_{l,t,j}        r_{l -> l'} = mean_t sum_{j in S(a_{l,t})} a_{l',t,j} / sum_j a_{l',t,j}

    F grows greedily by the layer that makes ``sum_{l' not in F} g_l' r_{phi(l') -> l'}`` largest, phi(l') being the
    last layer of F before l', or for layers before all of F its last layer at the previous step. Ties go to the lower
    layer.

    Args:
        record: [T, L, N], probabilities over the whole cache, averaged over heads and cut to the visual tokens, of T
            steps of dense decoding that follow each other; T >= 2.
        keep: K. count: size of F, at most L.
    Raises:
        PruningError: a record too short, or `count` or `keep` out of range.
    Source: our reading of FastOCR, arXiv:2605.17447, which has no public code.
    """
    steps, layers, n = record.shape
    if steps < 2 or not 1 <= count <= layers or not 1 <= keep <= n:
        raise PruningError(
            f"focal_layers was asked for {count} of {layers} layers by {keep} of {n} tokens over {steps} steps; "
            "it needs two steps or more"
        )
    a = record.double()
    g = a.sum(dim=2).mean(dim=0)  # [L]
    focus = torch.zeros_like(a).scatter(2, a.topk(keep, dim=2).indices, 1.0)
    share = a / a.sum(dim=2, keepdim=True).clamp(min=1e-300)
    now = torch.einsum("tln,tmn->lm", focus, share) / steps  # [l, l'] = r
    before = torch.einsum("tln,tmn->lm", focus[:-1], share[1:]) / (steps - 1)  # with the focus of the step before
    chosen: list[int] = []
    for _ in range(count):
        left = [layer for layer in range(layers) if layer not in chosen]
        chosen.append(max(left, key=lambda layer: _caught(sorted([*chosen, layer]), g, now, before)))
    return tuple(sorted(chosen))


def _caught(focal: list[int], g: Tensor, now: Tensor, before: Tensor) -> float:
    total = 0.0
    for layer in range(len(g)):
        if layer not in focal:
            earlier = [f for f in focal if f < layer]
            total += float(g[layer] * (now[earlier[-1], layer] if earlier else before[focal[-1], layer]))
    return total


def change_point(curves: Tensor) -> Tensor:
    """Where a curve splits best into two constant pieces: the first index of the second one.

        argmin_c  sum_{i < c} (y_i - mean)^2 + sum_{i >= c} (y_i - mean)^2,    2 <= c <= L - 2

    Args:
        curves: [..., L], L >= 4.
    Returns:
        [...] int64. Ties go to the lower index.
    """
    y = curves.double() - curves.double().mean(dim=-1, keepdim=True)  # a shift changes nothing but the rounding
    length = y.shape[-1]
    if length < 4:
        raise PruningError(f"a change point needs at least 4 layers, got {length}")
    c = torch.arange(2, length - 1, device=y.device)
    total, squares = y.cumsum(dim=-1), y.square().sum(dim=-1, keepdim=True)
    head = total[..., c - 1]
    cost = squares - head.square() / c - (total[..., -1:] - head).square() / (length - c)
    return c[cost.argmin(dim=-1)]


def shift_layers(attention: Tensor, tokens: int) -> Tensor:
    """The layer at which each of the most attended visual tokens has had its say, for AdaptInfer's schedule.

    The `tokens` visual tokens with the most attention over all layers are taken, and the change point of each one's
    cumulative curve; the reported layer is the last of its first piece. Peaks of the histogram over many pictures are
    the layers to prune behind (stage = layer + 1).

    Args:
        attention: [L, V], text-to-vision attention of one picture.
        tokens: how many; the authors take 10 % of V.
    Returns:
        [tokens] int64, in ascending order of the tokens' attention.
    Source: AdaptInfer, arXiv:2508.06084; weiczh02/AdaptInfer-base@91b1784, prepocess.py.
    """
    busiest = attention.double().sum(dim=0).argsort(stable=True)[-tokens:]
    return change_point(attention.double()[:, busiest].T.cumsum(dim=1)) - 1
