"""A comparison resumes without losing a cell, counts honestly, and shows where methods differ."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from scipy.stats import binom
from transformers import AutoConfig

import vlprune
from vlprune.errors import BudgetError, SpecError, UnsupportedStage, VlpruneError
from vlprune.eval import answering, compare, files, page, shapes
from vlprune.eval.answering import Answers, current_plan, open_tasks
from vlprune.eval.checkpoints import load, load_model
from vlprune.eval.compare import Comparison, budgets, expand
from vlprune.eval.published import UNPRUNED as PAPER_UNPRUNED
from vlprune.eval.significance import Interval, paired, relative
from vlprune.eval.tiny.evaluate import answer
from vlprune.models import embedded

QUIET = Console(quiet=True)


# ---- statistics


def test_relative_is_one_for_equal_arms_and_undefined_without_a_base() -> None:
    scores = np.array([1.0, 0.5, 1.0, 0.25])
    assert relative([scores], [scores]) == Interval(1.0, 1.0, 1.0)
    assert not np.isfinite(relative([scores], [np.zeros(4)]).value)
    assert relative([scores[:1]], [scores[:1]]) == Interval(1.0, None, None)


def test_bootstrap_resamples_both_arms_together() -> None:
    rng = np.random.default_rng(1)
    base = [(rng.random(n) < 0.9).astype(float) for n in (60, 90)]
    pruned = [b * (rng.random(len(b)) < 0.8) for b in base]
    found = relative(pruned, base)
    assert found.value == pytest.approx(np.mean([p.mean() / b.mean() for p, b in zip(pruned, base, strict=True)]))
    draws = []
    for _ in range(4000):
        parts = []
        for p, b in zip(pruned, base, strict=True):
            i = rng.integers(0, len(p), len(p))
            parts.append(p[i].mean() / b[i].mean())
        draws.append(np.mean(parts))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.01)  # two bootstraps with different random numbers
    assert found.high == pytest.approx(high, abs=0.01)
    assert relative(pruned, base) == found


def test_paired_test_is_the_exact_binomial_one() -> None:
    base = np.array([1, 1, 1, 1, 1, 1, 0, 0, 1.0])
    pruned = np.array([0, 0, 0, 0, 0, 1, 1, 0, 1.0])
    found = paired(pruned, base)
    assert (found.worse, found.better) == (5, 1)
    assert found.p == pytest.approx(2 * binom.cdf(1, 6, 0.5))
    assert paired(base, base).p == 1.0


# ---- the grid


@dataclass(eq=False)
class Fake:
    """A task whose answers follow from the plan's text alone; it fails after `fuse` runs."""

    name: str
    fuse: list[int]
    ran: list[tuple[str, str]]

    def size(self) -> int:
        return 8

    def run(self, model: Any, processor: Any, batch: int, tick: Any) -> Answers:
        plan = current_plan(model)
        if not self.fuse[0]:
            raise KeyboardInterrupt
        self.fuse[0] -= 1
        self.ran.append((str(plan or "unpruned"), self.name))
        right = 8 if plan is None else 8 - sum(map(ord, str(plan) + self.name)) % 5
        scores = [1.0] * right + [0.0] * (8 - right)
        tick(8)
        return Answers(["x"] * 8, scores, right / 8, 64, 64 if plan is None else 16, 64, 100, 1.5, 2.5)

    def notes(self) -> list[str]:
        return [f"{self.name}: made up"]


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Any:
    """compare() on a small random model with fake tasks: (run, list of cells that ran)."""
    ran: list[tuple[str, str]] = []
    fuse = [10**6]
    model = shapes.load("tiny", torch.float32, "sdpa", torch.device("cpu")).model
    monkeypatch.setattr(compare, "load", lambda name, **options: (model, None))
    monkeypatch.setattr(compare, "open_tasks", lambda names, *_: [Fake(name, fuse, ran) for name in names])

    def run(output: Path, cut: int = 10**6, **options: Any) -> Comparison:
        fuse[0] = cut
        settings: dict[str, Any] = {"plans": ["uniform", "holov"], "tasks": ["a", "b"], "keep": [0.5, 16]}
        return compare.compare("tiny", output=output, device="cpu", console=QUIET, **{**settings, **options})

    return run, ran


PLANS = ["unpruned", "uniform:keep=0.5", "uniform:keep=16", "holov:keep=0.5", "holov:keep=16", "random:keep=0.5",
         "random:keep=16"]  # fmt: skip


