"""The removal engine: what lives on a wrapped model.

Everything outside the decoder layers keeps the prompt's own coordinates. At a stage a pre-hook of the decoder layer gathers
the hidden states once; later layers see converted position tables and masks, and cache layers that report logical lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from vlprune.engine.adapter import Adapter
from vlprune.engine.cache import KeptStaticLayer, install, kept_of, layer_of
from vlprune.engine.contexts import LAYER_FIELDS, TOWER_FIELDS, Stand
from vlprune.engine.kept import Kept, Layout, Shrink, expand, layout_of
from vlprune.engine.run import Run, Runs, Visual, read_prompt
from vlprune.engine.tap import Seen, TapConfig, delegate
from vlprune.engine.vision import ATTENTION_FIELDS, CARRIER, Tape, Vision
from vlprune.errors import PruningError, UnsupportedModel, UnsupportedStage
from vlprune.plan import Plan, Step
from vlprune.pruner import DecodePruner, EncoderPruner
from vlprune.selection import Selection
from vlprune.trace import Clock, ItemTrace, StageTrace, Trace


@dataclass(eq=False)
class Hook:
    """A callable object, not a closure: a deep copy of a wrapped model then points at its own engine."""

    engine: Engine
    name: str
    layer: int = -1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = getattr(self.engine, self.name)
        return method(*args, **kwargs) if self.layer < 0 else method(self.layer, *args, **kwargs)


class Ahead(Exception):  # noqa: N818  (control flow, never seen outside)
    """Carries queries and keys out of an attention module before it computes anything else."""


class Engine:
    """One plan on one model. `attach` hooks it up, `detach` leaves no trace; nothing of a request stays on it."""

    def __init__(self, model: nn.Module, plan: Plan, adapter: Adapter) -> None:
        self.model, self.plan, self.adapter = model, plan, adapter
        self.text, self.layers = adapter.text, adapter.layers
        self.config: Any = adapter.text.config
        check_plan(plan, adapter)
        self.stages: dict[int, list[Step]] = {}
        for step in plan.steps:
            if step.stage.layer is not None:
                self.stages.setdefault(step.stage.layer, []).append(step)
        self.encoder = next((s for s in plan.steps if s.stage.name == "encoder"), None)
        self.evict = next((s for s in plan.steps if s.stage.name == "cache"), None)
        first = min(self.stages, default=len(self.layers))
        self.first = 0 if self.encoder or self.evict else first
        self.vision = Vision(adapter, self.encoder, self._tower_needs())
        self.vision.on_tape = Hook(self, "_tape_done")
        self.runs = Runs()
        self.image_sizes: list[tuple[int, int]] | None = None
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
        add(core.register_forward_pre_hook(Hook(self, "_core_pre"), with_kwargs=True))
        add(core.register_forward_hook(Hook(self, "_core_post"), always_call=True))
        add(text.register_forward_pre_hook(Hook(self, "_text_pre"), with_kwargs=True))
        add(text.register_forward_hook(Hook(self, "_text_post")))
        for i in range(self.first, len(self.layers)):
            add(self.layers[i].register_forward_pre_hook(Hook(self, "_layer_pre", i), with_kwargs=True))
        wanted = {k - 1 for k, steps in self.stages.items() for s in steps if k and frozenset(s.pruner.needs) & LAYER_FIELDS}
        if self.evict is not None:
            wanted |= set(range(len(self.layers)))
        for i in sorted(wanted):
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

    def _core_pre(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        run = self.runs.now = Run()  # replaces what an interrupted pass may have left
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        run.length = (ids if ids is not None else embeds).shape[1]
        if run.length == 1:  # a decode step: nothing to find, nothing to wait for
            return
        table = self.adapter.text.get_input_embeddings()  # type: ignore[operator]
        read_prompt(run, ids, embeds, kwargs.get("attention_mask"), list(self.adapter.visual_ids.values()), table)
        run.encoder_outputs = kwargs.get("mm_encoder_outputs")

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
        embeds = kwargs.get("inputs_embeds")
        if run.has_visual:
            run.embeddings = embeds
        if cache is None:
            return None
        n = cache.get_seq_length()
        if isinstance(n, int) or run.length > 1:  # a static cache's length is a tensor; a decode step does not need it
            run.past = int(n)
        for layer in cache.layers:
            sliding = bool(getattr(layer, "is_sliding", False))
            if sliding not in run.kv_offset:
                run.kv_offset[sliding] = layer.get_mask_sizes(run.length)[1]
        kept = kept_of(cache, 0)
        if kept is None or kept.shift is None:
            return None
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(run.past, run.past + run.length, device=kept.shift.device)[None]
        return args, {**kwargs, "position_ids": positions - kept.shift[:, None]}

    def _text_post(self, module: nn.Module, args: Any, out: Any) -> Any:
        run = self.runs.now
        if run is None:
            return None
        if self.evict is not None and run.has_visual:
            self._evict(run, self.evict)
        if run.shortened is None:
            self._close_trace(run)
            return None
        out.last_hidden_state = expand(out.last_hidden_state, run.shortened, run.length)
        if out.hidden_states is not None:  # entry 0 is the input of layer 0, entry i the output of layer i - 1
            at = [run.at(max(i - 1, 0)) for i in range(len(out.hidden_states))]
            out.hidden_states = tuple(
                h if k is None or h is None else expand(h, k, run.length) for h, k in zip(out.hidden_states, at, strict=True)
            )
        self._close_trace(run)
        return out

    def _close_trace(self, run: Run) -> None:
        if run.trace is None:
            return
        per_layer = []
        for i in range(len(self.layers)):
            layout = run.at(i)
            per_layer.append(run.trace.visual if layout is None else _visual(layout))
        if self.evict is not None:
            per_layer = [run.trace.stages[-1].kept] * len(self.layers)
        run.trace.layer_tokens = per_layer

    # ---- before every decoder layer

    def _layer_pre(self, i: int, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        run = self.runs.now
        if run is None:
            return None
        cache = kwargs.get("past_key_values")
        if run.length == 1:  # decode: only the mask may need to know
            kept = kept_of(cache, i)
            if kept is None or (kwargs.get("attention_mask") is None and kept.dense):
                return None
        x = args[0] if args else kwargs["hidden_states"]
        if run.has_visual:
            run.cache = cache
            if i == 0 and self.encoder is not None:
                x = self._encoder_result(run, x)
            for step in self.stages.get(i, ()):
                x = self._stage(run, i, step, x, layer, kwargs)
            if self.evict is None:
                run.seen.pop(i - 1, None)
        new = dict(kwargs)
        sliding = self._is_sliding(i)
        layout = run.shortened
        if layout is not None:
            tables = kwargs["position_embeddings"]
            new["position_embeddings"] = run.once(("rope", sliding, layout.stage), lambda: self._rope(run, layout, tables))
            new["position_ids"] = None  # only read to find packed sequences, and gaps would look like some
            if cache is not None:
                before = kept_of(cache, i)
                key = ("kept", layout.stage, None if before is None else before.stage)
                install(cache, i, run.once(key, lambda: self._kept(run, layout, before)))
        kept = kept_of(cache, i)
        if kept is None and layout is None:
            return None
        stage = kept.stage if kept is not None else layout.stage  # type: ignore[union-attr]
        mask = kwargs.get("attention_mask")
        new["attention_mask"] = run.once(
            ("mask", sliding, stage),
            lambda: self._mask(run, mask, kept, layer_of(cache, i), x, run.kv_offset.get(sliding, 0)),
        )
        if args:
            return (x, *args[1:]), new
        new["hidden_states"] = x
        return args, new

    def _is_sliding(self, i: int) -> bool:
        types = getattr(self.config, "layer_types", None)
        if types:
            return bool(types[i] == "sliding_attention")
        return getattr(self.config, "sliding_window", None) is not None

    # ---- stages

    def _open(self, run: Run, x: Tensor) -> Layout:
        """Find the items of this chunk, once per prefill."""
        if run.layout is not None:
            return run.layout
        outputs = run.encoder_outputs or {}
        for modality, out in outputs.items():
            tape = getattr(out, CARRIER, None)
            if tape is not None:
                run.tapes[modality] = tape
        queues: dict[str, list[tuple[Any, Tape | None, int]]] = {}
        for modality in self.adapter.visual_ids:
            tape = run.tapes.get(modality)
            if tape is not None:
                features = getattr(outputs.get(modality), "pooler_output", None)
                order = tape.order(features) if features is not None else list(range(len(tape.items)))
                queues[modality] = [(tape.items[s], tape, s) for s in order]
        assert run.kinds is not None
        modalities = list(self.adapter.visual_ids)
        items: list[list[int]] = []
        number = 0
        for row, kinds in enumerate(run.kinds):
            marks, at, picture = [-1] * len(kinds), 0, 0
            while at < len(kinds):
                if kinds[at] <= 0:
                    at += 1
                    continue
                end = at
                while end < len(kinds) and kinds[end] == kinds[at]:
                    end += 1
                queue = queues.get(modalities[kinds[at] - 1])
                while at < end:
                    info, tape, source = queue.pop(0) if queue else (self.adapter.bare_item(end - at), None, -1)
                    if at + info.length > end:
                        raise PruningError(f"a picture of {info.length} tokens meets a run of {end - at} placeholders; prompts "
                                           "must be prefilled in one piece (no prefill_chunk_size)")  # fmt: skip
                    run.visuals.append(Visual(row, number, at, info, tape, source, picture))
                    marks[at : at + info.length] = [number] * info.length
                    at, number, picture = at + info.length, number + 1, picture + 1
            items.append(marks)
        run.opened = run.layout = layout_of(run.valid, items)
        self._start_trace(run, x)
        return run.layout

    def _start_trace(self, run: Run, x: Tensor) -> None:
        heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        width = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        trace = Trace(str(self.plan), self.adapter.family, prompt=run.length, rows=len(run.valid))
        trace.visual = sum(v.tokens for v in run.visuals)
        trace.text = sum(map(sum, run.valid)) - trace.visual
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
            if v.tape is None:
                raise PruningError(f"{self.encoder} acts in the vision tower, but this prompt brought finished features; "
                                   "pass pixel_values")  # fmt: skip
            if v.tape.selections:
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
        past = 0 if seen is None else seen.key.shape[2] - seen.query.shape[2]
        cache_layer = layer_of(kwargs.get("past_key_values"), i - 1) if seen is not None else None
        if isinstance(cache_layer, KeptStaticLayer) or getattr(cache_layer, "max_cache_len", None):
            past = run.past  # a static cache hands over all its slots; only an empty one can be pruned
        ahead = None
        if "next_attention" in needs:
            ahead = self._look_ahead(run, i, layer, x, kwargs)
        stand = Stand(run, self.adapter, self.vision, needs, layout, x.detach(), seen, ahead, past, i, self.image_sizes)
        chosen = {}
        for row, visuals, keep in groups:
            n = sum(layout.item(row, v.item).length for v in visuals)
            with torch.no_grad():
                selection = step.pruner.select(stand.context(row, visuals, keep)).check(n, keep, step.pruner.adaptive)
            chosen |= _per_item(selection, row, visuals, layout)
        return self._shrink(run, step, i, layout, chosen, x, clock)

    def _groups(self, run: Run, step: Step, layout: Layout) -> list[tuple[int, list[Visual], int]]:
        """(row, items that share a budget, K) wherever something has to go."""
        groups: list[tuple[int, list[Visual], int]] = []
        for row in range(len(layout.rows)):
            mine = [v for v in run.visuals if v.row == row]
            for visuals in [mine] if step.budget.scope == "prompt" and mine else [[v] for v in mine]:
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
            gather, run.layout = Shrink(layout, kept).run(i, x.device)
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
                shift = torch.tensor(removed, device=x.device)
                run.shift = shift if run.shift is None else run.shift + shift
        self._record(run, step, layout, chosen, clock)
        return x

    def _record(self, run: Run, step: Step, layout: Layout, chosen: dict[tuple[int, int], Selection], clock: Clock) -> None:
        assert run.trace is not None
        stage = StageTrace(str(step.stage), str(step).partition(":keep=")[0], clock=clock.stop())
        for v in run.visuals:
            n = layout.item(v.row, v.item).length
            item = ItemTrace(v.row, v.picture, v.info.grid, n, n)
            span = layout.item(v.row, v.item)
            if layout.index is not None:
                item.cells = layout.index[v.row, span.start : span.stop] - v.start
                item.index = item.cells
            if (v.row, v.item) in chosen:
                s = chosen[v.row, v.item]
                item.kept = len(s.kept)
                item.index = s.kept if item.cells is None else item.cells[s.kept]
                item.scores = s.scores
            stage.items.append(item)
        run.trace.stages.append(stage)

    def _capture(self, i: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kw: Any) -> Any:
        run = self.runs.now
        if run is not None and run.has_visual:
            run.seen[i] = Seen.of(module, query, key, value, mask, kw)
        return delegate(module, query, key, value, mask, *args, **kw)

    def _look_ahead(self, run: Run, i: int, layer: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> Seen:
        """Queries and keys of layer `i` for its input, by starting its attention and stopping before any product."""
        attention = self.adapter.layer_attention(layer)
        config = attention.config
        base = config._base if isinstance(config, TapConfig) else config

        def stop(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, *a: Any, **kw: Any) -> Any:
            raise Ahead(Seen.of(module, q, k, v, mask, kw))

        tables, mask = kwargs["position_embeddings"], kwargs.get("attention_mask")
        if run.shortened is not None:
            layout = run.shortened
            tables = self._rope(run, layout, tables)
            mask = self._mask(run, mask, None, None, x, run.kv_offset.get(self._is_sliding(i), 0))
        elif isinstance(mask, Tensor):  # keys of earlier turns are not looked at: this chunk's columns only
            mask = mask[..., -run.length :] if run.past else mask[..., : run.length]
        attention.config = TapConfig(base, stop)  # type: ignore[assignment]
        try:
            with torch.no_grad():
                attention(hidden_states=layer.input_layernorm(x), position_embeddings=tables, attention_mask=mask)  # type: ignore[operator]
        except Ahead as found:
            return found.args[0]  # type: ignore[no-any-return]
        finally:
            attention.config = config
        raise PruningError(f"layer {i} does not call the attention interface; next_attention cannot be had")

    # ---- stage "cache"

    def _evict(self, run: Run, step: Step) -> None:
        """After the prefill: every layer drops visual rows of its own cache."""
        cache: Cache | None = run.cache
        if cache is None:
            raise PruningError(f"{step} drops rows of the key-value cache, but the model ran without one; pass use_cache=True")
        assert run.embeddings is not None
        self._open(run, run.embeddings)
        stage = StageTrace("cache", str(step).partition(":keep=")[0], clock=0.0)
        run.done.add(id(step))
        assert run.trace is not None
        run.trace.stages.append(stage)
        needs = frozenset(step.pruner.needs)
        clock = Clock(run.embeddings.device)
        for i in range(len(self.layers)):
            layout = run.at(i) or run.opened
            assert layout is not None
            lay, seen = layer_of(cache, i), run.seen.pop(i, None)
            groups = self._groups(run, step, layout)
            if not groups or lay is None:
                continue
            past = lay.keys.shape[2] - layout.width
            hidden = run.embeddings
            if layout.index is not None:
                hidden = hidden.gather(1, layout.index.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1]))
            stand = Stand(run, self.adapter, self.vision, needs, layout, hidden, seen, None, past, i)
            chosen: dict[tuple[int, int], Selection] = {}
            for row, visuals, keep in groups:
                n = sum(layout.item(row, v.item).length for v in visuals)
                with torch.no_grad():
                    s = step.pruner.select(stand.context(row, visuals, keep)).check(n, keep, step.pruner.adaptive)
                if s.merge is not None:
                    raise PruningError(f"{step.pruner.name} merges tokens; cached keys cannot be merged, use another stage")
                chosen |= _per_item(s, row, visuals, layout)
            if chosen:
                self._evict_layer(run, cache, i, layout, {k: s.kept for k, s in chosen.items()}, past)
            if i == len(self.layers) - 1:
                self._record_eviction(stage, run, layout, chosen)
        stage.clock = clock.stop()

    def _evict_layer(self, run: Run, cache: Cache, i: int, layout: Layout, kept: dict[tuple[int, int], Tensor], past: int) -> None:
        lay = cache.layers[i]
        gather, after = Shrink(layout, kept).run(len(self.layers) + i, lay.keys.device)
        rows = torch.cat([torch.arange(past, device=gather.device).expand(len(gather), -1), gather + past], 1)
        before = kept_of(cache, i)
        earlier = None if before is None or not run.past else before
        new = self._kept(run, after, earlier)
        index = rows[:, None, :, None]
        keys = lay.keys.gather(2, index.expand(-1, lay.keys.shape[1], -1, lay.keys.shape[3]))
        values = lay.values.gather(2, index.expand(-1, lay.values.shape[1], -1, lay.values.shape[3]))
        fresh = install(cache, i, new)
        fresh.keys, fresh.values = keys, values

    def _record_eviction(self, stage: StageTrace, run: Run, layout: Layout, chosen: dict[tuple[int, int], Selection]) -> None:
        for v in run.visuals:
            n = layout.item(v.row, v.item).length
            s = chosen.get((v.row, v.item))
            stage.items.append(ItemTrace(v.row, v.picture, v.info.grid, n, n if s is None else len(s.kept),
                                         None if s is None else s.kept))  # fmt: skip

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
        """cos and sin, [B or 1, T, d] -> [B, P, d]."""
        assert layout.index is not None
        at = layout.index.clamp(min=0)
        if self.plan.positions == "compact":  # the entry of a token's rank instead of its place
            first = torch.tensor([row.index(True) for row in run.valid], device=at.device)[:, None]
            pads = (layout.index < 0).sum(1, keepdim=True)
            at = (torch.arange(at.shape[1], device=at.device) - pads + first).clamp(min=0)
        return tuple(t.expand(len(at), -1, -1).gather(1, at.to(t.device)[..., None].expand(-1, -1, t.shape[-1])) for t in tables)

    def _mask(self, run: Run, mask: Any, kept: Kept | None, lay: Any, x: Tensor, offset: int) -> Any:
        """Rows and columns of the mask the model built. What it means (causal, sliding, prefix) need not be known."""
        layout, batch, device = run.shortened, x.shape[0], x.device
        query = None if layout is None else layout.index
        if kept is not None:
            key = kept.index.to(device)
            end = lay.logical_max if isinstance(lay, KeptStaticLayer) else run.past + run.length
            if end > kept.upto:
                key = torch.cat([key, torch.arange(kept.upto, end, device=device).expand(batch, -1)], 1)
            dense = kept.dense
        else:  # no cache: the keys are this chunk's survivors
            assert layout is not None and query is not None
            key, dense = query, layout.dense
        if mask is None and dense:
            return None  # order is preserved, so causal stays causal
        if mask is None:
            return self._causal(run, key, query, x)
        if not isinstance(mask, Tensor):
            raise PruningError("flex attention's block masks cannot be pruned; use attn_implementation='sdpa'")
        mask = mask.to(device)
        column = key - offset
        gone = (key < 0) | (column < 0)
        column = column.clamp(min=0, max=mask.shape[-1] - 1)
        if mask.dim() == 2:  # flash
            return mask.expand(batch, -1).gather(1, column).masked_fill(gone, 0)
        mask = mask.expand(batch, *mask.shape[1:])
        heads = mask.shape[1]
        if query is not None:
            rows = query.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, mask.shape[3])
            mask = mask.gather(2, rows)
        mask = mask.gather(3, column[:, None, None, :].expand(-1, heads, mask.shape[2], -1))
        off = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = mask.masked_fill(gone[:, None, None, :], off)
        if query is not None and layout is not None and not layout.dense:  # pad slots look anywhere: no row is empty
            mask = mask.masked_fill((query < 0)[:, None, :, None], True if mask.dtype == torch.bool else 0.0)
        return mask

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


def _per_item(selection: Selection, row: int, visuals: list[Visual], layout: Layout) -> dict[tuple[int, int], Selection]:
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
            raise UnsupportedStage(f"{step} cuts before decoder layer {stage.layer}, but this model has layers 0 to {depth - 1}")
        reason = adapter.why_not(stage)
        if reason:
            raise UnsupportedStage(f"{step}: {reason}")
        only = "encoder" if isinstance(pruner, EncoderPruner) else "decode" if isinstance(pruner, DecodePruner) else None
        if only and stage.name != only:
            raise UnsupportedStage(f"{pruner.name} acts at stage {only!r} only, not at {str(stage)!r}")
        if not only and stage.name == "decode":
            raise UnsupportedStage(f"{pruner.name} chooses once per prompt; stage 'decode' takes per-step pruners such as fastocr")
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
