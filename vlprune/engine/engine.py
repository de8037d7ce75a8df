"""The removal engine: what lives on a wrapped model.

Everything outside the decoder layers keeps the prompt's own coordinates. At a stage a pre-hook of the decoder layer gathers
the hidden states once; later layers see converted position tables and masks, and cache layers that report logical lengths.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.engine.adapter import Adapter
from vlprune.engine.cache import install, kept_of, layer_of, written
from vlprune.engine.checks import check_plan, early_block
from vlprune.engine.choose import Group, batches_of, choose, counts_of, groups_of
from vlprune.engine.chunk import columns_of, complete, open_chunk, read_prompt
from vlprune.engine.contexts import LAYER_FIELDS, TOWER_FIELDS, Stand
from vlprune.engine.decode import Decoder
from vlprune.engine.evict import Chosen, Whole, drop, takes_all
from vlprune.engine.kept import Cut, Kept, Layout, expand, upload
from vlprune.engine.masks import convert, counts_slots, kept_by, rope
from vlprune.engine.merge import entries_of
from vlprune.engine.record import Record, trace_of
from vlprune.engine.run import Reached, Run, Runs
from vlprune.engine.tap import Seen, TapConfig, delegate
from vlprune.engine.vision import CARRIER, Tape, Vision
from vlprune.errors import PruningError
from vlprune.ops import gather_tokens
from vlprune.plan import Plan, Step
from vlprune.releases import HOOKS_RUN_TWICE, cache_of
from vlprune.selection import Selection
from vlprune.trace import Clock, Trace


@dataclass(eq=False)
class Hook:
    """A callable object, not a closure: a deep copy of a wrapped model then points at its own engine."""

    engine: Engine
    name: str
    layer: int = -1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = getattr(self.engine, self.name)
        return method(*args, **kwargs) if self.layer < 0 else method(self.layer, *args, **kwargs)


class Ahead(Exception):
    """Carries queries and keys out of an attention module before it computes anything else."""


class Engine:
    """One plan on one model. `attach` hooks it up, `detach` leaves no trace; nothing of a request stays on it."""

    def __init__(self, model: nn.Module, plan: Plan, adapter: Adapter) -> None:
        self.model, self.plan, self.adapter = model, plan, adapter
        self.text, self.layers = adapter.text, adapter.layers
        self.config: Any = adapter.text.config
        self.sliding = adapter.sliding
        check_plan(plan, adapter)
        self.stages: dict[int, list[Step]] = {}
        for step in plan.steps:
            if step.stage.layer is not None:
                self.stages.setdefault(step.stage.layer, []).append(step)
        self.encoder = next((s for s in plan.steps if s.stage.name == "encoder"), None)
        self.evict = next((s for s in plan.steps if s.stage.name == "cache"), None)
        per_step = next((s for s in plan.steps if s.stage.name == "decode"), None)
        self.decoder = None if per_step is None else Decoder(adapter, per_step)
        self.vision = Vision(adapter, self.encoder, self._tower_needs(), early_block(plan, adapter))
        self.vision.on_tape = Hook(self, "_tape_done")
        self.runs = Runs()
        self.handles: list[Any] = []
        self.taps: list[tuple[Any, Any]] = []

    def _tower_needs(self) -> frozenset[str]:
        needs: frozenset[str] = frozenset()
        for step in self.plan.steps:
            own = frozenset(step.pruner.needs)
            early = step.stage.name == "encoder" or step.stage.layer == 0
            needs |= own if early else own & TOWER_FIELDS
        return needs

    # ---- lifecycle

    def attach(self) -> None:
        add = self.handles.append
        core, text = self.adapter.core, self.text
        add(self.model.register_forward_pre_hook(Hook(self, "_model_pre"), with_kwargs=True))
        add(core.register_forward_pre_hook(Hook(self, "_core_pre"), with_kwargs=True))
        add(core.register_forward_hook(Hook(self, "_core_post"), always_call=True))
        add(text.register_forward_pre_hook(Hook(self, "_text_pre"), with_kwargs=True))
        add(text.register_forward_hook(Hook(self, "_text_post")))
        for i, layer in enumerate(self.layers):  # all of them: a cache may come from another plan
            add(layer.register_forward_pre_hook(Hook(self, "_layer_pre", i), with_kwargs=True))
        self.watched = {
            k - 1 for k, steps in self.stages.items() for s in steps if k and frozenset(s.pruner.needs) & LAYER_FIELDS
        }
        every = set(range(len(self.layers)))
        if self.evict is not None and frozenset(self.evict.pruner.needs) & LAYER_FIELDS:
            self.watched = every
        if self.decoder is not None:
            self.watched |= self.decoder.watched
        ahead = {k for k, steps in self.stages.items() for s in steps if "next_attention" in s.pruner.needs}
        for i in sorted(every if self.decoder is not None else self.watched | ahead):
            self.tap(self.adapter.layer_attention(self.layers[i]), Hook(self, "_capture", i))
        self.vision.attach(self.tap)
        self.adapter.attach(self)

    def tap(self, attention: nn.Module, fn: Any) -> None:
        """Let `fn` see what this attention module attends with; undone by `detach`."""
        self.taps.append((attention, attention.config))
        attention.config = TapConfig(attention.config, fn)  # type: ignore[assignment]

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        for module, config in reversed(self.taps):
            module.config = config
        self.handles, self.taps = [], []
        self.vision.detach()
        self.adapter.detach()

    # ---- around the forward pass

    def _model_pre(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Note the tapes while they are there: accelerate rebuilds outputs that it moves between devices."""
        outputs = kwargs.get("mm_encoder_outputs") or {}
        self.runs.tapes = {m: getattr(out, CARRIER) for m, out in outputs.items() if hasattr(out, CARRIER)}

    def _core_pre(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        run = self.runs.now = Run()  # replaces what an interrupted pass may have left
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        given: Any = ids if ids is not None else embeds
        if given is None:
            return  # the model has a word for this
        run.length = given.shape[1]
        if run.length == 1:  # a decode step: nothing to find, nothing to wait for
            return
        table = self.adapter.text.get_input_embeddings()  # type: ignore[operator]
        mask = columns_of(kwargs.get("attention_mask"), cache_of(kwargs), run.length)
        run.reading = read_prompt(ids, embeds, mask, list(self.adapter.visual_ids.values()), table)
        run.device = given.device
        tapes, self.runs.tapes = self.runs.tapes, {}
        for modality, out in (kwargs.get("mm_encoder_outputs") or {}).items():
            tape = getattr(out, CARRIER, tapes.get(modality))
            if tape is not None:
                run.tapes[modality] = tape
            elif out is not None:
                raise PruningError(f"the {modality} features do not come straight from this wrapped model's {modality} encoder: "
                                   "do not pass prefill_chunk_size (it cuts pictures apart), nor features that were made "
                                   "before the model was wrapped")  # fmt: skip
        if ids is None and not run.placeholders:
            warnings.warn("inputs_embeds holds no picture placeholders, so nothing is pruned; where pictures are already in it, "
                          "pass input_ids and pixel_values instead", stacklevel=2)  # fmt: skip
        if run.tapes:
            self._foresee(run)

    def _core_post(self, module: nn.Module, args: Any, out: Any) -> None:
        run, self.runs.now = self.runs.now, None
        if run is None or run.opened is None or out is None:
            return
        self.runs.last = run.trace
        missed = [s for s in self.plan.steps if s.stage.name != "decode" and id(s) not in run.done]
        if missed:
            raise PruningError(f"the prompt held pictures, but {missed[0]} did not run; the model's layers were called in a "
                               "way vlprune does not see")  # fmt: skip

    def _tape_done(self, tape: Tape) -> None:
        """A feature method was called inside a forward pass (outside, the tape rides on its output)."""
        run = self.runs.now
        if run is not None:
            run.tapes[tape.modality] = tape
            self._foresee(run)

    def _text_pre(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        run = self.runs.now
        if run is None:
            return None
        cache = cache_of(kwargs)
        if cache is not None:
            n = cache.get_seq_length()
            if isinstance(n, int) or run.length > 1:  # a static cache's is a tensor; a decode step does not need it
                run.past = int(n)
            for layer in cache.layers:
                sliding = bool(getattr(layer, "is_sliding", False))
                if sliding not in run.kv_offset:
                    run.kv_offset[sliding] = layer.get_mask_sizes(run.length)[1]
        if run.length > 1 and run.placeholders:
            self._check_placeholders(run)
            run.embeddings = kwargs.get("inputs_embeds")
        kept = kept_of(cache, 0)
        if kept is None or kept.shift is None:
            return None
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(run.past, run.past + run.length, device=kept.shift.device)[None]
        return args, {**kwargs, "position_ids": positions - kept.shift.to(positions.device)[:, None]}

    def _check_placeholders(self, run: Run) -> None:
        """In a fresh prompt placeholders stand for pictures; later a guessed or generated token may have their id."""
        for kind, modality in enumerate(self.adapter.visual_ids, 1):
            found = sum(n for runs in run.prompt for k, n in runs if k == kind)
            if found and modality not in run.tapes and not run.past:
                raise PruningError(f"{found} {modality} placeholders came without pixels; pass the {modality}s together with the "
                                   "whole prompt (no prefill_chunk_size), and leave an assistant model unwrapped: the library "
                                   "shows it no pictures")  # fmt: skip
        run.has_visual = bool(run.tapes)

    def _text_post(self, module: nn.Module, args: Any, out: Any) -> Any:
        run = self.runs.now
        if run is None:
            return None
        if run.has_visual:
            if self.evict is not None:
                self._evict(run, self.evict, len(self.layers) - 1)
            run.trace = self._trace(run, out.last_hidden_state)
            if self.decoder is not None:
                self.decoder.open(run)
        if run.shortened is None:
            return None
        out.last_hidden_state = expand(out.last_hidden_state, run.shortened, run.length)
        if out.hidden_states is not None:  # entry 0 is the input of layer 0, entry i the output of layer i - 1
            at = [run.at(max(i - 1, 0)) for i in range(len(out.hidden_states))]
            out.hidden_states = tuple(
                h if k is None or h is None else expand(h, k, run.length)
                for h, k in zip(out.hidden_states, at, strict=True)
            )
        return out

    def _trace(self, run: Run, hidden: Tensor) -> Trace:
        trace = trace_of(run, self.plan, self.adapter, hidden.element_size(), self.runs.recording)
        at = [run.at(i) for i in range(len(self.layers))]
        trace.layer_tokens = [
            run.left.get(i, trace.visual if layout is None else layout.visual) for i, layout in enumerate(at)
        ]
        return trace

    # ---- before every decoder layer

    def _layer_pre(self, i: int, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        run = self.runs.now
        if run is None:
            return None
        cache = run.cache = cache_of(kwargs)
        if run.length == 1:  # decode: only the mask may need to know
            kept = kept_of(cache, i)
            if kept is None:
                return None
            if (
                kept.dense
                and kwargs.get("attention_mask") is None
                and not (self.sliding[i] and counts_slots(run, self.config))
            ):
                return None
        x = args[0] if args else kwargs["hidden_states"]
        if run.has_visual:
            if HOOKS_RUN_TWICE and layer.training and getattr(layer, "gradient_checkpointing", False):
                raise PruningError("gradient checkpointing calls hooks again in the backward pass before transformers 5.23; "
                                   "update transformers, or switch it off")  # fmt: skip
            layout = self._open(run)
            if self.evict is not None:
                if i:
                    self._evict(run, self.evict, i - 1)
                if cache is not None and self._going(run, self.evict, layout):
                    install(cache, i, kept_of(cache, i))  # a sliding window must not drop rows first
            if self.decoder is not None and getattr(layer_of(cache, i), "is_sliding", False):
                install(cache, i, kept_of(cache, i))  # likewise: slots of the prompt must stay where they are
            if i == 0 and self.encoder is not None:
                x = self._encoder_result(run, x, kwargs)
            for step in self.stages.get(i, ()):
                x = self._stage(run, i, step, x, layer, kwargs)
            if self.decoder is None or i - 1 not in self.decoder.watched:
                run.seen.pop(i - 1, None)
        changed, kept = self._physical(run, i, x, kwargs)
        if i == self.runs.until:
            if run.shortened is not None:
                self.runs.last = self._trace(run, x)
            raise Reached(x, {**kwargs, **changed}, kept)
        if not changed:
            return None
        if kept is not None and run.shortened is not None:
            install(cache, i, kept)
        if args:
            return (x, *args[1:]), {**kwargs, **changed}
        return args, {**kwargs, **changed, "hidden_states": x}

    def _physical(self, run: Run, i: int, x: Tensor, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Kept | None]:
        """The arguments of layer `i` that differ on the slots it really sees, and what its cache layer will hold of them."""
        layout, sliding, before = run.shortened, self.sliding[i], kept_of(run.cache, i)
        if layout is None and before is None:
            return {}, None
        stage = None if layout is None else layout.stage

        def make() -> tuple[dict[str, Any], Kept | None]:
            changed: dict[str, Any] = {}
            kept = before
            if layout is not None:
                tables = kwargs["position_embeddings"]
                compact = self.plan.positions == "compact"
                changed["position_embeddings"] = run.once(
                    ("rope", sliding, stage), lambda: rope(run, layout, tables, compact)
                )
                changed["position_ids"] = None  # only read to find packed sequences, and gaps would look like some
                if run.cache is not None:
                    kept = kept_by(run, layout, before)
            mask, lay = kwargs.get("attention_mask"), layer_of(run.cache, i)
            changed["attention_mask"] = convert(run, self.config, mask, kept, lay, x, sliding)
            return changed, kept

        return run.once(("physical", sliding, stage, None if before is None else before.stage), make)

    # ---- stages

    def _open(self, run: Run) -> Layout:
        return open_chunk(run, list(self.adapter.visual_ids))

    def _foresee(self, run: Run) -> None:
        """All that counts alone decide, while the device still works on the pictures: where the tokens lie, which of
        them share a budget, and the templates of the gathers, up to the first pruner that decides its own count."""
        device = run.device
        if device is None or not complete(run, list(self.adapter.visual_ids)):
            return
        layout = self._open(run)
        for step in self.plan.steps:
            layer = 0 if step is self.encoder else step.stage.layer
            if layer is None:
                break
            counts: dict[tuple[int, int], int] | None
            if step is self.encoder:
                counts = {key: len(s.kept) for key, s in _left_by_tower(run).items()}
            else:
                groups = self._groups(run, step, layout)
                run.batches[id(step)] = batches_of(groups, layout)
                counts = counts_of(groups, step)
            if counts is None:
                break
            if counts:
                layout = self._cut(run, step, layout, counts, device).after((layer, step.stage.name))

    def _cut(
        self, run: Run, step: Step, layout: Layout, counts: dict[tuple[int, int], int], device: torch.device
    ) -> Cut:
        """One template for all layers of a device that lose the same numbers of tokens."""
        key = ("cut", id(step), layout.stage, device)
        made: Cut | None = run.memo.get(key)
        if made is None or made.counts != counts:
            made = run.memo[key] = Cut.make(layout, counts, device)
        return made

    def _encoder_result(self, run: Run, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Remove at layer 0 what already left in the tower."""
        assert self.encoder is not None
        clock = Clock(x.device)
        layout, chosen = self._open(run), _left_by_tower(run)
        merged = {k: Selection(s.kept, None, s.scores) for k, s in chosen.items()}  # before the projector
        x = self._shrink(run, self.encoder, 0, layout, merged, x, kwargs)
        self._record(run, self.encoder, layout, chosen, [clock.stop()])
        return x

    def _stage(self, run: Run, i: int, step: Step, x: Tensor, layer: nn.Module, kwargs: dict[str, Any]) -> Tensor:
        clock = Clock(x.device)
        layout = self._open(run)
        batches = run.batches.pop(id(step), None)
        if batches is None:
            batches = batches_of(self._groups(run, step, layout), layout)
        chosen: Chosen = {}
        if batches:
            needs = frozenset(step.pruner.needs)
            ahead = self._look_ahead(run, i, layer, x, kwargs) if "next_attention" in needs else None
            seen = run.seen.get(i - 1)
            stand = Stand(run, self.adapter, self.vision, needs, layout, x.detach(), seen, ahead, i, *self.runs.told)
            chosen = choose(stand, step, batches)
            x = self._shrink(run, step, i, layout, chosen, x, kwargs)
        self._record(run, step, layout, chosen, [clock.stop()])
        return x

    def _groups(self, run: Run, step: Step, layout: Layout) -> list[Group]:
        return groups_of(run, step, layout)

    def _shrink(self, run: Run, step: Step, i: int, layout: Layout, chosen: Chosen, x: Tensor,
                kwargs: dict[str, Any]) -> Tensor:  # fmt: skip
        """Gather the survivors. With nothing chosen the forward pass stays on its untouched path, bit by bit."""
        if not chosen:
            return x
        kept = {key: s.kept for key, s in chosen.items()}
        cut = self._cut(run, step, layout, {key: len(k) for key, k in kept.items()}, x.device)
        slots, now = cut.fill(layout, kept, (i, step.stage.name))
        parts = [(s, layout.item(row, item).start, row * now.width + now.item(row, item).start)
                 for (row, item), s in chosen.items() if s.merge is not None]  # fmt: skip
        merge = entries_of(parts, x.device)
        out = self._gather(run, i, layout, now, slots.to(x.device), merge, x, kwargs.get("position_embeddings"))
        run.layout = run.layouts[i] = now
        if self.plan.positions == "compact":
            removed = [sum(s.length for s in old) - sum(s.length for s in new)
                       for old, new in zip(layout.rows, now.rows, strict=True)]  # fmt: skip
            shift = upload(removed, x.device)
            run.shift = shift if run.shift is None else run.shift.to(x.device) + shift
        return out

    def _gather(self, run: Run, i: int, before: Layout, now: Layout, slots: Tensor, merge: Any, x: Tensor,
                tables: Any) -> Tensor:  # fmt: skip
        """Hidden states and, where they have a row per slot, the position tables that go with them: one launch."""
        if before.index is not None:
            tables = run.memo.get(("rope", self.sliding[i], before.stage))
        along = self.plan.positions == "original" and isinstance(tables, tuple)
        if not along or any(t.dim() != 3 or t.device != x.device for t in tables):
            return gather_tokens(x, slots, merge=merge)
        x, *picked = gather_tokens((x, *tables), slots, merge=merge)
        run.memo["rope", self.sliding[i], now.stage] = tuple(picked)
        return x

    def _record(self, run: Run, step: Step, layout: Layout, chosen: Chosen, clocks: list[Any]) -> None:
        run.done.add(id(step))
        run.records.append(Record(step, layout, chosen, clocks))

    def _capture(
        self, i: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kw: Any
    ) -> Any:
        run = self.runs.now
        if run is not None and run.ahead:
            raise Ahead(Seen.of(module, query, key, value, mask, kw))
        if run is not None and run.has_visual and i in self.watched:
            rows = written(run.cache, i, run.past + run.length)  # a static cache hands over its empty slots as well
            run.seen[i] = Seen.of(module, query, key[:, :, :rows], value[:, :, :rows], mask, kw)
        if run is not None and run.length == 1 and self.decoder is not None:
            return self.decoder.attend(run, i, module, query, key, value, mask, *args, **kw)
        return delegate(module, query, key, value, mask, *args, **kw)

    def _look_ahead(self, run: Run, i: int, layer: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> Seen:
        """Queries and keys of layer `i` for its input, by starting its attention and stopping before any product."""
        attention = self.adapter.layer_attention(layer)
        given = {**kwargs, **self._physical(run, i, x, kwargs)[0]}
        tables, mask = given["position_embeddings"], given.get("attention_mask")
        run.ahead = True
        try:
            with torch.no_grad():
                attention(hidden_states=layer.input_layernorm(x), position_embeddings=tables, attention_mask=mask)  # type: ignore[operator]
        except Ahead as found:
            seen: Seen = found.args[0]
            lay, rows = layer_of(run.cache, i), written(run.cache, i, run.past)
            if lay is None or not lay.is_initialized:
                return seen
            return replace(seen, key=torch.cat([lay.keys[:, :, :rows], seen.key], 2))
        finally:
            run.ahead = False
        raise PruningError(f"layer {i} does not call the attention interface; next_attention cannot be had")

    # ---- stage "cache"

    def _evict(self, run: Run, step: Step, i: int) -> None:
        """Layer `i` has run: drop visual rows of its cache, before the next layer adds to the peak."""
        lay, seen = layer_of(run.cache, i), run.seen.get(i)
        if lay is None:
            raise PruningError(
                f"{step} drops rows of the key-value cache, but the model ran without one; pass use_cache=True"
            )
        assert run.embeddings is not None
        clock = Clock(run.embeddings.device)
        layout = run.at(i) or run.opened
        assert layout is not None
        hidden, needs = run.embeddings, frozenset(step.pruner.needs)
        at = layout.index_on(hidden.device)
        if at is not None and "features" in needs:
            hidden = hidden.gather(1, at.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1]))
        held = self._held(run, kept_of(run.cache, i), lay.keys.device)
        past = held.slots - layout.width
        stand = Stand(run, self.adapter, self.vision, needs, layout, hidden, seen, None, i, *self.runs.told)
        groups = self._going(run, step, layout)
        if takes_all(step) and groups:
            whole = Whole.of(layout)
            chosen = whole.choose(stand, step, groups)
        else:
            whole, chosen = None, choose(stand, step, batches_of(groups, layout))
        if any(s.merge is not None for s in chosen.values()):
            raise PruningError(f"{step.pruner.name} merges tokens; cached keys cannot be merged, use another stage")
        if self.sliding[i]:  # its mask has one place for a slot, whatever the head
            chosen = {k: replace(s, heads=None) for k, s in chosen.items()}
        if chosen:
            before = layout if whole is None else whole.rows
            cut = self._cut(run, step, before, {key: len(s.kept) for key, s in chosen.items()}, held.index.device)
            after = drop(run.cache, i, held, before, cut, chosen, past)
            run.left[i] = after.visual
            if whole is not None:  # that was all its tokens
                run.visual_left[i] = whole.visual_left(chosen)
        run.clocks.append(clock.stop())
        if i == len(self.layers) - 1:
            chosen = chosen if whole is None else whole.per_picture(run.visuals, chosen)
            self._record(run, step, layout, chosen, run.clocks)

    def _going(self, run: Run, step: Step, layout: Layout) -> list[Group]:
        return run.once(("groups", layout.stage), lambda: self._groups(run, step, layout))

    def _held(self, run: Run, kept: Kept | None, device: torch.device) -> Kept:
        """What a cache layer holds now that the chunk is in, in as many words; layers of one history share it."""

        def make() -> Kept:
            before = kept or Kept.everything(len(run.prompt), 0, -1, device)
            return before.on(device).grown(run.past + run.length)

        return run.once(("held", None if kept is None else kept.stage, device), make)


def _left_by_tower(run: Run) -> Chosen:
    """What stage "encoder" left of each item."""
    found = ((v, v.tape.selections.get(v.source)) for v in run.visuals)
    return {(v.row, v.item): s for v, s in found if s is not None}
