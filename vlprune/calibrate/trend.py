"""How attention grows along a picture: the trend that `debias` divides by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlprune.api import adapter_of, pruning, trace
from vlprune.context import Context
from vlprune.errors import PruningError
from vlprune.plan import Budget, Plan, Step
from vlprune.pruners.debias import Debias
from vlprune.trace import ItemTrace

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


@dataclass(frozen=True, eq=False)
class PositionalTrend:
    """A host's trend on one model, and the host rid of it.

    curve: mean score at equally spaced places from the first token to the last, every picture's scores divided by their
        mean; 0 where none was used.
    """

    plan: Plan
    trend: Trend
    curve: Tensor
    pictures: int


@torch.no_grad()
def positional_trend(
    model: nn.Module,
    inputs_list: Iterable[Mapping[str, Any]],
    host: str | Plan = "fastv@2",
    keep: float | int = 0.333,
    sizes: Sequence[Sequence[tuple[int, int]]] | None = None,
    places: int = 48,
    **options: Any,
) -> PositionalTrend:
    """Measure how a host's score grows along the picture, and wrap the host in `debias` with what was found.

    The result's plan prunes with `vlprune.wrap`, reads back from its text, and lies beside a checkpoint after
    `plan.save_pretrained`. Calibrate on other pictures than those the plan is judged by.

    Args:
        inputs_list: batches of prompts as the model's processor makes them, some hundred pictures in all.
        host: a plan or its text; of several steps the first is corrected, as in the authors' code.
        keep: the budget of the plan, unless `host` names it. Scores are those before anything is removed.
        sizes: for every batch what `vlprune.image_sizes` would be told, where pictures are padded to a square: padding
            is left out of the fit, as it attracts attention of its own. Row separators are not told apart.
        places: length of the curve; a trend is smooth, and tokens averaged with their neighbours leave less noise by
            which the fit could be misjudged. Lowered to the tokens of the shortest picture.
        options: other parameters of `debias`, such as padding or theta.
    Raises:
        SpecError, UnsupportedStage: `debias` or the model cannot take the host. PruningError: no picture, or `sizes`
            for other pictures.
    Source: attention debiasing, arXiv:2508.17807, fits the mean score of many samples. That each picture counts the
        same, that padding is left out and that neighbours are averaged is ours; how many samples the authors took is
        not known.
    """
    plan = host if isinstance(host, Plan) else Plan.parse(host, None if "keep=" in host else keep)
    first, *rest = plan.steps
    rule = replace(first.pruner if isinstance(first.pruner, Debias) else Debias(first.pruner), **options)
    # two tokens are enough: all N are scored before any is removed
    probe = Plan((Step(rule.inner, first.stage, Budget(2)),))
    found: list[tuple[Tensor, Tensor]] = []  # scores and which of them to use, picture by picture
    with pruning(model, probe):
        for number, inputs in enumerate(inputs_list):
            adapter_of(model).core(**inputs)
            items = trace(model).stages[0].items
            told = [None] * len(items) if sizes is None else list(sizes[number])
            if len(told) != len(items):
                raise PruningError(f"batch {number} holds {len(items)} pictures, sizes names {len(told)}")
            pairs = zip(items, told, strict=True)
            found += [_scored(rule, item, size) for item, size in pairs if item.scores is not None]
    if not found:
        raise PruningError("no picture of more than two tokens was seen; a trend is made of many")
    curve, seen = _mean_curve(found, places)
    trend = fit_trend(curve, seen)
    step = Step(replace(rule, **trend.parameters), first.stage, first.budget)
    return PositionalTrend(Plan((step, *rest), plan.positions), trend, curve, len(found))


def _scored(rule: Debias, item: ItemTrace, size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    assert item.scores is not None
    scores = item.scores.double().cpu()
    padded = rule.padded(Context(keep=1, grids=(item.grid,), image_size=size), scores)
    use = torch.ones_like(scores, dtype=torch.bool) if padded is None else ~padded
    return scores / scores[use].mean().clamp(min=1e-300), use


def _mean_curve(found: Sequence[tuple[Tensor, Tensor]], places: int) -> tuple[Tensor, Tensor]:
    """Mean score at each of n places, every token counting at the nearest, and [n] bool, where there was any."""
    n = min(places, *(len(scores) for scores, _ in found))
    total, count = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for scores, use in found:
        place = (torch.arange(len(scores)) * (n - 1) / max(len(scores) - 1, 1)).round().long()[use]
        total.index_add_(0, place, scores[use])
        count.index_add_(0, place, torch.ones_like(scores[use]))
    return total / count.clamp(min=1), count > 0
