"""Which positions of a prompt a layer still holds, on the device (Kept) and as counts on the host (Layout)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vlprune.ops import gather_tokens

# Logical position: a token's place in the prompt as the processor made it, padding included.
# Slot: a row of the tensors a layer really holds. Order is preserved and rows are right-aligned.


@dataclass(frozen=True, eq=False)
class Kept:
    """What one cache layer holds of a prompt. All layers between two stages share one object."""

    index: Tensor  # [B, P] int64, ascending logical positions; -1 marks a pad slot, only at the left
    upto: int  # logical tokens covered; later tokens follow implicitly: upto, upto + 1, ...
    dense: bool  # no pad slot anywhere, so a None mask may stay None
    stage: Hashable  # what made this set, turn by turn: memo key
    visual: Tensor | None = None  # [B, P] bool: the slot holds a visual token (decode-time selection only)
    shift: Tensor | None = None  # [B] removed tokens, for compact positions

    @property
    def slots(self) -> int:
        return self.index.shape[1]

    def select_rows(self, rows: Tensor) -> Kept:
        """The same for other batch rows: beams reorder, candidates repeat."""

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.index_select(0, rows.to(t.device))

        index = self.index.index_select(0, rows.to(self.index.device))
        return replace(self, index=index, visual=pick(self.visual), shift=pick(self.shift))

    def on(self, device: torch.device) -> Kept:
        """The same where a layer needs it: with `device_map`, layers lie on several devices."""
        if self.index.device == device:
            return self
        index, visual, shift = (None if t is None else t.to(device) for t in (self.index, self.visual, self.shift))
        assert index is not None
        return replace(self, index=index, visual=visual, shift=shift)

    def after(self, past: Kept) -> Kept:
        """This chunk's set (absolute positions) behind what an earlier turn left in the cache."""
        past = past.on(self.index.device)
        both = None if self.visual is None or past.visual is None else torch.cat([past.visual, self.visual], 1)
        shifts = [s for s in (past.shift, self.shift) if s is not None]
        return replace(self, index=torch.cat([past.index, self.index], 1), dense=self.dense and past.dense, visual=both,
                       stage=(past.stage, self.stage), shift=torch.stack(shifts).sum(0) if shifts else None)  # fmt: skip

    def subset(self, slots: Tensor, dense: bool, stage: Hashable) -> Kept:
        """What is left when only `slots` [B, P] stay; -1 is padding."""
        held, at = self.on(slots.device), slots.clamp(min=0)
        index = held.index.gather(1, at).masked_fill(slots < 0, -1)
        visual = None if held.visual is None else held.visual.gather(1, at)
        return replace(held, index=index, visual=visual, dense=self.dense and dense, stage=(self.stage, stage))

    def grown(self, upto: int) -> Kept:
        """The same with the tokens that followed it written out."""
        tail = torch.arange(self.upto, upto, device=self.index.device).expand(self.index.shape[0], -1)
        visual = None if self.visual is None else torch.cat([self.visual, torch.zeros_like(tail, dtype=torch.bool)], 1)
        return replace(self, index=torch.cat([self.index, tail], 1), upto=upto, visual=visual)

    @staticmethod
    def everything(batch: int, upto: int, stage: Hashable, device: torch.device, visual: bool = False) -> Kept:
        index = torch.arange(upto, device=device).expand(batch, -1)
        return Kept(index, upto, True, stage, torch.zeros_like(index, dtype=torch.bool) if visual else None)


@dataclass(frozen=True)
class Span:
    """A run of slots of one row: text (item None) or the tokens of one item."""

    start: int
    length: int
    item: int | None = None

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, eq=False)
class Layout:
    """The slots of a chunk while it runs. Counts are host numbers, so nothing later waits for the device."""

    rows: tuple[tuple[Span, ...], ...]  # per batch row, in order; padding is what they leave out
    width: int  # slots per row
    index: Tensor | None = None  # [B, width] chunk-local logical position of every slot, -1 pad; None: slot == position
    stage: Hashable = -1

    def index_on(self, device: torch.device) -> Tensor | None:
        return None if self.index is None else self.index.to(device)

    @cached_property
    def visual(self) -> int:
        """Visual tokens of all rows."""
        return sum(s.length for row in self.rows for s in row if s.item is not None)

    @cached_property
    def dense(self) -> bool:
        return all(sum(s.length for s in row) == self.width for row in self.rows)

    def last(self, row: int) -> int:
        """The slot of a row's last token."""
        return self.rows[row][-1].stop - 1 if self.rows[row] else self.width - 1

    def lasts(self, device: torch.device) -> Tensor | slice:
        """Slot of every row's last token: a slice where all end at the right edge, else [B, 1] indices."""
        ends = [self.last(b) for b in range(len(self.rows))]
        return slice(-1, None) if all(e == self.width - 1 for e in ends) else upload(ends, device)[:, None]

    @cached_property
    def _items(self) -> dict[tuple[int, int], Span]:
        return {(b, s.item): s for b, row in enumerate(self.rows) for s in row if s.item is not None}

    def item(self, row: int, item: int) -> Span:
        return self._items[row, item]

    def text_after(self, row: int, span: Span) -> list[int]:
        return [i for s in self.rows[row] if s.item is None and s.start >= span.stop for i in range(s.start, s.stop)]


