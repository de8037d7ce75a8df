"""Which layers see where a model is looking: `fastocr`'s focal layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.api import adapter_of, pruning, trace
from vlprune.context import Context
from vlprune.errors import PruningError
from vlprune.plan import Budget
from vlprune.pruner import DecodePruner
from vlprune.selection import Selection


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
    model: nn.Module,
    inputs_list: Iterable[Mapping[str, Any]],
    steps: int = 64,
    keep: float | int = 0.05,
    count: int = 2,
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
