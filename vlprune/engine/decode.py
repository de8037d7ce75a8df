"""Stage "decode": every step chooses which cached visual tokens it reads. Nothing leaves the cache.

Focal layers choose, by the attention they have just paid to all tokens or to those of the last choice, or before they
attend and for themselves alone. The other layers read the text and the tokens of the last choice, those before the first
focal layer the choice of the step before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
from vlprune.selection import Selection
from vlprune.trace import Look


@dataclass(frozen=True, eq=False)
class Place:
    """Where one item lies in the cache of a focal layer, and how many of its tokens that layer chooses."""

    row: int
    start: int  # slot
    tokens: int
    keep: int
    logical: Tensor  # [tokens] absolute logical positions
    grids: tuple[Grid, ...]
    index: Tensor | None  # [tokens] grid cells; None: all, in order


@dataclass(frozen=True, eq=False)
class Alike:
    """Items of equal size and budget, which are chosen from together."""

    members: tuple[tuple[Place, int], ...]  # and which of its row's items each one is
    rows: Tensor  # [G, 1]
    logical: Tensor  # [G, N]

    @staticmethod
    def of(places: tuple[Place, ...]) -> tuple[Alike, ...]:
        groups: dict[Any, list[tuple[Place, int]]] = {}
        before: Counter[int] = Counter()
        for p in places:
            groups.setdefault((p.tokens, p.keep, p.grids, p.index is None), []).append((p, before[p.row]))
            before[p.row] += 1
        return tuple(Alike(tuple(members), upload([p.row for p, _ in members], members[0][0].logical.device)[:, None],
                           torch.stack([p.logical for p, _ in members])) for members in groups.values())  # fmt: skip


@dataclass(frozen=True, eq=False)
class Fixation:
    """What the next layers may read of the prompt. Lies on the last focal layer's cache layer and follows its beams.

    With `device_map` its tensors stay on that layer's device: attention of other focal layers is brought there to choose
    from, and what they may read is brought to the layers. Heads that choose their own rows do so where their keys are.
    """

    places: dict[int, tuple[Place, ...]]  # focal layer -> items
    alike: dict[int, tuple[Alike, ...]]  # the same, sorted by size and budget
    text: Tensor  # [B, upto] bool over logical positions: neither padding nor visual
    texts: tuple[int, ...]  # how many these are at most, per row
    chosen: Tensor  # [B, upto] bool: visual tokens of the last choice, made in focal layer `by`
    by: int
    states: tuple[tuple[Any, ...], ...]  # per row, per item of that row
    serial: int = 0  # counts choices: memo key
    looks: list[Look] | None = None  # the trace's, where every choice is noted

    def select_rows(self, rows: Tensor) -> Fixation:
        rows = rows.to(self.text.device)
        text, chosen, at = self.text.index_select(0, rows), self.chosen.index_select(0, rows), rows.tolist()
        texts, states = tuple(self.texts[r] for r in at), tuple(self.states[r] for r in at)
        return replace(self, text=text, texts=texts, chosen=chosen, states=states)

    def most(self, by: int) -> int:
        """Slots of the prompt that a layer reads by a choice made in layer `by`, at most."""
        read = list(self.texts)
        for p in self.places[by]:
            read[p.row] += p.keep
        return max(read)


@dataclass(eq=False)
class Decoder:
    """Runs a DecodePruner. What belongs to a request lies on its cache, none of it here."""

    adapter: Adapter
    step: Step
    focal: tuple[int, ...] = field(init=False)
    dense: frozenset[int] = field(init=False)  # layers that read everything and choose nothing
    watched: frozenset[int] = field(init=False)  # layers whose prefill the first choice is made from

    def __post_init__(self) -> None:
        depth = len(self.adapter.layers)
        self.focal = tuple(sorted(self.pruner.focal(depth)))
        if not self.focal or not 0 <= self.focal[0] <= self.focal[-1] < depth:
            raise UnsupportedStage(f"{self.step} names the focal layers {self.focal}; it takes at least one, and this model has "
                                   f"layers 0 to {depth - 1}")  # fmt: skip
        own = self.pruner.reads == "own"
        others = set(range(depth)) - set(self.focal)
        self.dense = frozenset(others if own else others & set(self.pruner.dense(depth)))
        self.watched = frozenset() if own else frozenset(self.focal[-1:])
        late = frozenset(self.pruner.needs) & ({"last_attention"} if own else {"last_query", "keys"})
        if late:
            raise UnsupportedStage(f"{self.step} reads {self.pruner.reads!r} and needs {', '.join(sorted(late))}, which is not "
                                   "known when it chooses")  # fmt: skip

    @property
    def pruner(self) -> DecodePruner:
        assert isinstance(self.step.pruner, DecodePruner)
        return self.step.pruner

    # ---- after the prefill

    def open(self, run: Run) -> None:
        """Note where the pictures lie, and make the first choice from the last prompt row if any layer reads it."""
        cache, opened = run.cache, run.opened
        if cache is None:
            raise PruningError(f"{self.step} reads a key-value cache step by step, but the model ran without one; "
                               "pass use_cache=True")  # fmt: skip
        assert opened is not None
        last = self.focal[-1]
        layer = install(cache, last, kept_of(cache, last))
        earlier: Fixation | None = layer.fixation
        device, rows = layer.keys.device, len(opened.rows)
        places = {i: (earlier.places[i] if earlier else ()) + self._places(run, i) for i in self.focal}
        text = _text(opened, run, device)
        texts = [run.past + sum(s.length for s in row if s.item is None) for row in opened.rows]
        if earlier is not None:
            between = run.past - earlier.text.shape[1]
            text = torch.cat([earlier.text, text.new_ones(rows, between), text], 1)
            texts = [n - run.past + before + between for n, before in zip(texts, earlier.texts, strict=True)]
        elif run.past:
            text = torch.cat([text.new_ones(rows, run.past), text], 1)
        shown: dict[str, Tensor] = {}
        if last in self.watched:
            lasts = (run.at(last) or opened).lasts(device)
            shown["attention"] = run.seen.pop(last).attention(lasts)
        mine = [[p for p in places[last] if p.row == b] for b in range(rows)]
        states = tuple(tuple(self.pruner.start(self._context(p, last, **shown)) for p in row) for row in mine)
        looks = None if run.trace is None else run.trace.looks
        alike = {i: Alike.of(of_layer) for i, of_layer in places.items()}
        fixation = Fixation(places, alike, text, tuple(texts), torch.zeros_like(text), last, states, looks=looks)
        layer.fixation = self._choose(fixation, last, **shown)[0] if shown else replace(fixation, serial=1)

    def _places(self, run: Run, i: int) -> tuple[Place, ...]:
        layout = run.at(i) or run.opened
        assert layout is not None
        kept = kept_of(run.cache, i)
        device = layer_of(run.cache, i if self.pruner.reads == "own" else self.focal[-1]).keys.device
        past = 0 if not run.past else run.past if kept is None else kept.slots - layout.width
        places = []
        for v in run.visuals:
            span = layout.item(v.row, v.item)
            if layout.index is None:
                logical, index = torch.arange(span.start, span.stop, device=device), None
            else:
                logical = layout.index[v.row, span.start : span.stop].to(device)
                index = logical - v.start
            keep = self._keep(v, span.length, i)
            places.append(Place(v.row, span.start + past, span.length, keep, logical + run.past, v.info.grids, index))
        return tuple(places)

    def _keep(self, v: Visual, tokens: int, i: int) -> int:
        if not self.pruner.worthwhile(v.tokens):
            return tokens
        keep = min(self.step.budget.count(v.tokens), tokens)
        return min(self.pruner.count(keep, tokens, i, len(self.adapter.layers)), tokens)

    # ---- at every step

    def attend(self, run: Run, i: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any,
               *args: Any, **kw: Any) -> Any:  # fmt: skip
        """The attention of layer `i` for one new token per row."""
        last = layer_of(run.cache, self.focal[-1])
        fixation: Fixation | None = run.fixation or getattr(last, "fixation", None)
        everything = i in self.dense or fixation is None
        if everything or all(p.keep == p.tokens for p in fixation.places[self.focal[-1]]):  # type: ignore[union-attr]
            return delegate(module, query, key, value, mask, *args, **kw)
        assert fixation is not None
        reads = self.pruner.reads if i in self.focal else None
        if reads == "all" or (reads == "choice" and run.fixation is None):
            attention = Seen.of(module, query, key, value, mask, kw).attention(slice(-1, None))
            self._note(run, last, i, self._choose(fixation, i, attention=attention)[0])
            return delegate(module, query, key, value, mask, *args, **kw)
        chosen, by = fixation.chosen, fixation.by
        if reads == "own":
            fixation, chosen = self._choose(fixation, i, query=query, key=key)
            by = i
            self._note(run, last, i, fixation)
        kept = kept_of(run.cache, i)
        key_of = (-1 if kept is None else kept.stage, fixation.serial, query.device)
        alive = run.once(
            ("alive", *key_of),
            lambda: _alive(fixation.text, chosen, None if kept is None else kept.index, query.device),
        )
        windowed = getattr(layer_of(run.cache, i), "is_sliding", False)  # only the mask knows the window
        fast = choose("auto", query, key, value) == "triton" or (
            alive.dim() == 3 and "flash" in _implementation(module)
        )
        if fast and not windowed:
            later = 0 if kept is None else max(0, kept.upto - fixation.text.shape[1])
            index = run.once(("rows", *key_of), lambda: _rows(alive, fixation.most(by) + later))
            slots = alive.shape[-1]
            out = self._indexed(layer_of(run.cache, i), slots, index, query, key, value, kw), None
        else:
            out = delegate(module, query, key, value, _masked(mask, alive, query, key, module), *args, **kw)
        if reads == "choice":
            narrowed = _masked(mask, alive, query, key, module)
            attention = Seen.of(module, query, key, value, narrowed, kw).attention(slice(-1, None))
            self._note(run, last, i, self._choose(fixation, i, attention=attention)[0])
        return out

    def _note(self, run: Run, last: Any, i: int, fixation: Fixation) -> None:
        """What the layers behind read; behind the last focal layer also those of the next step."""
        run.fixation = fixation
        if i == self.focal[-1]:
            last.fixation = fixation

    def _choose(self, fixation: Fixation, i: int, **shown: Tensor) -> tuple[Fixation, Tensor]:
        """Ask the pruner, equal items together. The choice is [B, upto] bool or, where heads may differ, [B, Hkv, upto]."""
        own = self.pruner.reads == "own"
        if own:
            key = shown["key"]
            chosen = key.new_zeros(len(key), key.shape[1], fixation.chosen.shape[1], dtype=torch.bool)
        else:
            chosen = torch.zeros_like(fixation.chosen)
            shown = {name: t.to(chosen.device) for name, t in shown.items()}
        states = [list(s) for s in fixation.states]
        made: list[tuple[Place, int, Selection]] = []
        for alike in fixation.alike[i]:
            first, _ = alike.members[0]
            if first.keep == first.tokens and self.pruner.reads != "choice":  # a cascade gathers attention also there
                _mark(chosen, alike, None)
                continue
            contexts = [self._context(p, i, **shown) for p, _ in alike.members]
            selections, after = self.pruner.step_many(contexts, [states[p.row][n] for p, n in alike.members])
            if not len(selections) == len(after) == len(contexts):
                raise PruningError(f"{self.pruner.name}.step_many was asked for {len(contexts)} items and answered with "
                                   f"{len(selections)} selections and {len(after)} states")  # fmt: skip
            for (p, n), selection, state in zip(alike.members, selections, after, strict=True):
                selection.check(p.tokens, p.keep, self.pruner.adaptive)
                states[p.row][n] = state
                made.append((p, n, selection))
            _mark(chosen, alike, selections)
        if fixation.looks is not None:
            step, items = -(-fixation.serial // len(self.focal)), Counter(p.row for p in fixation.places[i])
            for p, n, s in sorted(made, key=lambda m: (m[0].row, m[1])):
                fixation.looks.append(Look(step, i, p.row, n - items[p.row], s.kept, s.scores, p.index))
        now = replace(fixation, states=tuple(map(tuple, states)), serial=fixation.serial + 1)
        return now if own else replace(now, chosen=chosen, by=i), chosen

    def _context(self, p: Place, i: int, attention: Tensor | None = None, query: Tensor | None = None,
                 key: Tensor | None = None) -> Context:  # fmt: skip
        cut = slice(p.start, p.start + p.tokens)
        row = None if attention is None else attention[p.row, :, 0, cut]
        one, keys = (None if query is None else query[p.row, :, 0]), (None if key is None else key[p.row, :, cut])
        return Context(keep=p.keep, grids=p.grids, index=p.index, last_attention=row, last_query=one, keys=keys, layer=i,
                       layers=len(self.adapter.layers))  # fmt: skip

    def _indexed(self, layer: Any, slots: int, index: Tensor, query: Tensor, key: Tensor, value: Tensor,
                 kw: dict[str, Any]) -> Tensor:  # fmt: skip
        """The chosen rows, read where they lie."""
        suffix: Any = (slots, key.shape[2])
        if isinstance(layer, KeptStaticLayer) or hasattr(
            layer, "max_cache_len"
        ):  # a static cache's tail is not written yet
            end = torch.as_tensor(layer.cumulative_length, device=key.device).reshape(())  # one axis in older releases
            suffix = torch.stack([torch.full_like(end, slots), end]).expand(len(index), 2)
        scale = kw.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        batch, heads = query.shape[:2]
        if index.dim() == 3:  # a key head with its queries is a sequence of its own
            query = query.reshape(len(index), key.shape[1], -1, query.shape[-1]).flatten(0, 1)[:, :, None]
            key, value, index = key.flatten(0, 1)[:, None], value.flatten(0, 1)[:, None], index.flatten(0, 1)
            suffix = suffix if isinstance(suffix, tuple) else suffix.repeat_interleave(len(index) // batch, 0)
        out, _ = indexed_decode(query, key, value, None, index, suffix, scale=scale)
        return out.reshape(batch, heads, 1, -1).transpose(1, 2)


def _mark(chosen: Tensor, alike: Alike, selections: Sequence[Selection] | None) -> None:
    """Write a choice (None: of all tokens) into `chosen`, [B, upto] or [B, Hkv, upto]."""
    if chosen.dim() == 2 and len({len(s.kept) for s in selections or ()}) < 2:
        places = alike.logical
        if selections is not None:
            places = places.gather(1, torch.stack([s.kept for s in selections]))
        flat = (alike.rows * chosen.shape[1] + places).flatten()
        chosen.view(-1).index_fill_(0, flat, True)  # `chosen[rows, places] = True` copies a number from the host
    else:
        for g, (p, _) in enumerate(alike.members):
            s = None if selections is None else selections[g]
            if s is not None and s.heads is not None and chosen.dim() == 3:
                chosen[p.row].scatter_(1, p.logical[s.heads.kept], True)
            else:
                chosen[p.row].index_fill_(-1, p.logical if s is None else p.logical[s.kept], True)


def _rows(alive: Tensor, most: int) -> Tensor:
    """[B, ..., P'] slots of the prompt to read, -1 where a row has fewer; P' is known on the host."""
    width = min(alive.shape[-1], most)
    place = (alive.cumsum(-1) - 1).masked_fill(~alive, width)  # what is not read goes into one place too many
    slots = torch.arange(alive.shape[-1], device=alive.device).expand_as(place)
    return slots.new_full((*alive.shape[:-1], width + 1), -1).scatter_(-1, place, slots)[..., :width]


def _text(layout: Layout, run: Run, device: torch.device) -> Tensor:
    """[B, T] bool: neither padding nor visual."""
    marks = [0] * (len(layout.rows) * layout.width)
    for b, row in enumerate(layout.rows):
        for s in row:
            if s.item is None:
                marks[b * layout.width + s.start : b * layout.width + s.stop] = [1] * s.length
    return upload(marks, device).view(len(layout.rows), layout.width).bool()


def _alive(text: Tensor, chosen: Tensor, index: Tensor | None, device: torch.device) -> Tensor:
    """[B, ..., P] bool on `device`: slots of the prompt this step may read.

    text: [B, upto]. chosen: [B, ..., upto]. index: [B, P] logical positions, or None for slot == position.
    """
    text, chosen = text.to(device), chosen.to(device)
    reads = (text if chosen.dim() == 2 else text[:, None]) | chosen
    if index is None:
        return reads
    index = index.to(device)
    if reads.dim() == 3:
        index = index[:, None].expand(-1, reads.shape[1], -1)
    inside = (index >= 0) & (index < reads.shape[-1])  # text of later turns is always read
    return torch.where(inside, reads.gather(-1, index.clamp(0, reads.shape[-1] - 1)), index >= 0)


def _implementation(module: nn.Module) -> str:
    config: Any = module.config
    return config._base._attn_implementation or "eager"


def _masked(mask: Any, alive: Tensor, query: Tensor, key: Tensor, module: nn.Module) -> Tensor:
    """The reference: the same rows by masking, the same numbers, no speed."""
    read = torch.cat([alive, alive.new_ones(*alive.shape[:-1], key.shape[2] - alive.shape[-1])], -1)
    implementation = _implementation(module)
    if "flash" in implementation:
        if read.dim() == 3:
            raise PruningError("heads that read different tokens cannot be masked inside a sliding window of flash attention; "
                               "load the model with attn_implementation='sdpa'")  # fmt: skip
        return read.long() if mask is None else mask * read
    if read.dim() == 3:
        read = read.repeat_interleave(query.shape[1] // key.shape[1], 1)
    read = read[:, None, None, :] if read.dim() == 2 else read[:, :, None, :]
    if mask is not None and mask.dtype != torch.bool:
        return mask.masked_fill(~read, torch.finfo(mask.dtype).min)
    if mask is not None:
        return mask & read
    if implementation != "eager":
        return read
    return torch.zeros_like(read, dtype=query.dtype).masked_fill(~read, torch.finfo(query.dtype).min)
