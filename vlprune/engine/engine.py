"""The removal engine: what lives on a wrapped model.

Everything outside the decoder layers keeps the prompt's own coordinates. At a stage a pre-hook of the decoder layer gathers
the hidden states once; later layers see converted position tables and masks, and cache layers that report logical lengths.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from vlprune.engine.adapter import Adapter, Item
from vlprune.engine.cache import install, kept_of, layer_of, logical_end, refill, written
from vlprune.engine.contexts import LAYER_FIELDS, TOWER_FIELDS, Contexts, Stand
from vlprune.engine.decode import Decoder
from vlprune.engine.kept import Kept, Layout, Shrink, Span, expand, upload
from vlprune.engine.run import Run, Runs, Visual, read_prompt
from vlprune.engine.tap import Seen, TapConfig, delegate
from vlprune.engine.vision import ATTENTION_FIELDS, CARRIER, Tape, Vision
from vlprune.errors import PruningError, UnsupportedModel, UnsupportedStage
from vlprune.plan import Plan, Step
from vlprune.pruner import DecodePruner, EncoderPruner
from vlprune.selection import Selection
from vlprune.trace import Clock, ItemTrace, StageTrace, Trace

HOOKS_RUN_TWICE = "__call__" in vars(GradientCheckpointingLayer)  # when gradients are checkpointed


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
        types = getattr(self.config, "layer_types", None)
        everywhere = getattr(self.config, "sliding_window", None) is not None
        self.sliding = [t == "sliding_attention" for t in types] if types else [everywhere] * len(adapter.layers)
        check_plan(plan, adapter)
        self.stages: dict[int, list[Step]] = {}
        for step in plan.steps:
            if step.stage.layer is not None:
                self.stages.setdefault(step.stage.layer, []).append(step)
        self.encoder = next((s for s in plan.steps if s.stage.name == "encoder"), None)
        self.evict = next((s for s in plan.steps if s.stage.name == "cache"), None)
        per_step = next((s for s in plan.steps if s.stage.name == "decode"), None)
        self.decoder = None if per_step is None else Decoder(adapter, per_step)
        self.vision = Vision(adapter, self.encoder, self._tower_needs())
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
            self.watched |= set(self.decoder.focal)
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
        read_prompt(run, ids, embeds, kwargs.get("attention_mask"), list(self.adapter.visual_ids.values()), table)
        tapes, self.runs.tapes = self.runs.tapes, {}
        for modality, out in (kwargs.get("mm_encoder_outputs") or {}).items():
            tape = getattr(out, CARRIER, tapes.get(modality))
            if tape is not None:
                run.tapes[modality] = tape
            elif out is not None:
                raise PruningError(f"the {modality} features do not come straight from this wrapped model's {modality} encoder: "
                                   "do not pass prefill_chunk_size (it cuts pictures apart), nor features that were made "
                                   "before the model was wrapped")  # fmt: skip
        if ids is None and not run.has_visual:
            warnings.warn("inputs_embeds holds no picture placeholders, so nothing is pruned; where pictures are already in it, "
                          "pass input_ids and pixel_values instead", stacklevel=2)  # fmt: skip

    def _core_post(self, module: nn.Module, args: Any, out: Any) -> None:
        run, self.runs.now = self.runs.now, None
        if run is None or run.trace is None or out is None:
            return
        self.runs.last = run.trace
        missed = [s for s in self.plan.steps if s.stage.name != "decode" and id(s) not in run.done]
        if missed:
            raise PruningError(f"the prompt held pictures, but {missed[0]} did not run; the model's layers were called in a "
                               "way vlprune does not see")  # fmt: skip

    def _tape_done(self, tape: Tape) -> None:
        """A feature method was called inside a forward pass (outside, the tape rides on its output)."""
        if self.runs.now is not None:
            self.runs.now.tapes[tape.modality] = tape

    def _text_pre(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        run = self.runs.now
        if run is None:
            return None
        cache: Cache | None = kwargs.get("past_key_values")
        if cache is not None:
            n = cache.get_seq_length()
            if isinstance(n, int) or run.length > 1:  # a static cache's is a tensor; a decode step does not need it
                run.past = int(n)
            for layer in cache.layers:
                sliding = bool(getattr(layer, "is_sliding", False))
                if sliding not in run.kv_offset:
                    run.kv_offset[sliding] = layer.get_mask_sizes(run.length)[1]
        if run.has_visual:
            self._check_placeholders(run)
            run.embeddings = kwargs.get("inputs_embeds")
        kept = kept_of(cache, 0)
        if kept is None or kept.shift is None:
            return None
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(run.past, run.past + run.length, device=kept.shift.device)[None]
        return args, {**kwargs, "position_ids": positions - kept.shift[:, None]}

    def _check_placeholders(self, run: Run) -> None:
        """In a fresh prompt placeholders stand for pictures; later a guessed or generated token may have their id."""
        for kind, modality in enumerate(self.adapter.visual_ids, 1):
            found = sum(n for runs in run.prompt for k, n in runs if k == kind)
            if found and modality not in run.tapes and not run.past:
                raise PruningError(f"{found} {modality} placeholders came without pixels; pass the {modality}s together with the "
                                   "whole prompt (no prefill_chunk_size)")  # fmt: skip
        run.has_visual = bool(run.tapes)

    def _text_post(self, module: nn.Module, args: Any, out: Any) -> Any:
        run = self.runs.now
        if run is None:
            return None
        if run.has_visual:
            if self.evict is not None:
                self._evict(run, self.evict, len(self.layers) - 1)
            if self.decoder is not None:
                self.decoder.open(run)
        if run.shortened is None:
            self._close_trace(run)
            return None
        out.last_hidden_state = expand(out.last_hidden_state, run.shortened, run.length)
        if out.hidden_states is not None:  # entry 0 is the input of layer 0, entry i the output of layer i - 1
            at = [run.at(max(i - 1, 0)) for i in range(len(out.hidden_states))]
            out.hidden_states = tuple(
                h if k is None or h is None else expand(h, k, run.length)
                for h, k in zip(out.hidden_states, at, strict=True)
            )
        self._close_trace(run)
        return out

    def _close_trace(self, run: Run) -> None:
        if run.trace is None:
            return
        per_layer = []
        for i in range(len(self.layers)):
            layout = run.at(i)
            per_layer.append(run.left.get(i, run.trace.visual if layout is None else _visual(layout)))
        run.trace.layer_tokens = per_layer

    # ---- before every decoder layer

    def _layer_pre(self, i: int, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        run = self.runs.now
        if run is None:
            return None
        cache = run.cache = kwargs.get("past_key_values")
        if run.length == 1:  # decode: only the mask may need to know
            kept = kept_of(cache, i)
            if kept is None:
                return None
            if (
                kept.dense
                and kwargs.get("attention_mask") is None
                and not (self.sliding[i] and self._counts_slots(run))
            ):
                return None
        x = args[0] if args else kwargs["hidden_states"]
        if run.has_visual:
            if HOOKS_RUN_TWICE and layer.training and getattr(layer, "gradient_checkpointing", False):
                raise PruningError("gradient checkpointing calls hooks again in the backward pass before transformers 5.23; "
                                   "update transformers, or switch it off")  # fmt: skip
            layout = self._open(run, x)
            if self.evict is not None:
                if i:
                    self._evict(run, self.evict, i - 1)
                if cache is not None and self._groups(run, self.evict, layout):
                    install(cache, i, kept_of(cache, i))  # a sliding window must not drop rows first
            if self.decoder is not None and getattr(layer_of(cache, i), "is_sliding", False):
                install(cache, i, kept_of(cache, i))  # likewise: slots of the prompt must stay where they are
            if i == 0 and self.encoder is not None:
                x = self._encoder_result(run, x)
            for step in self.stages.get(i, ()):
                x = self._stage(run, i, step, x, layer, kwargs)
            if self.decoder is None or i - 1 not in self.decoder.focal:
                run.seen.pop(i - 1, None)
        changed, kept = self._physical(run, i, x, kwargs)
        if not changed:
            return None
        if kept is not None and run.shortened is not None:
            install(cache, i, kept)
        if args:
            return (x, *args[1:]), {**kwargs, **changed}
        return args, {**kwargs, **changed, "hidden_states": x}

    def _physical(self, run: Run, i: int, x: Tensor, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Kept | None]:
        """The arguments of layer `i` that differ on the slots it really sees, and what its cache layer will hold of them."""
        layout, sliding, kept = run.shortened, self.sliding[i], kept_of(run.cache, i)
        changed: dict[str, Any] = {}
        if layout is not None:
            tables = kwargs["position_embeddings"]
            changed["position_embeddings"] = run.once(
                ("rope", sliding, layout.stage), lambda: self._rope(run, layout, tables)
            )
            changed["position_ids"] = None  # only read to find packed sequences, and gaps would look like some
            if run.cache is not None:
                before = kept
                key = ("kept", layout.stage, None if before is None else before.stage)
                kept = run.once(key, lambda: self._kept(run, layout, before))
        if layout is not None or kept is not None:
            mask, lay = kwargs.get("attention_mask"), layer_of(run.cache, i)
            stage = layout.stage if kept is None else kept.stage  # type: ignore[union-attr]
            changed["attention_mask"] = run.once(
                ("mask", sliding, stage), lambda: self._mask(run, mask, kept, lay, x, sliding)
            )
        return changed, kept

    # ---- stages

    def _open(self, run: Run, x: Tensor) -> Layout:
        """Find the items of this chunk, once per prefill."""
        if run.layout is not None:
            return run.layout
        queues = {}
        for kind, modality in enumerate(self.adapter.visual_ids, 1):
            if modality in run.tapes:
                tape = run.tapes[modality]
                queues[kind] = [(tape.items[s], tape, s) for s in _prompt_order(run, kind, tape.items)]
        rows: list[tuple[Span, ...]] = []
        for row, runs in enumerate(run.prompt):
            spans, at, picture = [], 0, 0
            for kind, length in runs:
                end = at + length
                if kind == 0 or (kind > 0 and kind not in queues):  # a placeholder's id without a picture is text
                    spans.append(Span(at, length))
                while kind in queues and at < end:
                    info, tape, source = queues[kind].pop(0)
                    if at + info.length > end:
                        raise PruningError(f"a picture of {info.length} tokens meets a run of {end - at} placeholders; does the "
                                           "prompt come from the model's own processor?")  # fmt: skip
                    run.visuals.append(Visual(row, len(run.visuals), at, info, tape, source, picture))
                    spans.append(Span(at, info.length, run.visuals[-1].item))
                    at, picture = at + info.length, picture + 1
                at = end
            rows.append(tuple(spans))
        run.opened = run.layout = Layout(tuple(rows), run.length)
        self._start_trace(run, x)
        return run.layout

    def _start_trace(self, run: Run, x: Tensor) -> None:
        heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        width = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        trace = Trace(str(self.plan), self.adapter.family, prompt=run.length, rows=len(run.prompt))
        trace.visual = sum(v.tokens for v in run.visuals)
        trace.text = sum(n for runs in run.prompt for kind, n in runs if kind >= 0) - trace.visual
        trace.kv_bytes_per_token = 2 * heads * width * x.element_size()
        trace.pictures = [ItemTrace(v.row, v.picture, v.info.grid, v.tokens, v.tokens) for v in run.visuals]
        run.trace = trace

    def _encoder_result(self, run: Run, x: Tensor) -> Tensor:
        """Remove at layer 0 what already left in the tower."""
        assert self.encoder is not None
        layout = self._open(run, x)
        run.done.add(id(self.encoder))
        chosen = {}
        clock = Clock(x.device)
        for v in run.visuals:
            if v.source in v.tape.selections:
                chosen[v.row, v.item] = v.tape.selections[v.source]
        gathered = {k: Selection(s.kept, None, s.scores) for k, s in chosen.items()}  # merged before the projector
        return self._shrink(run, self.encoder, 0, layout, gathered, x, clock)

    def _stage(self, run: Run, i: int, step: Step, x: Tensor, layer: nn.Module, kwargs: dict[str, Any]) -> Tensor:
        layout = self._open(run, x)
        run.done.add(id(step))
        clock = Clock(x.device)
        groups = self._groups(run, step, layout)
        if not groups:
            return self._shrink(run, step, i, layout, {}, x, clock)
        needs = frozenset(step.pruner.needs)
        seen = run.seen.get(i - 1)
        ahead = None
        if "next_attention" in needs:
            ahead = self._look_ahead(run, i, layer, x, kwargs)
        stand = Stand(run, self.adapter, self.vision, needs, layout, x.detach(), seen, ahead, i, self.runs.sizes)
        return self._shrink(run, step, i, layout, _choose(stand, step, groups), x, clock)

    def _groups(self, run: Run, step: Step, layout: Layout) -> list[tuple[int, list[Visual], int]]:
        """(row, items that share a budget, K) wherever something has to go."""
        groups: list[tuple[int, list[Visual], int]] = []
        for row, mine in groupby(run.visuals, lambda v: v.row):
            for visuals in [list(mine)] if step.budget.scope == "prompt" else [[v] for v in mine]:
                n = sum(layout.item(row, v.item).length for v in visuals)
                keep = min(step.budget.count(sum(v.tokens for v in visuals)), n)
                if keep < n:
                    groups.append((row, visuals, keep))
        return groups

    def _shrink(self, run: Run, step: Step, i: int, layout: Layout, chosen: dict[tuple[int, int], Selection], x: Tensor,
                clock: Clock) -> Tensor:  # fmt: skip
        """Gather the survivors. With nothing chosen the forward pass stays on its untouched path, bit by bit."""
        if chosen:
            kept = {key: s.kept for key, s in chosen.items()}
            gather, run.layout = Shrink(layout, kept).run((i, step.stage.name), x.device)
            out = x.gather(1, gather[..., None].expand(-1, -1, x.shape[-1]))
            for (row, item), s in chosen.items():
                if s.merge is not None:
                    old, new = layout.item(row, item), run.layout.item(row, item)
                    out[row, new.start : new.stop] = s.apply(x[row, old.start : old.stop])
            x = out
            run.layouts[i] = run.layout
            if self.plan.positions == "compact":
                removed = [sum(s.length for s in old) - sum(s.length for s in new)
                           for old, new in zip(layout.rows, run.layout.rows, strict=True)]  # fmt: skip
                shift = upload(removed, x.device)
                run.shift = shift if run.shift is None else run.shift + shift
        self._record(run, step, layout, chosen, [clock.stop()])
        return x

    def _record(self, run: Run, step: Step, layout: Layout, chosen: dict[tuple[int, int], Selection], clocks: list[Any]) -> None:  # fmt: skip
        assert run.trace is not None
        stage = StageTrace(str(step.stage), str(step).partition(":keep=")[0], clocks=clocks)
        for v in run.visuals:
            span = layout.item(v.row, v.item)
            item = ItemTrace(v.row, v.picture, v.info.grid, span.length, span.length, start=v.start)
            if layout.index is not None:
                item.places = layout.index[v.row, span.start : span.stop]
            if (v.row, v.item) in chosen:
                s = chosen[v.row, v.item]
                item.kept, item.chosen, item.scores = len(s.kept), s.kept, s.scores
            stage.items.append(item)
        run.trace.stages.append(stage)

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
        assert run.embeddings is not None and run.trace is not None
        clock = Clock(run.embeddings.device)
        layout = run.at(i) or run.opened
        assert layout is not None
        hidden, needs = run.embeddings, frozenset(step.pruner.needs)
        if layout.index is not None and "features" in needs:
            hidden = hidden.gather(1, layout.index.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1]))
        held = kept_of(run.cache, i) or Kept.everything(len(run.prompt), 0, -1, lay.keys.device)
        held = held.grown(run.past + run.length)
        past = held.slots - layout.width
        stand = Stand(run, self.adapter, self.vision, needs, layout, hidden, seen, None, i, self.runs.sizes)
        chosen = _choose(stand, step, self._groups(run, step, layout))
        if any(s.merge is not None for s in chosen.values()):
            raise PruningError(f"{step.pruner.name} merges tokens; cached keys cannot be merged, use another stage")
        if chosen:
            device = held.index.device
            gather, after = Shrink(layout, {k: s.kept for k, s in chosen.items()}).run(-1, device)
            assert after.index is not None
            slots = torch.cat([torch.arange(past, device=device).expand(len(gather), -1), gather + past], 1)
            pads = nn.functional.pad(after.index < 0, (past, 0))
            refill(run.cache, i, held.subset(slots, pads, after.dense, ("cache", i)), slots)
            run.left[i] = _visual(after)
        run.clocks.append(clock.stop())
        if i == len(self.layers) - 1:
            run.done.add(id(step))
            self._record(run, step, layout, chosen, run.clocks)

    # ---- conversions from logical to physical

    def _kept(self, run: Run, layout: Layout, before: Kept | None) -> Kept:
        assert layout.index is not None
        index = torch.where(layout.index >= 0, layout.index + run.past, layout.index)
        kept = Kept(index, run.past + run.length, layout.dense, layout.stage, shift=run.shift)
        if not run.past:
            return kept
        if before is not None:
            return kept.after(before.grown(run.past))
        return kept.after(Kept.everything(len(index), run.past, layout.stage, index.device))

    def _rope(self, run: Run, layout: Layout, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """cos and sin, [..., B or 1, T, d] -> [..., B, P, d]; older releases keep the axes of M-RoPE in front."""
        assert layout.index is not None
        at = layout.index.clamp(min=0)
        if self.plan.positions == "compact":  # the n-th survivor takes the place of the n-th token
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

    def _mask(self, run: Run, mask: Any, kept: Kept | None, lay: Any, x: Tensor, sliding: bool) -> Any:
        """Rows and columns of the mask the model built. What it means (causal, sliding, prefix) need not be known."""
        layout, batch, device, offset = run.shortened, x.shape[0], x.device, run.kv_offset.get(sliding, 0)
        query = None if layout is None else layout.index
        if kept is not None:
            key = kept.index.to(device)
            flash = isinstance(mask, Tensor) and mask.dim() == 2  # ends with the last token, also on a static cache
            end = offset + mask.shape[-1] if flash else logical_end(lay, run.past + run.length)
            if end > kept.upto:
                key = torch.cat([key, torch.arange(kept.upto, end, device=device).expand(batch, -1)], 1)
            dense = kept.dense
        else:  # no cache: the keys are this chunk's survivors
            assert layout is not None and query is not None
            key, dense = query, layout.dense
        if sliding and self._counts_slots(run):
            return self._near(run, mask, key)
        if mask is None and dense:
            return None  # order is preserved, so causal stays causal
        if mask is None:
            return self._causal(run, key, query, x)
        if not isinstance(mask, Tensor):
            raise PruningError("flex attention's block masks cannot be pruned; use attn_implementation='sdpa'")
        mask = mask.to(device)
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

    def _counts_slots(self, run: Run) -> bool:
        """Whether the window is left to a flash kernel, which counts slots instead of positions, and has begun to slide."""
        return "flash" in self.config._attn_implementation and run.past + run.length > self.config.sliding_window

    def _near(self, run: Run, mask: Any, key: Tensor) -> Tensor:
        """[B, P] for one new token: slots inside the window and not padding."""
        window = self.config.sliding_window
        if run.length > 1:
            raise PruningError(f"this prompt is longer than the sliding window of {window}, and flash attention would count the "
                               "window in kept tokens; load the model with attn_implementation='sdpa'")  # fmt: skip
        near = key > run.past + run.length - 1 - window
        if mask is not None:
            column = key - run.kv_offset.get(True, 0)
            near = near & (mask.expand(len(key), -1).gather(1, column.clamp(min=0, max=mask.shape[-1] - 1)) != 0)
        return (near & (key >= 0)).long()

    def _causal(self, run: Run, key: Tensor, query: Tensor | None, x: Tensor) -> Tensor:
        """A mask for ragged rows where the model had built none."""
        implementation = self.config._attn_implementation
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


def _prompt_order(run: Run, kind: int, items: list[Item]) -> list[int]:
    """Which item each picture of the prompt is: beams and several sequences per prompt repeat a row with all it shows."""
    tokens = [sum(n for k, n in runs if k == kind) for runs in run.prompt]
    copies = max(1, sum(tokens) // max(1, sum(i.length for i in items)))
    order: list[int] = []
    first = 0
    for row in range(0, len(tokens), copies):
        stop, left = first, tokens[row]
        while left > 0 and stop < len(items):
            left -= items[stop].length
            stop += 1
        order += list(range(first, stop)) * copies
        first = stop
    return order


def _choose(stand: Stand, step: Step, groups: list[tuple[int, list[Visual], int]]) -> dict[tuple[int, int], Selection]:
    """Ask the pruner, items of one size in one batch."""
    batches: dict[Any, list[tuple[int, list[Visual]]]] = {}
    for row, visuals, keep in groups:
        n = sum(stand.layout.item(row, v.item).length for v in visuals)
        batches.setdefault((n, keep, *(v.info.grids for v in visuals)), []).append((row, visuals))
    chosen: dict[tuple[int, int], Selection] = {}
    for (n, keep, *_), members in batches.items():
        with torch.no_grad():
            selections = step.pruner.select_many(Contexts(stand, members, keep))
        for selection, (row, visuals) in zip(selections, members, strict=True):
            chosen |= _per_item(selection.check(n, keep, step.pruner.adaptive), row, visuals, stand.layout)
    return chosen


def _per_item(
    selection: Selection, row: int, visuals: list[Visual], layout: Layout
) -> dict[tuple[int, int], Selection]:
    """A prompt-wide selection, cut into its items. Counts per item are known only on the device: one wait."""
    if len(visuals) == 1:
        return {(row, visuals[0].item): selection}
    if selection.merge is not None:
        raise PruningError("a merging pruner cannot share a budget among pictures; use scope=image")
    out, at = {}, 0
    for v in visuals:
        n = layout.item(row, v.item).length
        inside = (selection.kept >= at) & (selection.kept < at + n)
        scores = None if selection.scores is None else selection.scores[at : at + n]
        out[row, v.item] = Selection(selection.kept[inside] - at, None, scores)
        at += n
    return out


def _visual(layout: Layout) -> int:
    return sum(s.length for row in layout.rows for s in row if s.item is not None)


def check_plan(plan: Plan, adapter: Adapter) -> None:
    """Refuse at wrap time what this model cannot serve, and name what fits."""
    depth = len(adapter.layers)
    for step in plan.steps:
        stage, pruner = step.stage, step.pruner
        if stage.layer is not None and stage.layer >= depth:
            raise UnsupportedStage(
                f"{step} cuts before decoder layer {stage.layer}, but this model has layers 0 to {depth - 1}"
            )
        reason = adapter.why_not(stage)
        if not reason and isinstance(pruner, EncoderPruner) and stage.name == "encoder":
            reason = adapter.why_not_in_tower()
        if reason:
            raise UnsupportedStage(f"{step}: {reason}")
        only = (
            "encoder" if isinstance(pruner, EncoderPruner) else "decode" if isinstance(pruner, DecodePruner) else None
        )
        if only and stage.name != only:
            raise UnsupportedStage(f"{pruner.name} acts at stage {only!r} only, not at {str(stage)!r}")
        if not only and stage.name == "decode":
            raise UnsupportedStage(
                f"{pruner.name} chooses once per prompt; stage 'decode' takes per-step pruners such as fastocr"
            )
        if stage.name in ("encoder", "decode") and step.budget.scope == "prompt":
            raise UnsupportedStage(
                f"{step}: pictures are handled one by one at stage {stage}; use scope=image, or another stage"
            )
        if pruner.merges and (stage.name == "cache" or step.budget.scope == "prompt"):
            what = "cached keys cannot be merged" if stage.name == "cache" else "pictures cannot share its budget"
            raise UnsupportedStage(
                f"{step}: {pruner.name} merges tokens, and {what}; use another stage and scope=image"
            )
        offered = adapter.offers(stage)
        inside = next((s for s in plan.steps if isinstance(s.pruner, EncoderPruner) and s is not step), None)
        if inside is not None:  # the tower's attention then covers other tokens than the pictures had
            offered = offered - TOWER_FIELDS - (ATTENTION_FIELDS if stage.layer == 0 else frozenset())
        missing = frozenset(pruner.needs) - offered
        if missing:
            raise UnsupportedStage(_missing(step, missing, offered, adapter))
    if plan.positions == "compact":
        late = [s for s in plan.steps if s.stage.layer not in (0, None) or s.stage.name in ("cache", "decode")]
        if late or adapter.mrope:
            what = f"{late[0]} removes tokens later" if late else f"{adapter.family} has multi-dimensional positions"
            raise UnsupportedStage(f"positions='compact' renumbers the prompt before the language model; {what}. "
                                   "Use positions='original'")  # fmt: skip
    implementation = getattr(adapter.text.config, "_attn_implementation", None)
    if implementation == "flex_attention":
        raise UnsupportedModel("flex_attention builds block masks that cannot be pruned; load the model with "
                               "attn_implementation='sdpa'")  # fmt: skip


def _missing(step: Step, missing: frozenset[str], offered: frozenset[str], adapter: Adapter) -> str:
    from vlprune.pruner import PRUNERS

    fits = sorted(n for n, p in PRUNERS.items() if isinstance(p.needs, frozenset) and p.needs <= offered
                  and not issubclass(p, (EncoderPruner, DecodePruner)))  # fmt: skip
    return (f"{step} needs {', '.join(map(repr, sorted(missing)))}, which the {adapter.family} adapter does not offer at stage "
            f"{step.stage}.\n  It offers: {', '.join(sorted(offered))}. Pruners that fit here: {', '.join(fits)}. "
            f"(vlprune list --model {adapter.family})")  # fmt: skip
