"""The reference every removal is held against: the same tokens masked away in an eager, unwrapped model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlprune import Context, Pruner, Selection
from vlprune.plan import Budget, Plan, Stage, Step


def random_keep(ids: Tensor, visual: list[int], share: float, seed: int = 0) -> Tensor:
    """[B, T] bool, differing counts per row; text is always kept."""
    g = torch.Generator().manual_seed(seed)
    return ~torch.isin(ids, torch.tensor(visual)) | (torch.rand(ids.shape, generator=g) < share)


@dataclass(frozen=True, eq=False)
class Fixed(Pruner):
    """Keeps given tokens: `share` of each item, drawn by its features' fingerprint. Adaptive, so counts differ by item."""

    share: float = 0.4
    seed: int = 0

    adaptive = True
    needs = frozenset({"features"})
    name = "fixed"

    def select(self, ctx: Context) -> Selection:
        n = ctx.tokens
        g = torch.Generator().manual_seed(self.seed * 1000 + n)
        keep = torch.rand(n, generator=g) < self.share
        keep[int(torch.randint(0, n, (1,), generator=g))] = True
        kept = keep.nonzero()[:, 0][: ctx.keep]
        return Selection(kept)


def fixed_plan(stages: dict[str, float], **options: Any) -> Plan:
    """Steps of `Fixed`, one per stage, with a budget that never binds but is below all."""
    return Plan(tuple(Step(Fixed(share, i), Stage(s), Budget(0.999)) for i, (s, share) in enumerate(stages.items())), **options)


@contextmanager
def masked(model: Any, alive: dict[int, Tensor]) -> Iterator[Any]:
    """Mask columns in every layer >= k that `alive[k]` [B, T] lacks; `model` must run eager and unwrapped."""
    core = model.model
    text = getattr(core, "language_model", None) or core.text_model
    handles = []

    def hook(keep: Tensor) -> Any:
        def mask(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            m = kwargs["attention_mask"]
            assert m is not None and m.dim() == 4 and m.dtype != torch.bool
            columns = m.shape[-1]
            column = torch.arange(columns) + _offset(module, args, kwargs, columns)
            dead = torch.zeros(keep.shape[0], columns, dtype=torch.bool)
            inside = column < keep.shape[1]
            dead[:, inside] = ~keep[:, column[inside]]
            m = m.expand(keep.shape[0], -1, -1, -1).masked_fill(dead[:, None, None], torch.finfo(m.dtype).min)
            return args, {**kwargs, "attention_mask": m}

        return mask

    for i, layer in enumerate(text.layers):
        gone = [k for at, k in alive.items() if at <= i]
        if gone:
            handles.append(layer.register_forward_pre_hook(hook(torch.stack(gone).all(0)), with_kwargs=True))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _offset(module: Any, args: Any, kwargs: dict[str, Any], columns: int) -> int:
    """The first column of a mask built for a trimmed sliding window is not position 0."""
    cache = kwargs.get("past_key_values")
    if cache is None:
        return 0
    layer = cache.layers[module.self_attn.layer_idx]
    before = int(layer.get_seq_length()) if layer.is_initialized else 0
    return before + args[0].shape[1] - columns


def decode(model: Any, inputs: Any, steps: int = 8, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Greedy tokens [B, steps], their logits [B, steps, V], the cache."""
    out = model.generate(**inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True,
                         **options)  # fmt: skip
    return out.sequences[:, -steps:], torch.stack(out.logits, 1), out.past_key_values