def test_every_cell_runs_once_and_random_is_among_them(grid: Any, tmp_path: Path) -> None:
    run, ran = grid
    found = run(tmp_path)
    assert [row.plan for row in found.rows] == PLANS
    assert ran == [(plan, task) for plan in PLANS for task in ("a", "b")]
    assert found.rows[0].average == Interval(1.0, 1.0, 1.0)
    assert found.rows[0].paired.p == 1.0
    row = found.row("uniform:keep=16")
    a, b = row.values["a"], row.values["b"]
    assert row.average.value == pytest.approx((a + b) / 2)
    assert (row.paired.worse, row.paired.better) == (round(16 - 8 * (a + b)), 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "cells.jsonl", "pareto.png", "report.html", "results.json", "table.md",
    ]  # fmt: skip
    assert "a: made up" in (tmp_path / "table.md").read_text()
    run(tmp_path)
    assert len(ran) == 14  # nothing ran again


def test_an_interrupted_grid_resumes_to_the_same_table(grid: Any, tmp_path: Path) -> None:
    run, ran = grid
    whole = run(tmp_path / "whole")
    ran.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", cut=5)
    kept = (tmp_path / "cut" / "cells.jsonl").read_bytes()
    assert kept.count(b"\n") == 6  # the setting and five cells
    with open(tmp_path / "cut" / "cells.jsonl", "ab") as f:
        f.write(b'{"plan": "holov:keep=0.5", "task"')  # a write that was cut short
    assert run(tmp_path / "cut") == whole
    assert (tmp_path / "cut" / "cells.jsonl").read_bytes().startswith(kept)
    assert len(ran) == len(set(ran)) == 14
    for name in ("table.md", "results.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_cells_of_another_setting_are_never_mixed_in(grid: Any, tmp_path: Path) -> None:
    run, _ = grid
    run(tmp_path)
    with pytest.raises(SpecError, match=r"holds another comparison \(items 100 there, 50 here\)"):
        run(tmp_path, items=50)
    (tmp_path / "cells.jsonl").write_text("not json\n")
    with pytest.raises(SpecError, match="is not a file of cells"):
        run(tmp_path)


def test_a_full_disk_keeps_finished_cells(grid: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = grid
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, cut=2)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(compare.os, "fsync", full)
        with pytest.raises(VlpruneError, match="No space left on device"):
            run(tmp_path)
    assert [row.plan for row in run(tmp_path).rows] == PLANS


def test_all_leaves_out_what_ranks_by_scores_from_outside() -> None:
    model = load_model("tiny-llava", dtype="float32")
    plans, notes = expand(["all"], [0.5], model)
    assert "uniform:keep=0.5" in map(str, plans)
    assert not any("sgl" in str(p) for p in plans)
    assert "sgl is left out: it ranks by scores from outside, and a comparison has none" in notes
    assert str(expand(["sgl@2"], [0.5], model)[0][0]) == "sgl@2:keep=0.5"


def test_all_takes_the_variant_that_fits() -> None:
    """A tower without CLS serves VisionZip by the attention that tokens receive."""
    served = {"tiny-llava": "visionzip:keep=0.5", "tiny-qwen2.5-vl": "visionzip:keep=0.5:attention=received"}
    for name, text in served.items():
        plans, _ = expand(["all"], [0.5], load_model(name, dtype="float32"))
        assert [str(p) for p in plans if p.steps[0].pruner.name == "visionzip"] == [text]


def test_plans_expand_to_every_budget() -> None:
    model = shapes.load("tiny", torch.float32, "sdpa", torch.device("cpu")).model
    plans, notes = expand(["fastv@3", "uniform:keep=0.25+random@4:keep=8", "random:seed=3"], [0.5, 32], model)
    assert [str(p) for p in plans] == [
        "fastv@3:keep=0.5", "fastv@3:keep=32", "uniform:keep=0.25+random@4:keep=8", "random:keep=0.5:seed=3",
        "random:keep=32:seed=3",
    ]  # fmt: skip
    assert notes == []
    everything, notes = expand(["all"], [0.5], model)
    names = {str(p).partition(":")[0] for p in everything}
    assert {"random", "uniform", "fastv", "holov", "divprune"} <= names
    assert len(everything) == len(set(map(str, everything)))
    assert all("is left out: " in note for note in notes)
    for plan, error in (("nosuch", SpecError), ("uniform@40", UnsupportedStage), ("uniform:keep=7.0", BudgetError)):
        with pytest.raises(error):
            expand([plan], [0.5], model)
    assert budgets("0.333,64,1.0") == [0.333, 64, 1.0]


def test_unknown_tasks_are_named_before_the_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", None)  # as where lmms-eval is not installed
    with pytest.raises(SpecError, match=r"tiny_vqu; did you mean tiny_vqa.*pip install --no-deps lmms-eval"):
        compare.compare("tiny-llava", tasks=["tiny_vqa", "tiny_vqu"], output=tmp_path, console=QUIET)


def test_missing_packages_are_named_before_anything_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "find_spec", lambda name: None if name == "scipy" else name)
    monkeypatch.setattr(compare, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(VlpruneError, match=r"this needs scipy: pip install 'vlprune\[eval\]'"):
        compare.compare("tiny-llava", ["uniform"], output=tmp_path, console=QUIET)


def test_missing_weights_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="there is no checkpoint folder"):
        load_model("./nowhere/at/all")
    AutoConfig.from_pretrained(embedded("tiny-llava")).save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=f"cannot load {tmp_path}: .*no file named model.safetensors"):
        load_model(str(tmp_path))
    source = embedded("tiny-llava") / "model.safetensors"
    weights = load_file(source)
    gone = next(name for name in weights if "mlp.up_proj" in name)
    save_file({k: v for k, v in weights.items() if k != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SpecError, match=r"lacks 1 weights, which would be random: .*mlp\.up_proj"):
        load_model(str(tmp_path))


def test_papers_stand_beside_our_numbers() -> None:
    model = type("Model", (), {"config": shapes.llava_15_7b()})()
    plan = vlprune.Plan.parse("holov:keep=64")
    found = compare._paper(plan, ["gqa", "tiny_vqa"], "LLaVA-1.5-7B", model)
    assert found == {"gqa": ["55.3 (A3)", "55.1 (A4)"]}
    top = compare._paper(None, ["pope"], "LLaVA-1.5-7B", model)
    assert len(top["pope"]) == 8
    assert PAPER_UNPRUNED == "Unpruned"


# ---- the page


def test_front_holds_what_nothing_beats() -> None:
    points = [(1.0, 0.5), (2.0, 0.7), (2.0, 0.6), (3.0, 0.7), (4.0, 0.9), (1.0, 0.5)]
    assert page.front(points) == [0, 1, 4, 5]


def test_real_grid_on_the_shipped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "PROBES", 1)
    plans = ["uniform:keep=64", "random:keep=64"]
    found = compare.compare(
        "tiny-llava", plans, ["tiny_vqa", "tiny_pope"], items=3, seed=2, batch=2, device="cpu", output=tmp_path,
        pictures=2, console=QUIET,
    )  # fmt: skip
    assert [row.plan for row in found.rows] == ["unpruned", *plans]
    base, uniform, _ = found.rows
    assert base.values == {"tiny_vqa": 1.0, "tiny_pope": 1.0}  # the model was trained on these
    assert (base.visual, base.kept, uniform.kept, uniform.layer_average) == (576, 576, 64, 64)
    token = 2 * 8 * 32 * 8 * 4  # keys and values, 8 heads of 32, 8 layers, float32
    assert (base.kv_bytes - uniform.kv_bytes) == 512 * token
    assert base.prefill_ms is not None
    assert uniform.prefill_ms is not None
    assert uniform.prefill_ms < base.prefill_ms
    lines = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()[1:]]
    task = open_tasks(["tiny_vqa"], 3, 2, tmp_path)[0]
    cell = next(line for line in lines if (line["plan"], line["task"]) == ("uniform:keep=64", "tiny_vqa"))
    model, processor = load("tiny-llava", dtype="float32")
    with vlprune.pruning(model, "uniform:keep=64"):
        assert [r.output for r in answer(model, processor, task.items, batch=2)] == cell["outputs"]
    html = (tmp_path / "report.html").read_text()
    assert "http" not in html.replace("http-equiv", "")  # nothing is fetched
    assert html.count("<tr") == 4
    assert Image.open(tmp_path / "pareto.png").width > 800
    disagree = page.disagreements(
        found, {(line.pop("plan"), line.pop("task")): Answers(**line) for line in lines},
        open_tasks(["tiny_vqa", "tiny_pope"], 3, 2, tmp_path), 2,
    )  # fmt: skip
    assert html.count('alt="the picture"') == len(disagree)
    assert all(len(set(case.scores)) > 1 for case in disagree)


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_answers(tmp_path: Path) -> None:
    options = "--plans uniform --keep 0.333,0.111 --tasks tiny_vqa,tiny_kv --items 4 --pictures 0 --device cpu"
    command = [sys.executable, "-m", "vlprune.eval.compare", "tiny-llava", *options.split()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--output", tmp_path / "whole"], check=True, env=environment, capture_output=True)
    process = subprocess.Popen([*command, "--output", tmp_path / "cut"], env=environment, stdout=subprocess.DEVNULL)
    path = tmp_path / "cut" / "cells.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 4:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_bytes()
    subprocess.run([*command, "--output", tmp_path / "cut"], check=True, env=environment, capture_output=True)
    whole, cut = (json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("whole", "cut"))
    timed = {"latency_ms", "prefill_ms"}  # measured, so never the same twice
    assert [{k: v for k, v in row.items() if k not in timed} for row in whole] == [
        {k: v for k, v in row.items() if k not in timed} for row in cut
    ]
    assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
