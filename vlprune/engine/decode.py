"""Stage "decode": every step chooses which cached visual tokens it reads. Nothing leaves the cache.

Focal layers attend densely and rank the visual tokens by the attention they have just paid; the other layers read the text
and the tokens of the last choice, those before the first focal layer the choice of the step before.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.context import Context, Grid
from vlprune.engine.adapter import Adapter
from vlprune.engine.cache import KeptStaticLayer, install, kept_of, layer_of
from vlprune.engine.kept import Layout, upload
from vlprune.engine.run import Run, Visual
from vlprune.engine.tap import Seen, delegate
from vlprune.errors import PruningError, UnsupportedStage
from vlprune.kernels.dispatch import choose
from vlprune.ops import indexed_decode
from vlprune.plan import Step
from vlprune.pruner import DecodePruner


@dataclass(frozen=True, eq=False)
class Place:
    """Where one item lies in the cache of a focal layer."""

    row: int
    start: int  # slot
    tokens: int
    keep: int
    logical: Tensor  # [tokens] absolute logical positions
    grids: tuple[Grid, ...]
    index: Tensor | None  # [tokens] grid cells; None: all, in order


@dataclass(frozen=True, eq=False)
class Fixation:
    """What the next layers may read of the prompt. Lies on the last focal layer's cache layer and follows its beams."""

    places: dict[int, tuple[Place, ...]]  # focal layer -> items
    text: Tensor  # [B, upto] bool over logical positions: neither padding nor visual
    chosen: Tensor  # [B, upto] bool: visual tokens of the last choice
    states: tuple[tuple[Any, ...], ...]  # per row, per item of that row
    serial: int = 0  # counts choices: memo key

    def select_rows(self, rows: Tensor) -> Fixation:
        rows = rows.to(self.text.device)
        text, chosen = self.text.index_select(0, rows), self.chosen.index_select(0, rows)
        return replace(self, text=text, chosen=chosen, states=tuple(self.states[r] for r in rows.tolist()))


