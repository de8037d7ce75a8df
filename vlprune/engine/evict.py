"""Stage "cache": rows leave the cache of a layer, for rules that see one picture or all tokens of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vlprune.engine.cache import refill
from vlprune.engine.contexts import Stand
from vlprune.engine.kept import Cut, Kept, Layout, Span, upload
from vlprune.engine.run import Visual
from vlprune.errors import PruningError
from vlprune.plan import Step
from vlprune.pruner import CachePruner
from vlprune.selection import Selection

Chosen = dict[tuple[int, int], Selection]  # (row, item) -> its choice


def drop(cache: Cache, i: int, held: Kept, layout: Layout, cut: Cut, chosen: Chosen, past: int) -> Layout:
    """Drop rows of layer `i`: of the chunk that `layout` describes, behind `past` slots, only the chosen tokens stay.

    held: what the layer holds before. Returns the layout of what is left.
    """
    lay: Any = cache.layers[i]
    slots, after = cut.fill(layout, {k: s.kept for k, s in chosen.items()}, -1)
    if past:
        earlier = torch.arange(past, device=slots.device).expand(len(slots), -1)
        slots = torch.cat([earlier, torch.where(slots < 0, slots, slots + past)], 1)
    rows, merged = slots, []
    if any(s.heads is not None for s in chosen.values()):
        rows = slots[:, None].repeat(1, lay.keys.shape[1], 1)
    for (row, item), s in chosen.items():
        if s.heads is None:
            continue
        old, new = layout.item(row, item), after.item(row, item)
        to = slice(past + new.start, past + new.stop)
        rows[row, :, to] = s.heads.kept + past + old.start
        if s.heads.merge is not None:
            whole = slice(past + old.start, past + old.stop)
            merged.append((row, to, s.heads.apply(lay.keys[row, :, whole]), s.heads.apply(lay.values[row, :, whole])))
    refill(cache, i, held.subset(slots, after.dense, ("cache", i)), rows)
    now: Any = cache.layers[i]
    for row, to, keys, values in merged:
        now.keys[row, :, to], now.values[row, :, to] = keys, values
    return after


# ---- rules that choose among all tokens of a prompt


def takes_all(step: Step) -> bool:
    return isinstance(step.pruner, CachePruner) and step.pruner.tokens == "all"


def tokens_of(layout: Layout, row: int) -> int:
    """Tokens of a row, text included and padding not."""
    return sum(s.length for s in layout.rows[row])


@dataclass(frozen=True, eq=False)
class Whole:
    """A chunk whose rows are chosen from as wholes: each is one item, numbered as the row."""

    layout: Layout  # of pictures and text
    rows: Layout

    @staticmethod
    def of(layout: Layout) -> Whole:
        rows = []
        for b, row in enumerate(layout.rows):
            span = Span(row[0].start, row[-1].stop - row[0].start, b) if row else None
            if span is not None and span.length != tokens_of(layout, b):
                raise PruningError("a prompt with padding between its tokens cannot be chosen from as a whole; pad on one side, or "
                                   "write tokens=visual")  # fmt: skip
            rows.append((span,) if span is not None else ())
        return Whole(layout, Layout(tuple(rows), layout.width, layout.index, layout.stage))

    def choose(self, stand: Stand, step: Step, groups: list[tuple[int, list[Visual], int]]) -> Chosen:
        """Ask the pruner row by row."""
        chosen = {}
        for row, _, keep in groups:
            ctx = stand.whole(row, keep)
            with torch.no_grad():
                selection = step.pruner.select(ctx)
            chosen[row, row] = selection.check(ctx.tokens, keep, step.pruner.adaptive)
        return chosen

    def visual_left(self, chosen: Chosen) -> Tensor:
        """Visual tokens of the batch that stay, a mean over key heads: 0-dimensional float32."""
        device = next(iter(chosen.values())).kept.device
        total = torch.zeros((), device=device)
        for b, row in enumerate(self.layout.rows):
            marks = [int(s.item is not None) for s in row for _ in range(s.length)]
            if (b, b) in chosen:
                s = chosen[b, b]
                kept = s.kept[None] if s.heads is None else s.heads.kept
                total = total + upload(marks, device)[kept].sum(dim=1).float().mean()
            else:
                total = total + sum(marks)
        return total

    def per_picture(self, visuals: list[Visual], chosen: Chosen) -> Chosen:
        """What is left of every picture. Counts are known only on the device: one wait each."""
        out = {}
        for v in visuals:
            if (v.row, v.row) in chosen:
                s, span = chosen[v.row, v.row], self.layout.item(v.row, v.item)
                first = span.start - self.rows.item(v.row, v.row).start
                inside = s.kept[(s.kept >= first) & (s.kept < first + span.length)] - first
                scores = None if s.scores is None else s.scores[first : first + span.length]
                out[v.row, v.item] = Selection(inside, None, scores)
        return out