def upload(values: list[int] | Tensor, device: torch.device) -> Tensor:
    """Host numbers as int64 on the device, without making the host wait."""
    host = torch.as_tensor(values, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


@dataclass(frozen=True, eq=False)
class Cut:
    """A removal as far as counts decide it: how many tokens each item keeps, and which slots they will have.

    It can be made, and be on the device, before a single token is chosen.
    """

    counts: Mapping[tuple[int, int], int]  # (row, item) -> K; items not named stay whole
    rows: tuple[tuple[Span, ...], ...]  # behind the cut
    width: int
    template: Tensor  # [B * P] int64 slots before the cut; a kept token has the first one of its item
    places: Tensor  # [sum of counts] where in the template the kept tokens stand, item by item
    pads: Tensor | None  # [B, P] bool

    @staticmethod
    def make(layout: Layout, counts: Mapping[tuple[int, int], int], device: torch.device) -> Cut:
        lefts = [[s.length if s.item is None else counts.get((b, s.item), s.length) for s in row]
                 for b, row in enumerate(layout.rows)]  # fmt: skip
        width = max(map(sum, lefts))
        template = np.zeros(len(lefts) * width, dtype=np.int64)
        at: dict[tuple[int, int], int] = {}
        rows = []
        for b, (row, left) in enumerate(zip(layout.rows, lefts, strict=True)):
            slot, spans = width - sum(left), []
            for s, n in zip(row, left, strict=True):
                first = b * width + slot
                if s.item is not None and (b, s.item) in counts:
                    at[b, s.item] = first
                    template[first : first + n] = s.start
                else:
                    template[first : first + n] = np.arange(s.start, s.stop)
                spans.append(Span(slot, n, s.item))
                slot += n
            rows.append(tuple(spans))
        places = [np.arange(at[key], at[key] + n) for key, n in counts.items()]
        pads = [width - sum(left) for left in lefts]
        parts = upload(
            torch.from_numpy(np.concatenate([template, *places, np.array(pads)])), device
        )  # one copy for all
        whole, chosen, missing = parts.split([len(template), sum(counts.values()), len(pads)])
        pad = torch.arange(width, device=device) < missing[:, None] if any(pads) else None
        return Cut(counts, tuple(rows), width, whole, chosen, pad)

    def after(self, stage: Hashable) -> Layout:
        """The layout behind the cut but for its index."""
        return Layout(self.rows, self.width, None, stage)

    def fill(self, layout: Layout, kept: Mapping[tuple[int, int], Tensor], stage: Hashable) -> tuple[Tensor, Layout]:
        """Put the choice in: slots of `layout` to gather [B, P], -1 at pads, and the layout behind.

        kept: (row, item) -> [K] within the item.
        """
        device = self.template.device
        chosen = torch.cat([kept[key] for key in self.counts]).to(device, non_blocking=True)
        slots = self.template.index_add(0, self.places, chosen).view(len(self.rows), self.width)
        index = slots if layout.index is None else layout.index.to(device).gather(1, slots)
        if self.pads is not None:
            slots, index = slots.masked_fill(self.pads, -1), index.masked_fill(self.pads, -1)
        return slots, Layout(self.rows, self.width, index, stage)


def expand(hidden: Tensor, layout: Layout, length: int) -> Tensor:
    """[B, P, D] -> [B, length, D]: a removed position repeats the nearest survivor before it.

    The first text token after a picture is predicted from the picture's last token; so defined, a loss over the
    expanded logits equals the loss of the really shorter sequence.
    """
    assert layout.index is not None
    index, ends = layout.index, torch.arange(length, device=layout.index.device)
    slot = torch.searchsorted(index, ends.expand(len(index), -1).contiguous(), right=True) - 1
    first = 0 if layout.dense else (index < 0).sum(1, keepdim=True)  # positions before the first survivor show it
    return gather_tokens(hidden, slot.clamp(min=first).to(hidden.device))
