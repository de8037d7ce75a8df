"""What the trace tells of a prefill. It is written once the prefill is queued, where the device has enough to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlprune.engine.adapter import Adapter
from vlprune.engine.evict import Chosen
from vlprune.engine.kept import Layout
from vlprune.engine.run import Run
from vlprune.plan import Plan, Step
from vlprune.trace import ItemTrace, StageTrace, Trace


@dataclass(frozen=True, eq=False)
class Record:
    """One stage as it ran."""

    step: Step
    layout: Layout  # before it
    chosen: Chosen
    clocks: list[Any]


def trace_of(run: Run, plan: Plan, adapter: Adapter, element_size: int, recording: bool) -> Trace:
    """The trace but for `layer_tokens`."""
    config: Any = adapter.text.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    trace = Trace(str(plan), adapter.family, prompt=run.length, rows=len(run.prompt))
    trace.visual = sum(v.tokens for v in run.visuals)
    trace.text = sum(n for runs in run.prompt for kind, n in runs if kind >= 0) - trace.visual
    trace.kv_bytes_per_token = 2 * heads * width * element_size
    trace.lens = adapter.lens()
    trace.looks = [] if recording else None
    trace.pictures = [
        ItemTrace(
            v.row, v.picture, v.info.grid, v.tokens, v.tokens, grids=v.info.grids, video=v.tape.modality == "video"
        )
        for v in run.visuals
    ]
    trace.stages = [_stage(run, record) for record in run.records]
    if run.visual_left:
        trace.text_tokens = [trace.text] * len(adapter.layers)
    for layer, left in run.visual_left.items():
        every, run.left[layer] = run.left[layer], round(float(left))
        trace.text_tokens[layer] = every - run.left[layer]  # type: ignore[index]
    return trace


def _stage(run: Run, record: Record) -> StageTrace:
    layout, step = record.layout, record.step
    stage = StageTrace(str(step.stage), str(step).partition(":keep=")[0], clocks=record.clocks)
    for v in run.visuals:
        span = layout.item(v.row, v.item)
        item = ItemTrace(v.row, v.picture, v.info.grid, span.length, span.length, start=v.start)
        if layout.index is not None:
            item.places = layout.index[v.row, span.start : span.stop]
        s = record.chosen.get((v.row, v.item))
        if s is not None:
            item.kept, item.chosen, item.scores, item.merge = len(s.kept), s.kept, s.scores, s.merge
        stage.items.append(item)
    return stage
