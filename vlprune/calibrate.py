"""What a pruner can learn from a model once, offline: the mathematics on recorded tensors, then how to record them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlprune.api import adapter_of, pruning, trace
from vlprune.context import Context
from vlprune.errors import PruningError
from vlprune.plan import Budget, Plan, Step
from vlprune.pruner import DecodePruner
from vlprune.pruners.debias import Debias
from vlprune.selection import Selection
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


def focal_layers(record: Tensor | Sequence[Tensor], keep: int | Sequence[int], count: int = 2) -> tuple[int, ...]:
    """Layers whose attention best predicts what the others will look at, ascending: `fastocr`'s ``focal_layers``.

    With a_{l,t} the attention of the token decoded at step t in layer l, and S the K tokens it is highest on,

        g_l = mean_t sum_j a_{l,t,j}        r_{l -> l'} = mean_t sum_{j in S(a_{l,t})} a_{l',t,j} / sum_j a_{l',t,j}

    F grows greedily by the layer that makes ``sum_{l' not in F} g_l' r_{phi(l') -> l'}`` largest, phi(l') being the
    last layer of F before l', or for layers before all of F its last layer at the previous step. Ties go to the lower
    layer.

    Args:
        record: [T, L, N], probabilities over the whole cache, averaged over heads and cut to the visual tokens, of T
            steps of dense decoding that follow each other; T >= 2. Several records, of any T and N, count by
            their steps.
        keep: K, of each record if they differ. count: size of F, at most L.
    Raises:
        PruningError: a record too short, or `count` or `keep` out of range.
    Source: our reading of FastOCR, arXiv:2605.17447, which has no public code.
    """
    records = [record] if isinstance(record, Tensor) else list(record)
    budgets = [keep] * len(records) if isinstance(keep, int) else list(keep)
    for r, k in zip(records, budgets, strict=True):
        steps, layers, n = r.shape
        if steps < 2 or not 1 <= count <= layers or not 1 <= k <= n:
            raise PruningError(
                f"focal_layers was asked for {count} of {layers} layers by {k} of {n} tokens over {steps} steps; "
                "it needs two steps or more"
            )
    if not records:
        raise PruningError("focal_layers needs a record")
    parts = [_transfer(r.double(), k) for r, k in zip(records, budgets, strict=True)]
    total = sum(len(r) for r in records)
    g = sum((p[0] for p in parts), torch.zeros(())) / total
    now = sum((p[1] for p in parts), torch.zeros(())) / total
    before = sum((p[2] for p in parts), torch.zeros(())) / (total - len(records))
    layers = len(g)
    chosen: list[int] = []
    for _ in range(count):
        left = [layer for layer in range(layers) if layer not in chosen]
        chosen.append(max(left, key=lambda layer: _caught(sorted([*chosen, layer]), g, now, before)))
    return tuple(sorted(chosen))


def _transfer(a: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the steps of one record [T, L, N]: g_l, r_{l -> l'}, and r with the focus of the step before."""
    focus = torch.zeros_like(a).scatter(2, a.topk(keep, dim=2).indices, 1.0)
    share = a / a.sum(dim=2, keepdim=True).clamp(min=1e-300)
    now = torch.einsum("tln,tmn->lm", focus, share)
    return a.sum(dim=(0, 2)), now, torch.einsum("tln,tmn->lm", focus[:-1], share[1:])


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


# ---- on a model


Inputs = Mapping[str, Any]  # keyword arguments of a model's forward pass: a batch of prompts with pictures


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
    inputs_list: Iterable[Inputs],
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


@dataclass(frozen=True)
class EntropyCurve:
    """Matrix entropy of the visual tokens, layer by layer.

    curve: E_0..E_L, means over pictures of what enters layer 0, 1, ..., and of the output of the decoder.
    layer: the stage K for ``entropyprune@K``. stands_out: whether a drop was clear enough; if not, K is the fallback.
    """

    curve: tuple[float, ...]
    layer: int
    stands_out: bool
    pictures: int

    def plot(self, axes: Any = None) -> Any:
        """Draw the curve and the chosen layer; returns the matplotlib axes. ImportError without matplotlib."""
        if axes is None:
            from matplotlib import pyplot

            axes = pyplot.figure(figsize=(6, 3.5), layout="constrained").add_subplot()
        axes.plot(range(len(self.curve)), self.curve, marker="o", markersize=3)
        label = f"cut before layer {self.layer}" + ("" if self.stands_out else " (fallback)")
        axes.axvline(self.layer, linestyle="--", color="0.5", label=label)
        axes.set(xlabel="decoder layer entered", ylabel="matrix entropy of visual tokens")
        axes.legend()
        return axes


@torch.no_grad()
def entropy_collapse_layer(model: nn.Module, inputs_list: Iterable[Inputs], fallback: int = 2) -> EntropyCurve:
    """The Entropy Collapse Layer of a model: where EntropyPrune cuts, and the curve it is read from.

    All tokens are there, also if the model is wrapped. The last value of the curve is behind the decoder's final norm,
    which is what transformers reports.

    Args:
        inputs_list: batches of prompts as the model's processor makes them; a few dozen pictures.
        fallback: K where no early drop stands out.
    Raises:
        PruningError: no picture was seen.
    Source: EntropyPrune, arXiv:2602.17196; the paper's idea, `matrix_entropy` and `entropy_collapse` in our reading.
    """
    curves: list[Tensor] = []
    adapter = adapter_of(model)
    with pruning(model, "random", 1.0):  # keeps all, bit by bit, and counts the tokens of every picture
        for inputs in inputs_list:
            states = adapter.core(**inputs, output_hidden_states=True, use_cache=False).hidden_states
            ids = inputs["input_ids"]
            visual = torch.isin(ids, torch.tensor(list(adapter.visual_ids.values()), device=ids.device))
            taken = [0] * len(ids)
            for item in trace(model).pictures:
                places = visual[item.row].nonzero()[:, 0][taken[item.row] :][: item.tokens]
                taken[item.row] += item.tokens
                curves.append(torch.stack([matrix_entropy(h[item.row, places.to(h.device)]).cpu() for h in states]))
    if not curves:
        raise PruningError("no picture was seen; the entropy is that of a picture's tokens")
    curve = tuple(torch.stack(curves).mean(dim=0).tolist())
    found = entropy_collapse(curve, fallback=-1)
    return EntropyCurve(curve, fallback if found < 0 else found, found >= 0, len(curves))


@dataclass(frozen=True)
class FocalLayers:
    """Which layers see where a model is looking.

    layers: for FastOCR, ascending. mass: [L] attention paid to a picture's tokens, of all attention. concentration: [L]
    share of it on the K tokens looked at most. All are means over decode steps. steps: how many, of all pictures.
    """

    layers: tuple[int, ...]
    mass: tuple[float, ...]
    concentration: tuple[float, ...]
    steps: int

    @property
    def parameter(self) -> str:
        """As in ``fastocr:keep=0.05:focal_layers=2/9``."""
        return "/".join(map(str, self.layers))


@torch.no_grad()
def focal_layers_of(
    model: nn.Module, inputs_list: Iterable[Inputs], steps: int = 64, keep: float | int = 0.05, count: int = 2
) -> FocalLayers:
    """FastOCR's focal layers for a model, from its own dense decoding.

    Args:
        inputs_list: batches of prompts as the model's processor makes them, pages to be read; a few are enough. Answers
            of fewer than three tokens say nothing.
        steps: new tokens of every prompt at most; a row ends with its end-of-sequence token.
        keep: the budget FastOCR is to run with. count: number of focal layers.
    Raises:
        PruningError: no answer was long enough.
    Source: our reading of FastOCR, arXiv:2605.17447: `focal_layers`, on attention recorded while every layer is focal,
        so that the model decodes as it does unpruned.
    """
    records: list[Tensor] = []
    adapter = adapter_of(model)
    for inputs in inputs_list:
        watch = _Watch()
        with pruning(model, watch, 2):  # every layer is focal and attends to all, so the budget has no effect
            ids: Any = model.generate(**inputs, max_new_tokens=steps, do_sample=False)  # type: ignore[operator]
            pictures = trace(model).pictures
        new = ids[:, inputs["input_ids"].shape[1] :]
        for item, rows in zip(pictures, watch.items, strict=True):
            read = min(_answer(new[item.row], model), len(rows) // len(adapter.layers))
            if read > 1:
                records.append(torch.stack(rows).view(-1, len(adapter.layers), item.tokens)[:read])
    if not records:
        raise PruningError("no picture came with an answer of three tokens or more; give prompts that ask for text")
    budgets = [Budget(keep).count(r.shape[2]) for r in records]
    total = sum(len(r) for r in records)
    mass = sum((r.double().sum(dim=(0, 2)) for r in records), torch.zeros(())) / total
    pairs = zip(records, budgets, strict=True)
    focused = (r.double().topk(k, dim=2).values.sum(2) / r.double().sum(2).clamp(min=1e-300) for r, k in pairs)
    concentration = sum((f.sum(dim=0) for f in focused), torch.zeros(())) / total
    layers = focal_layers(records, budgets, count)
    return FocalLayers(layers, tuple(mass.tolist()), tuple(concentration.tolist()), total)


def _answer(new: Tensor, model: Any) -> int:
    """Decode steps before the end-of-sequence token came out; the first new token is the prefill's."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    stop = torch.isin(new, torch.tensor(ends, device=new.device, dtype=new.dtype)).nonzero()
    return int(stop[0]) if len(stop) else len(new) - 1


@dataclass(frozen=True, eq=False)
class _Watch(DecodePruner):
    """Chooses nothing that matters and writes down the attention of every layer, step and picture."""

    items: list[list[Tensor]] = field(default_factory=list)  # per picture: layer after layer, step after step, [N]

    name = "watch"

    def focal(self, layers: int) -> tuple[int, ...]:
        return tuple(range(layers))

    def start(self, ctx: Context) -> int:
        self.items.append([])
        return -len(self.items)  # negative: the prompt's own last row comes first, of the last layer alone

    def step(self, ctx: Context, state: int) -> tuple[Selection, int]:
        assert ctx.last_attention is not None
        if state > 0:
            self.items[state - 1].append(ctx.last_attention.float().mean(dim=0).cpu())
        return Selection(torch.arange(ctx.keep, device=ctx.device)), abs(state)
