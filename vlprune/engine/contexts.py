"""What a pruner gets to see at a decoder stage, built from views wherever a view will do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor

from vlprune.context import Context
from vlprune.engine.adapter import Adapter
from vlprune.engine.kept import Layout, Span, upload
from vlprune.engine.run import Run, Visual
from vlprune.engine.tap import Seen
from vlprune.engine.vision import ATTENTION_FIELDS, Vision
from vlprune.errors import PruningError

TOWER_FIELDS = frozenset({"cls_attention", "received_attention", "encoder_rows", "encoder_features"})
LAYER_FIELDS = frozenset({"queries", "keys", "values", "last_query", "last_value", "text_keys", "last_attention",
                          "text_attention", "text_self_attention", "prompt_attention", "query_sum"})  # fmt: skip
ROWS_AT_ONCE = 256  # attention rows that are held while their columns are summed
DEFAULTS = {name: field.default for name, field in Context.__dataclass_fields__.items()}
ALONG_TOKENS = {
    "guide": 0,
    "features": 0,
    "embeddings": 0,
    "encoder_features": 0,
    "index": 0,
    "newline": 0,
    "text_attention": 2,
}


@dataclass(frozen=True)
class Returning:
    """A module of the model as a function whose answer lies where the question did, on whatever device it was worked out."""

    module: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x).to(x.device)


@dataclass(eq=False)
class Stand:
    """Everything one stage needs to build its Contexts, which show all tensors on one device."""

    run: Run
    adapter: Adapter
    vision: Vision
    needs: frozenset[str]
    layout: Layout  # slots of this chunk as the stage finds them
    hidden: Tensor | None  # [B, P, D] at decoder stages
    seen: Seen | None = None  # the layer that has just run; None before the first
    ahead: Seen | None = None  # the stage's own layer, projected ahead of time
    layer: int | None = None
    sizes: list[tuple[int, int]] | None = None  # (width, height) of the pictures, if the caller told
    guide: list[Tensor] | None = None  # [N] scores of every picture, if the caller gave some
    memo: dict[Any, Tensor] = field(default_factory=dict)

    @cached_property
    def _device(self) -> torch.device:
        source = self.hidden if self.seen is None else self.seen.query
        assert source is not None
        return source.device

    @cached_property
    def _hidden(self) -> Tensor | None:
        """[B, P, D]"""
        return None if self.hidden is None else self.hidden.to(self._device)

    @cached_property
    def _embeddings(self) -> Tensor | None:
        """[B, T, D]"""
        return None if self.run.embeddings is None else self.run.embeddings.to(self._device)

    @cached_property
    def _index(self) -> Tensor | None:
        """[B, P]"""
        return self.layout.index_on(self._device)

    def context(self, row: int, visuals: list[Visual], keep: int) -> Context:
        """The Context of one item, or of several in one row for scope="prompt"."""
        spans = [self.layout.item(row, v.item) for v in visuals]
        parts = [self._item(row, v, s, spans[-1]) for v, s in zip(visuals, spans, strict=True)]
        if len(parts) > 1:
            _number_through(parts, visuals)
        fields: dict[str, Any] = {}
        for name in parts[0]:
            values = [p[name] for p in parts]
            whole = len(values) == 1 or values[0] is None
            fields[name] = values[0] if whole else _joined(values, ALONG_TOKENS.get(name, 1))
        fields |= self._shared(row, spans[-1])
        sizes = [self._size(v) for v in visuals]
        return _context(keep=keep, grids=tuple(g for v in visuals for g in v.info.grids), layer=self.layer,
                        layers=len(self.adapter.layers), image_size=sizes[0] if len(sizes) == 1 else None, **fields)  # fmt: skip

    def whole(self, row: int, keep: int) -> Context:
        """The Context of all tokens of a row, text included; text rows are those behind its last picture."""
        spans = self.layout.rows[row]
        span = Span(spans[0].start, spans[-1].stop - spans[0].start)
        end = [s for s in spans if s.item is not None][-1]
        fields = self._attention(row, span, end) | self._shared(row, end)
        if "is_text" in self.needs:
            marks = [int(s.item is None) for s in spans for _ in range(s.length)]
            fields["is_text"] = upload(marks, self._device).bool()
        return _context(keep=keep, layer=self.layer, layers=len(self.adapter.layers), **fields)

    def _size(self, visual: Visual) -> tuple[int, int] | None:
        if self.sizes is None:
            return None
        if visual.source >= len(self.sizes):
            raise PruningError(f"image_sizes names {len(self.sizes)} pictures, but the model was given more; it needs one entry "
                               "per picture, in the processor's order")  # fmt: skip
        return self.sizes[visual.source]

    def _guide(self, visual: Visual) -> Tensor:
        """[N] scores from outside, of the tokens that the picture had at first."""
        if self.guide is None:
            raise PruningError("this plan ranks by scores from outside and was given none; run the model inside "
                               "`with vlprune.guided(model, scores):`")  # fmt: skip
        if visual.source >= len(self.guide):
            raise PruningError(
                f"vlprune.guided was given scores for {len(self.guide)} pictures, but the model was given more"
            )
        scores = self.guide[visual.source]
        if scores.shape != (visual.tokens,):
            raise PruningError(f"picture {visual.source} has {visual.tokens} visual tokens, but scores of shape "
                               f"{tuple(scores.shape)} were given; a guiding model must cut pictures into the same tokens")  # fmt: skip
        return scores.to(self._device, torch.float32, non_blocking=True)

    def _item(self, row: int, v: Visual, span: Span, end: Span) -> dict[str, Any]:
        """Fields with one entry per visual token; text rows are those behind `end`."""
        needs, cut = self.needs, slice(span.start, span.stop)
        out: dict[str, Any] = {}
        index = None
        if self._index is not None:
            index = self._index[row, cut] - v.start
        out["index"] = index
        if "features" in needs and self._hidden is not None:
            out["features"] = self._hidden[row, cut]
        if "embeddings" in needs and self._embeddings is not None:
            logical = slice(v.start, v.start + v.tokens) if index is None else index + v.start
            out["embeddings"] = self._embeddings[row, logical]
        if v.info.newline is not None:
            newline = v.info.newline.to(self._device, non_blocking=True)
            out["newline"] = newline if index is None else newline[index]
        if "guide" in needs:
            guide = self._guide(v)
            out["guide"] = guide if index is None else guide[index]
        tower = needs & (TOWER_FIELDS | (ATTENTION_FIELDS if self.seen is None and self.ahead is None else frozenset()))
        if tower:
            for name, value in self.vision.fields(v.tape, v.source, tower, self._device).items():
                out[name] = value if index is None else _picked(value, index, ALONG_TOKENS.get(name, 1))
        if self.seen is not None:
            out |= self._attention(row, span, end)
        if self.ahead is not None and "next_attention" in needs:
            out["next_attention"] = self._last(self.ahead, row, span)
        return out

    def _attention(self, row: int, span: Span, end: Span) -> dict[str, Any]:
        assert self.seen is not None
        seen, needs, out = self.seen, self.needs, {}
        slots, columns = slice(span.start, span.stop), _columns(seen, span)
        if "queries" in needs:
            out["queries"] = seen.query[row, :, slots]
        for name, tensor in (("keys", seen.key), ("values", seen.value)):
            if name in needs:
                out[name] = tensor[row, :, columns[0] : columns[1]]
        if "last_attention" in needs:
            out["last_attention"] = self._last(seen, row, span)
        if "text_attention" in needs:
            rows = self._text(row, end)
            out["text_attention"] = seen.row(row).attention(rows, columns)[0].transpose(0, 1)  # [M, H, N]
        if "prompt_attention" in needs:
            out["prompt_attention"] = self._column_sums(row)[:, slice(*columns)]
        return out

    def _column_sums(self, row: int) -> Tensor:
        """[H, L] over the rows of all tokens, a few rows at a time."""
        assert self.seen is not None
        key = ("sums", row)
        if key not in self.memo:
            one, rows = self.seen.row(row), self._all(row).split(ROWS_AT_ONCE)
            self.memo[key] = torch.stack([one.attention(some)[0].sum(dim=1) for some in rows]).sum(dim=0)
        return self.memo[key]

    def _all(self, row: int) -> Tensor:
        """Slots of all tokens of a row, padding left out."""
        key = ("all", row)
        if key not in self.memo:
            slots = [i for s in self.layout.rows[row] for i in range(s.start, s.stop)]
            self.memo[key] = upload(slots, self._device)
        return self.memo[key]

    def _last(self, seen: Seen, row: int, span: Span) -> Tensor:
        """[H, N]; the whole batch's last rows are computed in one go and sliced."""
        key = "ahead" if seen is self.ahead else "last"
        if key not in self.memo:
            self.memo[key] = seen.attention(self.layout.lasts(seen.query.device)).to(self._device)
        return self.memo[key][row, :, 0, slice(*_columns(seen, span))]

    def _shared(self, row: int, span: Span) -> dict[str, Any]:
        """Fields about the prompt rather than its visual tokens."""
        needs = self.needs
        out: dict[str, Any] = {}
        if needs & {"text_features", "text_embeddings", "text_keys", "text_self_attention"}:
            text = self._text(row, span)
            if "text_features" in needs and self._hidden is not None:
                out["text_features"] = self._hidden[row].index_select(0, text)
            if "text_embeddings" in needs and self._embeddings is not None:
                logical = text if self._index is None else self._index[row][text]
                out["text_embeddings"] = self._embeddings[row].index_select(0, logical)
            if "text_self_attention" in needs and self.seen is not None:
                rows = self.seen.row(row).attention(text)[0].transpose(0, 1)  # [M, H, S]
                out["text_self_attention"] = rows.index_select(2, text + self.seen.past)
            if "text_keys" in needs and self.seen is not None:
                out["text_keys"] = self.seen.key[row].index_select(1, text + self.seen.past)
        if self.seen is not None:
            last = self.layout.last(row)
            if "last_query" in needs:
                out["last_query"] = self.seen.query[row, :, last]
            if "query_sum" in needs:
                out["query_sum"] = self.seen.query[row].index_select(1, self._all(row)).float().sum(dim=1)
            if "last_value" in needs:
                out["last_value"] = self.seen.value[row, :, last + self.seen.past]
        if "project" in needs:
            out["project"] = self.adapter.project
        if "norm" in needs:
            out["norm"] = Returning(self.adapter.text.norm)
        if "generator" in needs:
            out["generator"] = torch.Generator().manual_seed(0)
        return out

    def _text(self, row: int, span: Span) -> Tensor:
        key = (row, span.stop)
        if key not in self.memo:
            self.memo[key] = upload(self.layout.text_after(row, span), self._device)
        return self.memo[key]