@dataclass(eq=False)
class Decoder:
    """Runs a DecodePruner. What belongs to a request lies on its cache, none of it here."""

    adapter: Adapter
    step: Step
    focal: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        depth = len(self.adapter.layers)
        self.focal = tuple(sorted(self.pruner.focal(depth)))
        if not self.focal or not 0 <= self.focal[0] <= self.focal[-1] < depth:
            raise UnsupportedStage(f"{self.step} names the focal layers {self.focal}; it takes at least one, and this model has "
                                   f"layers 0 to {depth - 1}")  # fmt: skip

    @property
    def pruner(self) -> DecodePruner:
        assert isinstance(self.step.pruner, DecodePruner)
        return self.step.pruner

    # ---- after the prefill

    def open(self, run: Run) -> None:
        """Note where the pictures lie, and make the first choice from the last prompt row."""
        cache, opened = run.cache, run.opened
        if cache is None:
            raise PruningError(f"{self.step} reads a key-value cache step by step, but the model ran without one; "
                               "pass use_cache=True")  # fmt: skip
        assert opened is not None
        last = self.focal[-1]
        earlier: Fixation | None = getattr(layer_of(cache, last), "fixation", None)
        device, rows = run.seen[last].query.device, len(opened.rows)
        places = {i: (earlier.places[i] if earlier else ()) + self._places(run, i) for i in self.focal}
        text = _text(opened, run, device)
        if earlier is not None:
            text = torch.cat([earlier.text, text.new_ones(rows, run.past - earlier.text.shape[1]), text], 1)
        elif run.past:
            text = torch.cat([text.new_ones(rows, run.past), text], 1)
        seen = run.seen[last]
        attention = seen.attention((run.at(last) or opened).lasts(device))
        mine = [[p for p in places[last] if p.row == b] for b in range(rows)]
        states = tuple(tuple(self.pruner.start(self._context(p, attention, last)) for p in row) for row in mine)
        fixation = Fixation(places, text, torch.zeros_like(text), states)
        layer = install(cache, last, kept_of(cache, last))
        layer.fixation = self._choose(fixation, attention, last)
        for i in self.focal:
            run.seen.pop(i, None)

    def _places(self, run: Run, i: int) -> tuple[Place, ...]:
        layout = run.at(i) or run.opened
        assert layout is not None
        seen = run.seen[i]
        kept = kept_of(run.cache, i)
        past = 0 if not run.past else run.past if kept is None else kept.slots - layout.width
        places = []
        for v in run.visuals:
            span = layout.item(v.row, v.item)
            if layout.index is None:
                logical, index = torch.arange(span.start, span.stop, device=seen.query.device), None
            else:
                logical = layout.index[v.row, span.start : span.stop]
                index = logical - v.start
            keep = self._keep(v, span.length)
            places.append(Place(v.row, span.start + past, span.length, keep, logical + run.past, v.info.grids, index))
        return tuple(places)

    def _keep(self, v: Visual, tokens: int) -> int:
        return min(self.step.budget.count(v.tokens), tokens) if self.pruner.worthwhile(v.tokens) else tokens

    # ---- at every step

    def attend(self, run: Run, i: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any,
               *args: Any, **kw: Any) -> Any:  # fmt: skip
        """The attention of layer `i` for one new token per row."""
        last = layer_of(run.cache, self.focal[-1])
        fixation: Fixation | None = run.fixation or getattr(last, "fixation", None)
        if fixation is None or all(p.keep == p.tokens for p in fixation.places[self.focal[-1]]):
            return delegate(module, query, key, value, mask, *args, **kw)
        if i in self.focal:
            attention = Seen.of(module, query, key, value, mask, kw).attention(slice(-1, None))
            run.fixation = self._choose(fixation, attention, i)
            if i == self.focal[-1]:
                last.fixation = run.fixation
            return delegate(module, query, key, value, mask, *args, **kw)
        kept = kept_of(run.cache, i)
        stage = -1 if kept is None else kept.stage
        alive = run.once(
            ("alive", stage, fixation.serial), lambda: _alive(fixation, None if kept is None else kept.index)
        )
        windowed = getattr(layer_of(run.cache, i), "is_sliding", False)  # only the mask knows the window
        if not windowed and choose("auto", query, key, value) == "triton":
            index = run.once(("rows", stage, fixation.serial), lambda: self._rows(fixation, alive))
            return self._indexed(layer_of(run.cache, i), alive.shape[1], index, query, key, value, kw), None
        return delegate(module, query, key, value, _masked(mask, alive, query, key, module), *args, **kw)

    def _choose(self, fixation: Fixation, attention: Tensor, i: int) -> Fixation:
        """Ask the pruner, item by item."""
        chosen = torch.zeros_like(fixation.chosen)
        states = [list(s) for s in fixation.states]
        number = [0] * len(states)
        for p in fixation.places[i]:
            n, number[p.row] = number[p.row], number[p.row] + 1
            if p.keep == p.tokens:
                chosen[p.row].index_fill_(0, p.logical, True)
                continue
            selection, states[p.row][n] = self.pruner.step(self._context(p, attention, i), states[p.row][n])
            selection.check(p.tokens, p.keep, self.pruner.adaptive)
            chosen[p.row].index_fill_(0, p.logical[selection.kept], True)
        return replace(fixation, chosen=chosen, states=tuple(map(tuple, states)), serial=fixation.serial + 1)

    def _context(self, p: Place, attention: Tensor, i: int) -> Context:
        row = attention[p.row, :, 0, p.start : p.start + p.tokens]
        return Context(keep=p.keep, grids=p.grids, index=p.index, last_attention=row, layer=i,
                       layers=len(self.adapter.layers))  # fmt: skip

    def _rows(self, fixation: Fixation, alive: Tensor) -> Tensor:
        """[B, P'] slots of the prompt to read, -1 where a row has fewer; P' is known on the host."""
        gone = [
            sum(p.tokens - p.keep for p in fixation.places[self.focal[-1]] if p.row == b) for b in range(len(alive))
        ]
        order = (~alive).to(torch.int8).sort(dim=1, stable=True)
        width = alive.shape[1] - min(gone)
        return order.indices[:, :width].masked_fill(order.values[:, :width].bool(), -1)

    def _indexed(self, layer: Any, slots: int, index: Tensor, query: Tensor, key: Tensor, value: Tensor,
                 kw: dict[str, Any]) -> Tensor:  # fmt: skip
        """The chosen rows, read where they lie."""
        suffix: Any = (slots, key.shape[2])
        if isinstance(layer, KeptStaticLayer) or hasattr(
            layer, "max_cache_len"
        ):  # a static cache's tail is not written yet
            end = torch.as_tensor(layer.cumulative_length, device=key.device)
            suffix = torch.stack([torch.full_like(end, slots), end]).expand(len(index), 2)
        scale = kw.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        out, _ = indexed_decode(query, key, value, None, index, suffix, scale=scale)
        return out.transpose(1, 2)


def _text(layout: Layout, run: Run, device: torch.device) -> Tensor:
    """[B, T] bool: neither padding nor visual."""
    marks = [0] * (len(layout.rows) * layout.width)
    for b, row in enumerate(layout.rows):
        for s in row:
            if s.item is None:
                marks[b * layout.width + s.start : b * layout.width + s.stop] = [1] * s.length
    return upload(marks, device).view(len(layout.rows), layout.width).bool()


def _alive(fixation: Fixation, index: Tensor | None) -> Tensor:
    """[B, P] bool: slots of the prompt this step may read. index: [B, P] logical positions, or None for slot == position."""
    reads = fixation.text | fixation.chosen
    if index is None:
        return reads
    inside = (index >= 0) & (index < reads.shape[1])  # text of later turns is always read
    return torch.where(inside, reads.gather(1, index.clamp(0, reads.shape[1] - 1)), index >= 0)


def _masked(mask: Any, alive: Tensor, query: Tensor, key: Tensor, module: nn.Module) -> Tensor:
    """The reference: the same rows by masking, the same numbers, no speed."""
    read = torch.cat([alive, alive.new_ones(len(alive), key.shape[2] - alive.shape[1])], 1)
    config: Any = module.config
    implementation = config._base._attn_implementation or "eager"
    if "flash" in implementation:
        return read.long() if mask is None else mask * read
    read = read[:, None, None, :]
    if mask is not None and mask.dtype != torch.bool:
        return mask.masked_fill(~read, torch.finfo(mask.dtype).min)
    if mask is not None:
        return mask & read
    if implementation != "eager":
        return read
    return torch.zeros_like(read, dtype=query.dtype).masked_fill(~read, torch.finfo(query.dtype).min)
