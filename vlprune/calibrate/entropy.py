"""Where the matrix entropy of visual tokens collapses: the layer for `entropyprune`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.api import adapter_of, pruning, trace
from vlprune.errors import PruningError


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
def entropy_collapse_layer(
    model: nn.Module, inputs_list: Iterable[Mapping[str, Any]], fallback: int = 2
) -> EntropyCurve:
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
