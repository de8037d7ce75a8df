from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vlprune
from vlprune import Grid, Plan
from vlprune.errors import SpecError
from vlprune.eval import grounding
from vlprune.eval.checkpoints import load
from vlprune.eval.grounding import Kept, kept, mean, measure, plans_for, relevant
from vlprune.eval.tiny import Item, items
from vlprune.eval.tiny.drawing import PATCH, Box
from vlprune.eval.tiny.evaluate import prompt
from vlprune.geometry import Area, Fitted, View

SIDE = 24  # tokens


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load("tiny-llava", dtype="float32")


def square(boxes: list[Box], side: int = 336) -> set[int]:
    """By the definition, pixel by pixel, on a grid of 14 x 14 cells."""
    mask = np.zeros((side, side), bool)
    for box in boxes:
        mask[box.top : box.bottom, box.left : box.right] = True
    cells = mask.reshape(side // PATCH, PATCH, side // PATCH, PATCH).any((1, 3))
    return {int(i) for i in np.flatnonzero(cells)}


def test_relevant_tokens_are_those_that_share_a_pixel_with_a_box() -> None:
    views = Fitted(336, shortest=336, crop=(336, 336)).views((336, 336), [(Grid(1, SIDE, SIDE),)])
    for item in items("relation", 6, 3) + items("kv", 6, 3):
        assert {token for _, token in relevant(views, item.boxes)} == square(list(item.boxes))


def test_a_box_that_ends_at_a_tokens_edge_does_not_touch_it() -> None:
    area = Area(((0, 10), (10, 20)), ((0, 10), (10, 20)), run=0, first=5, stride=3)
    assert relevant([View("v", (area,))], [Box(0, 0, 10, 10)]) == {(0, 5)}
    assert relevant([View("v", (area,))], [Box(9, 9, 11, 11)]) == {(0, 5), (0, 6), (0, 8), (0, 9)}
    assert relevant([View("v", (area,))], [Box(20, 0, 30, 10)]) == set()


@torch.inference_mode()
def test_random_keeps_its_budget_of_the_evidence(tiny: tuple[Any, Any]) -> None:
    """Every token stays with probability K / N, so recall is a mean of such draws whatever the boxes."""
    model, processor = tiny
    item = items("page", 1, 5)[0]
    inputs = prompt(processor, [item])
    found = []
    for seed in range(8):
        with vlprune.pruning(model, f"random:keep=0.25:seed={seed}"):
            model(**inputs)
            found.append(kept(vlprune.trace(model), item, processor))
    assert {k.share for k in found} == {0.25}
    wanted = len(square(list(item.boxes)))
    deviation = (0.25 * 0.75 / wanted * (576 - wanted) / 575 / len(found)) ** 0.5  # hypergeometric
    assert abs(np.mean([k.recall for k in found]) - 0.25) < 4 * deviation
    assert deviation < 0.03


def test_recall_counts_the_kept_cells_of_the_last_stage(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    item = items("letter", 1, 7)[0]
    plan = Plan.parse("fastv@2:keep=0.5+fastv@4:keep=0.1")
    with vlprune.pruning(model, plan), torch.inference_mode():
        model(**prompt(processor, [item]))
        trace = vlprune.trace(model)
    wanted = square(list(item.boxes))
    left = set(trace.cells())
    assert len(left) == 58
    assert kept(trace, item, processor) == Kept(len(left & wanted) / len(wanted), 58 / 576)


def test_everything_kept_is_everything_recalled(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    row = measure(model, processor, Plan.parse("divprune:keep=1.0"), grounding.draw(["sign"], 1, 7), answers=True)
    assert (row.recall.value, row.kept, row.score, row.by_task) == (1.0, 1.0, 1.0, {"sign": 1.0})


def test_a_picture_larger_than_the_tower_sees_is_scaled_with_its_boxes(tiny: tuple[Any, Any]) -> None:
    """Twice the size, same tokens."""
    model, processor = tiny
    item = items("letter", 1, 7)[0]
    boxes = tuple(Box(*(2 * v for v in box)) for box in item.boxes)
    image = item.image.resize((672, 672), Image.Resampling.NEAREST)
    double = Item(item.task, item.index, item.seed, image, item.question, item.answer, boxes, Box(0, 0, 672, 672))
    with vlprune.pruning(model, "uniform:keep=0.3"), torch.inference_mode():
        model(**prompt(processor, [item]))
        small = kept(vlprune.trace(model), item, processor)
        model(**prompt(processor, [double]))
        assert kept(vlprune.trace(model), double, processor) == small


def test_items_without_evidence_are_refused_or_left_out(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    denied = next(item for item in items("exist", 2, 7) if not item.boxes)
    with vlprune.pruning(model, "uniform:keep=0.3"), torch.inference_mode():
        model(**prompt(processor, [denied]))
        with pytest.raises(SpecError, match="no evidence"):
            kept(vlprune.trace(model), denied, processor)
    drawn = grounding.draw(["exist"], 4, 7)
    assert len(drawn) == 2 and all(asked.item.answer == "yes" for asked in drawn)


def test_suites_score_by_their_own_rule() -> None:
    line, page = grounding.draw(["line"], 1, 7)[0], grounding.draw(["tiny_ocr"], 1, 7)[0]
    assert line.score("AB", "AC") == 0.0 and page.score("AB", "AC") == 0.5


def test_rules_without_one_kept_set_are_named(tiny: tuple[Any, Any]) -> None:
    plans, notes = plans_for(tiny[0], ["all"], [0.5])
    assert all(step.stage.name not in ("cache", "decode") for plan in plans for step in plan.steps)
    assert any("fastocr is left out: it chooses anew at decode" in note for note in notes)
    with pytest.raises(SpecError, match="no one kept set"):
        plans_for(tiny[0], ["fastocr"], [0.5])


def test_mean_interval_covers_the_mean() -> None:
    values = np.random.default_rng(0).random(50).tolist()
    found = mean(values)
    assert found.low is not None and found.high is not None
    assert found.low < np.mean(values) == found.value < found.high
    assert mean([0.5]).low is None


def test_command_line_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grounding.main([
        "tiny-llava", "--plans", "fastv@4", "--keep", "0.1", "--items", "1", "--tasks", "letter,tiny_kv", "--answers",
        "--out", str(tmp_path),
    ])  # fmt: skip
    found = json.loads((tmp_path / "results.json").read_text())
    assert {row["plan"] for row in found["rows"]} == {"fastv@4:keep=0.1", "random:keep=0.1"}
    assert set(found["rows"][0]["by_task"]) == {"letter", "kv"}
    assert "over chance" in (tmp_path / "table.md").read_text() and "fastv@4" in capsys.readouterr().out
    with pytest.raises(SpecError, match="did you mean letter"):
        grounding.main(["tiny-llava", "--tasks", "leter"])
