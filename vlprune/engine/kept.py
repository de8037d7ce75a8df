"""Which positions of a prompt a layer still holds, on the device (Kept) and as counts on the host (Layout)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

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

    def after(self, past: Kept) -> Kept:
        """This chunk's set (absolute positions) behind what an earlier turn left in the cache."""
        both = None if self.visual is None or past.visual is None else torch.cat([past.visual, self.visual], 1)
        shifts = [s for s in (past.shift, self.shift) if s is not None]
        return replace(self, index=torch.cat([past.index, self.index], 1), dense=self.dense and past.dense, visual=both,
                       stage=(past.stage, self.stage), shift=torch.stack(shifts).sum(0) if shifts else None)  # fmt: skip

    def subset(self, slots: Tensor, pads: Tensor, dense: bool, stage: Hashable) -> Kept:
        """What is left when only `slots` [B, P] stay; `pads` [B, P] marks those that are padding."""
        index = self.index.gather(1, slots).masked_fill(pads, -1)
        visual = None if self.visual is None else self.visual.gather(1, slots)
        return replace(self, index=index, visual=visual, dense=self.dense and dense, stage=(self.stage, stage))

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

    @property
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


@dataclass
class Shrink:
    """Turns the selections of a stage into one gather index."""

    layout: Layout
    kept: dict[tuple[int, int], Tensor]  # (row, item) -> [K] within the item
    rows: list[list[Span]] = field(default_factory=list)

    def run(self, stage: Hashable, device: torch.device) -> tuple[Tensor, Layout]:
        """The gather index [B, P] over current slots (pads point at slot 0) and the layout behind it."""
        counts = [sum(self._left(b, s) for s in row) for b, row in enumerate(self.layout.rows)]
        width = max(counts)
        template: list[Tensor] = []  # the gather index; a kept token has the first slot of its item so far
        place: list[Tensor] = []  # where in the flattened index the kept tokens are
        chosen: list[Tensor] = []
        rows = []
        for b, row in enumerate(self.layout.rows):
            at = width - counts[b]
            template.append(torch.zeros(at, dtype=torch.int64))
            spans = []
            for s in row:
                n = self._left(b, s)
                if s.item is not None and (b, s.item) in self.kept:
                    chosen.append(self.kept[b, s.item])
                    place.append(torch.arange(b * width + at, b * width + at + n))
                    template.append(torch.full((n,), s.start))
                else:
                    template.append(torch.arange(s.start, s.stop))
                spans.append(Span(at, n, s.item))
                at += n
            rows.append(tuple(spans))
        packed = upload(torch.cat([*template, *place]), device)  # one copy for both
        gather, places = packed.split([len(rows) * width, sum(map(len, chosen))])
        gather = gather.index_add(0, places, torch.cat(chosen).to(device)).view(len(rows), width)
        index = gather if self.layout.index is None else self.layout.index.gather(1, gather)
        pads = [width - c for c in counts]
        if any(pads):
            pad = torch.arange(width, device=device) < upload(pads, device)[:, None]
            index = index.masked_fill(pad, -1)
        return gather, Layout(tuple(rows), width, index, stage)

    def _left(self, row: int, span: Span) -> int:
        if span.item is None or (row, span.item) not in self.kept:
            return span.length
        return len(self.kept[row, span.item])


def expand(hidden: Tensor, layout: Layout, length: int) -> Tensor:
    """[B, P, D] -> [B, length, D]: a removed position repeats the nearest survivor before it.

    The first text token after a picture is predicted from the picture's last token; so defined, a loss over the
    expanded logits equals the loss of the really shorter sequence.
    """
    assert layout.index is not None
    index = layout.index
    batch, slots = index.shape
    slot = torch.full((batch, length + 1), -1, dtype=torch.int64, device=index.device)
    slot.scatter_(1, torch.where(index < 0, length, index), torch.arange(slots, device=index.device).expand(batch, -1))
    slot = slot[:, :length].cummax(1).values
    first = (index < 0).sum(1, keepdim=True)  # positions before the first survivor show it
    slot = torch.where(slot < 0, first, slot).to(hidden.device)
    return hidden.gather(1, slot[..., None].expand(-1, -1, hidden.shape[-1]))
