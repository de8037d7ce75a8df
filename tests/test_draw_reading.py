"""On a trained model that reads: the focus lies where the written word stands."""

from __future__ import annotations

from typing import Any

import pytest

import vlprune
from vlprune.draw.overlay import cells
from vlprune.eval.checkpoints import load
from vlprune.eval.tiny import Item, items
from vlprune.eval.tiny.evaluate import prompt
from vlprune.geometry import Lens

LAYER = 5  # of 8, where this model looks at what it writes


@pytest.fixture(scope="module")
def reader() -> Any:
    model, processor = load("tiny-llava", dtype="float32")
    return vlprune.wrap(model, f"fastocr:keep=0.9:least=0:focal_layers={LAYER}"), processor


def share(trace: vlprune.Trace, item: Item, processor: Any, step: int) -> float:
    """The attention on the evidence over what as many tokens would get by chance."""
    lens: Lens = trace.lens.read(processor)
    (view,) = lens.views(item.image.size, [trace.pictures[0].grids])
    scores = trace.gazes()[step].scores
    half = item.image.width / 48  # a token counts that lies half on the box
    inside = [c.token for c in cells(view, item.image.size)
              if any(left - half <= c.centre[0] <= right + half and top - half <= c.centre[1] <= bottom + half
                     for left, top, right, bottom in item.boxes)]  # fmt: skip
    return sum(scores[t] for t in inside) / sum(scores.values()) * len(scores) / len(inside)


@pytest.mark.parametrize("task", ["letter", "line"])
def test_the_focus_lies_on_what_is_written(reader: Any, task: str) -> None:
    model, processor = reader
    for item in items(task, 3, 7):
        inputs = prompt(processor, [item])
        with vlprune.recording(model):
            ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        trace = vlprune.trace(model)
        written = vlprune.draw.pieces(processor, ids.tolist())
        step = next(n for n, piece in enumerate(written) if piece.strip())
        assert item.answer.startswith(written[step].strip())
        assert share(trace, item, processor, step) > 4
