"""Position tables and masks of the prompt, as the slots that are left see them.

The model builds its mask for the whole prompt. Rows and columns are picked from it, so what it means (causal, sliding,
bidirectional inside a picture) need not be known here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlprune.engine.cache import logical_end
from vlprune.engine.kept import Kept, Layout, upload
from vlprune.engine.run import Run
from vlprune.errors import PruningError


def rope(run: Run, layout: Layout, tables: tuple[Tensor, ...], compact: bool) -> tuple[Tensor, ...]:
    """cos and sin, [..., B or 1, T, d] -> [..., B, P, d]; older releases keep the axes of M-RoPE in front."""
    assert layout.index is not None
    at = layout.index.clamp(min=0)
    if compact:  # the n-th survivor takes the place of the n-th token
        assert run.opened is not None
        ranks = torch.zeros(at.shape, dtype=torch.int64)
        for row, before, now in zip(ranks, run.opened.rows, layout.rows, strict=True):
            left = sum(s.length for s in now)
            places = [torch.arange(s.start, s.stop) for s in before]
            row[layout.width - left :] = torch.cat(places)[:left] if places else 0
        at = upload(ranks, at.device)

    def pick(t: Tensor) -> Tensor:
        axes = t.shape[:-3]
        rows = at.to(t.device)[..., None].expand(*axes, -1, -1, t.shape[-1])
        return t.expand(*axes, len(at), -1, -1).gather(-2, rows)

    return tuple(pick(t) for t in tables)


def kept_by(run: Run, layout: Layout, before: Kept | None) -> Kept:
    """What the cache holds once this chunk is in, behind what it held `before` (None: everything)."""
    assert layout.index is not None
    index = layout.index
    if run.past:
        index = torch.where(index >= 0, index + run.past, index)
    kept = Kept(index, run.past + run.length, layout.dense, layout.stage, shift=run.shift)
    if not run.past:
        return kept
    if before is not None:
        return kept.after(before.grown(run.past))
    return kept.after(Kept.everything(len(index), run.past, layout.stage, index.device))


def convert(run: Run, config: Any, mask: Any, kept: Kept | None, lay: Any, x: Tensor, sliding: bool) -> Any:
    """The mask of a layer over the slots it really has.

    Args:
        mask: what the model built: None, bool or float [B or 1, H or 1, q, kv], or for flash [B, kv].
        kept: what the layer's cache holds; None: the keys are this chunk's survivors.
        lay: the cache layer.
        x: [B, P, D] the layer's input.
    """
    layout, batch, device, offset = run.shortened, x.shape[0], x.device, run.kv_offset.get(sliding, 0)
    query = None if layout is None else layout.index_on(device)
    if kept is not None:
        key = kept.index.to(device)
        flash = isinstance(mask, Tensor) and mask.dim() == 2  # ends with the last token, also on a static cache
        end = offset + mask.shape[-1] if flash else logical_end(lay, run.past + run.length)
        if end > kept.upto:
            key = torch.cat([key, torch.arange(kept.upto, end, device=device).expand(batch, -1)], 1)
        dense = kept.dense
    else:
        assert layout is not None and query is not None
        key, dense = query, layout.dense
    if isinstance(mask, Tensor):
        mask = mask.to(device)
    if sliding and counts_slots(run, config):
        return _near(run, config, mask, key)
    if mask is None and dense:
        return None  # order is preserved, so causal stays causal
    if mask is None:
        return _causal(run, config, key, query, x)
    if not isinstance(mask, Tensor):
        raise PruningError("flex attention's block masks cannot be pruned; use attn_implementation='sdpa'")
    column, gone = key, None
    if offset or not dense:  # pads, and what a trimmed window has left behind
        gone = key < offset
        column = (key - offset).clamp(min=0)
    if mask.dim() == 2:  # flash
        mask = mask.expand(batch, -1).gather(1, column)
        return mask if gone is None else mask.masked_fill(gone, 0)
    mask = mask.expand(batch, *mask.shape[1:])
    heads = mask.shape[1]
    if query is not None:
        rows = query.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, mask.shape[3])
        mask = mask.gather(2, rows)
    mask = mask.gather(3, column[:, None, None, :].expand(-1, heads, mask.shape[2], -1))
    off = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    if gone is not None:
        mask = mask.masked_fill(gone[:, None, None, :], off)
    if query is not None and layout is not None and not layout.dense:  # pad slots look anywhere: no row is empty
        mask = mask.masked_fill((query < 0)[:, None, :, None], True if mask.dtype == torch.bool else 0.0)
    return mask


def counts_slots(run: Run, config: Any) -> bool:
    """Whether the window is left to a flash kernel, which counts slots instead of positions, and has begun to slide."""
    return "flash" in config._attn_implementation and run.past + run.length > config.sliding_window


def _near(run: Run, config: Any, mask: Any, key: Tensor) -> Tensor:
    """[B, P] for one new token: slots inside the window and not padding."""
    window = config.sliding_window
    if run.length > 1:
        raise PruningError(f"this prompt is longer than the sliding window of {window}, and flash attention would count the "
                           "window in kept tokens; load the model with attn_implementation='sdpa'")  # fmt: skip
    near = key > run.past + run.length - 1 - window
    if mask is not None:
        column = key - run.kv_offset.get(True, 0)
        near = near & (mask.expand(len(key), -1).gather(1, column.clamp(min=0, max=mask.shape[-1] - 1)) != 0)
    return (near & (key >= 0)).long()


def _causal(run: Run, config: Any, key: Tensor, query: Tensor | None, x: Tensor) -> Tensor:
    """A mask for ragged rows where the model had built none."""
    implementation = config._attn_implementation
    if "flash" in implementation:
        return (key >= 0).long()
    if query is None:
        query = torch.arange(run.length, device=x.device).expand(x.shape[0], -1)
    at = query + run.past
    mask = ((key >= 0)[:, None, :] & (key[:, None, :] <= at[:, :, None]) | (query < 0)[:, :, None])[:, None]
    if implementation == "eager":
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        mask = torch.where(mask, zero, torch.finfo(x.dtype).min)
    return mask
