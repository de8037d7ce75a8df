from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vlprune
from vlprune import Grid
from vlprune.errors import UnsupportedStage
from vlprune.eval.checkpoints import load
from vlprune.eval.debiasing import (
    HOSTS,
    SETTINGS,
    TASKS,
    VARIANTS,
    Cell,
    Study,
    batches,
    main,
    right_answers,
    rows,
    variants,
    verdict,
)
from vlprune.eval.tiny import Item, items
from vlprune.eval.tiny.drawing import PATCH
from vlprune.plan import Plan
from vlprune.pruners.debias import inside, inside_bilinear

GRID = Grid(1, 24, 24)
SMALL = Study(tasks=("letter",), hosts=("fastv@4",), keep=(0.111,), items=3, calibration=4, batch=4)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load("tiny-llava", dtype=torch.float32)


# ---- do mask and letterbox mean the same?


def covered(item: Item) -> torch.Tensor:
    """[24, 24] share of each cell that lies in the picture's content."""
    box = item.content
    edges = torch.arange(25.0) * PATCH
    rows, columns = edges.clamp(box.top, box.bottom).diff(), edges.clamp(box.left, box.right).diff()
    return rows[:, None] * columns[None, :] / PATCH**2


@pytest.mark.parametrize("task", TASKS)
def test_the_mask_of_debias_is_the_generators_letterbox(task: str):
    """Where padding is odd the generator puts the spare pixel below or to the right; `inside` halves it."""
    drawn = items(task, 40, 5, padded=True)
    assert len({i.original_size for i in drawn}) > 20
    for item in drawn:
        share = covered(item)
        assert max(item.original_size) == 336 > min(item.original_size)
        clear = (share - 0.5).abs() > 0.5 / PATCH
        assert torch.equal(inside(item.original_size, GRID)[clear], share[clear] > 0.5)
        assert torch.equal(inside_bilinear(item.original_size, GRID)[clear], share[clear] > 0.5)
        assert clear.float().mean() > 0.9
        for box in item.boxes:
            inner = share[box.top // PATCH : box.bottom // PATCH + 1, box.left // PATCH : box.right // PATCH + 1]
            assert (inner > 0).all(), "evidence lies in the picture"


def test_settings_are_what_they_say():
    for item in items("letter", 20, 3, **SETTINGS["both"]):
        assert item.original_size != (336, 336)
        assert all(box.bottom <= 168 for box in item.boxes)
    assert {i.original_size for i in items("letter", 5, 3, **SETTINGS["upper"])} == {(336, 336)}


# ---- plans


def test_every_row_of_a_batch_is_masked_by_its_own_picture(loaded: tuple[Any, Any]):
    model, processor = loaded
    drawn = items("color", 5, 11, padded=True)
    (batch,) = batches(model, processor, drawn, 8)
    trend = SMALL.trends(model, processor)["fastv@4"]
    for name, plan in variants(trend, 0.25).items():
        with vlprune.pruning(model, plan), vlprune.image_sizes(model, batch.sizes), torch.no_grad():
            model(**batch.inputs)
            cells = [vlprune.trace(model).cells(row=row) for row in range(5)]
        padded = [int((~inside(i.original_size, GRID)).flatten()[c].sum()) for i, c in zip(drawn, cells, strict=True)]
        assert all(len(c) == 144 for c in cells)
        assert (sum(padded) == 0) == (name in ("padding", "both"))


def test_variants_differ_in_one_thing_each(loaded: tuple[Any, Any]):
    trend = SMALL.trends(*loaded)["fastv@4"]
    plans = variants(trend, 0.111)
    assert tuple(plans) == VARIANTS
    assert str(plans["before"]) == "fastv@4:keep=0.111"
    assert str(plans["padding"]) == "debias(fastv)@4:keep=0.111:trend=off"
    rules = {name: plan.steps[0].pruner for name, plan in plans.items()}
    assert replace(rules["both"], padding="off") == rules["trend"]
    assert all(Plan.parse(str(plan)) == plan for plan in plans.values())


@pytest.mark.parametrize("host", HOSTS)
def test_the_model_serves_every_host(loaded: tuple[Any, Any], host: str):
    name, _, layer = host.partition("@")
    assert vlprune.why_unsupported(loaded[0], f"debias({name})@{layer}", 0.5) is None


# ---- the study


def test_study(loaded: tuple[Any, Any]):
    model, processor = loaded
    cells = list(SMALL.run(model, processor, SMALL.trends(model, processor)))
    assert [(c.host, c.variant, c.task) for c in cells[::2]] == [
        ("unpruned", "", "letter"), ("random@4", "", "letter"), *(("fastv@4", v, "letter") for v in VARIANTS)
    ]  # fmt: skip
    assert {c.task for c in cells[1::2]} == {"all"}
    assert all(c.items == 3 and 0 <= c.low <= c.accuracy <= c.high <= 1 for c in cells)
    assert all((c.p is not None) == (c.variant in VARIANTS[1:]) for c in cells)
    asked = batches(model, processor, SMALL.draw(), 1)
    for cell in cells[::2]:
        assert right_answers(model, processor, asked, cell.plan or None).sum() == cell.right, "one by one as in a batch"
    table = rows(cells, SMALL)
    assert [row[:3] for row in table] == [["unpruned", "1", "letter"], ["unpruned", "1", "all"],
                                         ["fastv@4", "0.111", "letter"], ["fastv@4", "0.111", "all"]]  # fmt: skip
    assert table[2][3] == str(cells[2])
    assert table[2][4:] == [str(c) for c in cells[4::2]]


def test_calibration_sees_other_pictures():
    study = Study(items=4, calibration=10)
    asked, seen = study.draw(), study.draw_calibration()
    assert len(seen) == 10
    assert {i.task for i in seen} == set(study.tasks)
    assert not {i.seed for i in asked} & {i.seed for i in seen}
    pixels = {i.image.tobytes() for i in asked}
    assert not any(i.image.tobytes() in pixels for i in seen)


def cell(better: int, worse: int, p: float | None, variant: str = "both", task: str = "kv") -> Cell:
    return Cell("plan", task, 0.1, "fastv@4", variant, 50, 25, 0.366, 0.634, better, worse, p)


def test_signs_and_verdict():
    assert str(cell(12, 1, 0.003)) == "0.500 [0.366, 0.634] +"
    assert str(cell(1, 12, 0.003)) == "0.500 [0.366, 0.634] -"
    assert str(cell(6, 3, 0.5)) == str(cell(0, 0, None)) == "0.500 [0.366, 0.634]"
    cells = [
        cell(12, 1, 0.003),
        cell(1, 12, 0.003),
        cell(6, 3, 0.5),
        cell(9, 0, 0.004, task="all"),
        cell(9, 0, 0.004, "trend"),
    ]
    assert verdict(cells, "both") == "both against before: 1 of 3 cells won, 1 lost, +2.0 points on average"


def test_intervals_and_pairs():
    study = Study(tasks=("a", "b"), items=50)
    before = np.zeros(100)
    right = np.concatenate([np.ones(10), np.zeros(90)])
    found = {c.task: c for c in study._cells(right, "plan", 0.1, "fastv@4", "both", before)}
    assert (found["a"].low, found["a"].high) == pytest.approx((0.1124, 0.3304), abs=1e-4)  # Wilson, 10 of 50
    assert found["a"].p == pytest.approx(2 * 0.5**10)
    assert (found["a"].better, found["b"].better, found["all"].better) == (10, 0, 10)
    assert found["b"].p == 1


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["--tasks", "color", "--hosts", "fastv@4", "--keep", "0.056", "--items", "2", "--calibration", "3", "--batch",
          "4", "--device", "cpu", "--setting", "padded", "--out", str(tmp_path / "found")])  # fmt: skip
    data = json.loads((tmp_path / "found.json").read_text())
    assert len(data["cells"]) == 2 * (1 + 1 + 4)
    assert data["setting"]["setting"] == {"padded": True}
    assert Plan.parse(data["plans"]["fastv@4"]).steps[0].pruner.name == "debias"
    text = (tmp_path / "found.md").read_text()
    assert text == capsys.readouterr().out
    assert "both against before: " in text


def test_hosts_that_cannot_be_served_stop_the_command():
    with pytest.raises(UnsupportedStage, match="layer 40"):
        main(["--hosts", "fastv@40", "--device", "cpu"])