def _context(**fields: Any) -> Context:
    """``Context(**fields)`` in a twentieth of the time: a frozen class's own __init__ sets each field by a call.

    It is made once for every picture of a batch, while the device waits.
    """
    made = object.__new__(Context)
    vars(made).update(DEFAULTS)
    vars(made).update(fields)
    return made


def _columns(seen: Seen, span: Span) -> tuple[int, int]:
    return span.start + seen.past, span.stop + seen.past


@dataclass(frozen=True, eq=False)
class Contexts(Sequence[Context]):
    """The Contexts of a batch, each built when a rule looks at it; some look at the first alone."""

    stand: Stand
    members: list[tuple[int, list[Visual]]]
    keep: int

    def __len__(self) -> int:
        return len(self.members)

    @overload
    def __getitem__(self, at: int) -> Context: ...

    @overload
    def __getitem__(self, at: slice) -> Contexts: ...

    def __getitem__(self, at: int | slice) -> Context | Contexts:
        if isinstance(at, slice):
            return Contexts(self.stand, self.members[at], self.keep)
        row, visuals = self.members[at]
        return self.stand.context(row, visuals, self.keep)


def _joined(values: list[Any], dim: int) -> Any:
    """A field of several items, tensors or what answers with tensors, as one."""
    if callable(values[0]):
        return lambda choose: _joined([value(choose) for value in values], dim)
    return torch.cat(values, dim)


def _picked(value: Any, index: Tensor, dim: int) -> Any:
    """The same of the tokens that are still there."""
    if callable(value):
        return lambda choose: _picked(value(choose), index, dim)
    return value.index_select(dim, index)


def _number_through(parts: list[dict[str, Any]], visuals: list[Visual]) -> None:
    """Cells of several items, counted on from one grid to the next."""
    first = 0
    for part, v in zip(parts, visuals, strict=True):
        if part["index"] is not None:
            part["index"] = part["index"] + first
        first += v.tokens
