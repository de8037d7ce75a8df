"""What a removal is held against: an eager, unwrapped model in which the same tokens are masked away.

The wrapped run decides which tokens go; its trace says which they were, and the reference masks exactly these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vlprune import Budget, Context, Plan, Pruner, Selection, Stage, Step, Trace
from vlprune.releases import cache_of

TOLERANCE = 1e-4  # float32; the same sums in another order
MATTERS = 0.1  # masking these tokens moves the logits by more than this, so a removal that does nothing cannot pass


@dataclass(frozen=True)
class Uneven(Pruner):
    """Keeps the tokens above the mean of one channel, at least one: other counts for every picture."""

    channel: int = 0

    name = "uneven"
    adaptive = True
    needs = frozenset({"features"})

    def select(self, ctx: Context) -> Selection:
        x = ctx.features[:, self.channel].float()
        above = (x > x.mean()).nonzero()[:, 0][: ctx.keep]
        return Selection(above if len(above) else x.argmax()[None], scores=x)


def uneven(*stages: str, **options: Any) -> Plan:
    """One step of `Uneven` per stage, with falling budgets: 0.8, 0.5, 0.25."""
    shares = (0.8, 0.5, 0.25)
    return Plan(tuple(Step(Uneven(i), Stage(s), Budget(shares[i])) for i, s in enumerate(stages)), **options)


def kept(trace: Trace, ids: Tensor, visual: list[int], stages: tuple[str, ...] = ()) -> dict[int, Tensor]:
    """{layer: [B, T] bool, False where a token is gone from that layer on}, read from a trace.

    stages: look at these only; all stages in front of or inside the language model by default.
    """
    start = starts(ids, visual, trace)
    alive: dict[int, Tensor] = {}
    for stage in trace.stages:
        if stage.stage in ("cache", "decode") or (stages and stage.stage not in stages):
            continue
        layer = int(stage.stage) if stage.stage.isdigit() else 0
        keep = alive.setdefault(layer, torch.ones(ids.shape, dtype=torch.bool))
        for item in stage.items:
            first = start[item.row, item.picture]
            size = next(p.tokens for p in trace.pictures if (p.row, p.picture) == (item.row, item.picture))
            keep[item.row, first : first + size] &= torch.isin(torch.arange(size), torch.tensor(item.cells_kept()))
    return alive


def starts(ids: Tensor, visual: list[int], trace: Trace) -> dict[tuple[int, int], int]:
    """Where each picture of a trace begins in its prompt: (row, picture) -> position."""
    found = {}
    for row, tokens in enumerate(ids.tolist()):
        sizes = [p.tokens for p in trace.pictures if p.row == row]
        at = number = 0
        for is_visual, run in groupby(tokens, lambda t: t in visual):
            end = at + len(list(run))
            while is_visual and at < end:
                found[row, number] = at
                at, number = at + sizes[number], number + 1
            at = end
    return found


@contextmanager
def masked(model: Any, alive: dict[int, Tensor]) -> Iterator[Any]:
    """Mask columns in every layer >= k that `alive[k]` [B, T] lacks; `model` must run eager and unwrapped."""
    handles = []

    def hook(keep: Tensor) -> Any:
        def mask(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            m = kwargs["attention_mask"]
            assert m.dim() == 4, "the reference must run eager"
            assert m.dtype != torch.bool, "the reference must run eager"
            columns = m.shape[-1]
            column = torch.arange(columns) + _offset(module, args, kwargs, columns)
            dead = torch.zeros(keep.shape[0], columns, dtype=torch.bool)
            inside = column < keep.shape[1]
            dead[:, inside] = ~keep[:, column[inside]]
            m = m.expand(keep.shape[0], -1, -1, -1).masked_fill(dead[:, None, None], torch.finfo(m.dtype).min)
            return args, {**kwargs, "attention_mask": m}

        return mask

    for i, layer in enumerate(text_model(model).layers):
        gone = [k for at, k in alive.items() if at <= i]
        if gone:
            handles.append(layer.register_forward_pre_hook(hook(torch.stack(gone).all(0)), with_kwargs=True))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def beams_see_their_pictures(model: Any, inputs: Any) -> bool:
    """Whether the bare library gives every beam the pictures of its own prompt; older releases mix up those of several."""
    seen: list[Tensor] = []
    hook = text_model(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        model(**inputs)
        model.generate(**inputs, num_beams=2, max_new_tokens=1, do_sample=False)
    except (ValueError, RuntimeError):  # counts of placeholders and features that no longer fit
        return False
    finally:
        hook.remove()
    return apart(seen[0].repeat_interleave(2, 0), seen[1]) < TOLERANCE


def text_model(model: Any) -> Any:
    core = model.model
    return getattr(core, "language_model", None) or core.text_model


def _offset(module: Any, args: Any, kwargs: dict[str, Any], columns: int) -> int:
    """The first column of a mask built for a trimmed sliding window is not position 0."""
    cache = cache_of(kwargs)
    if cache is None:
        return 0
    layer = cache.layers[module.self_attn.layer_idx]
    before = int(layer.get_seq_length()) if layer.is_initialized else 0
    return before + args[0].shape[1] - columns


@contextmanager
def rewritten(model: Any, layer: int, change: Any) -> Iterator[Any]:
    """Let `change` rewrite the hidden states that enter a decoder layer of the prefill, [B, T, D] -> [B, T, D]."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return None if args[0].shape[1] == 1 else ((change(args[0]), *args[1:]), kwargs)

    handle = text_model(model).layers[layer].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield model
    finally:
        handle.remove()


def decode(model: Any, inputs: Any, steps: int = 8, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Greedy tokens [B, steps], their logits [B, steps, V], the cache."""
    out = model.generate(**inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True,
                         **options)  # fmt: skip
    return out.sequences[:, -steps:], torch.stack(out.logits, 1), cache_of(out)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return float((a.float() - b.float()).abs().max())
