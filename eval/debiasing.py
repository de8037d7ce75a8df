"""What attention debiasing is worth, host by host: before and after, on padded pictures with the evidence above.

    python -m vlprune.eval.debiasing --quick
    python -m vlprune.eval.debiasing --device cuda --items 200 --batch 100 --out debiasing

On the embedded model each host answers the same questions four times: as it is, with the positional trend taken out,
with padding suppressed, and with both. Pictures are letterboxed and the evidence lies in their upper half. Trends are
measured on other pictures (`vlprune.calibrate.positional_trend`), drawn from another seed and as varied as in training:
padded or not, evidence anywhere. Random removal at the same layer and the unpruned model stand beside. Intervals are
Wilson's at 95 %; a sign behind one says that right answers won (+) or lost (-) against the host as it is by McNemar's
exact test at 5 %, each cell by itself.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import vlprune
from vlprune import Plan, Step
from vlprune.calibrate import PositionalTrend, positional_trend
from vlprune.errors import UnsupportedStage
from vlprune.eval.checkpoints import load
from vlprune.eval.files import installed, output_folder, write
from vlprune.eval.report import markdown, setting
from vlprune.eval.significance import paired
from vlprune.eval.tiny import Item, items
from vlprune.eval.tiny.evaluate import SHORT_ANSWER, prompt
from vlprune.pruners.debias import Debias

TASKS = ("letter", "sign", "kv")
HOSTS = (
    "fastv@4",
    "pyramiddrop@4",
    "sparsevlm@4",
    "adaptinfer@4",
)  # layer 4 of 8 is the first whose attention ranks well
KEEP = (0.333, 0.222, 0.111, 0.056)
VARIANTS = ("before", "trend", "padding", "both")
SETTINGS: dict[str, dict[str, Any]] = {
    "both": {"padded": True, "region": "upper"},
    "padded": {"padded": True},
    "upper": {"padded": False, "region": "upper"},
}
LEVEL = 0.05
Right = NDArray[np.float64]  # [items], 1 where the answer was right


@dataclass(frozen=True)
class Cell:
    """One plan on one task. p: McNemar's against the host as it is; None for what has no such partner."""

    plan: str
    task: str
    keep: float
    host: str  # or "unpruned", "random@4"
    variant: str  # one of VARIANTS, or "" for what has none
    items: int
    right: int
    low: float
    high: float
    better: int = 0  # items right here and wrong before
    worse: int = 0
    p: float | None = None

    @property
    def accuracy(self) -> float:
        return self.right / self.items

    @property
    def sign(self) -> str:
        if self.p is None or self.p >= LEVEL:
            return ""
        return " +" if self.better > self.worse else " -"

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}]{self.sign}"


# ---- questions


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts ready on the device, as every plan is asked the same ones."""

    items: list[Item]
    inputs: Any

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of each picture before it was padded to a square."""
        return [item.original_size for item in self.items]


def batches(model: Any, processor: Any, asked: Sequence[Item], size: int) -> list[Batch]:
    parts = [list(asked[start : start + size]) for start in range(0, len(asked), size)]
    return [Batch(part, prompt(processor, part).to(model.device, model.dtype)) for part in parts]


@torch.inference_mode()
def right_answers(model: Any, processor: Any, asked: Sequence[Batch], plan: str | None) -> Right:
    """Exact matches, in the order of the items; the plan is told how large pictures were before padding."""
    found: list[bool] = []
    for batch in asked:
        if plan is None:
            texts = _generate(model, processor, batch)
        else:
            with vlprune.pruning(model, plan), vlprune.image_sizes(model, batch.sizes):
                texts = _generate(model, processor, batch)
        found += [text.strip() == item.answer for text, item in zip(texts, batch.items, strict=True)]
    return np.array(found, dtype=np.float64)


def _generate(model: Any, processor: Any, batch: Batch) -> list[str]:
    ids = model.generate(**batch.inputs, max_new_tokens=SHORT_ANSWER, do_sample=False)
    texts: list[str] = processor.batch_decode(ids[:, batch.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


# ---- plans


def variants(trend: PositionalTrend, keep: float) -> dict[str, Plan]:
    """The host as it is and with either half of debiasing and both, at one budget."""
    (step,) = trend.plan.steps
    rule = step.pruner
    assert isinstance(rule, Debias)
    rules = {
        "before": rule.inner,
        "trend": replace(rule, padding="off"),
        "padding": Debias(rule.inner, trend="off", padding=rule.padding, theta=rule.theta),
        "both": rule,
    }
    return {name: Plan((Step(r, step.stage, vlprune.Budget(keep)),)) for name, r in rules.items()}


# ---- the study


@dataclass(frozen=True)
class Study:
    """What was asked; `run` gives the cells as they come."""

    tasks: tuple[str, ...] = TASKS
    hosts: tuple[str, ...] = HOSTS
    keep: tuple[float, ...] = KEEP
    items: int = 200  # of each task
    calibration: int = 200  # pictures, of all tasks together
    setting: str = "both"
    batch: int = 8
    seed: int = 7

    def draw(self) -> list[Item]:
        return [i for task in self.tasks for i in items(task, self.items, self.seed, **SETTINGS[self.setting])]

    def draw_calibration(self) -> list[Item]:
        """Other pictures, of the same tasks, padded or not, evidence anywhere."""
        counts = [len(part) for part in np.array_split(np.arange(self.calibration), len(self.tasks))]
        drawn = [items(task, n, self.seed + 1000) for task, n in zip(self.tasks, counts, strict=True)]
        return [item for part in drawn for item in part]

    def trends(self, model: Any, processor: Any) -> dict[str, PositionalTrend]:
        """Every host's trend on the calibration pictures."""
        drawn = batches(model, processor, self.draw_calibration(), self.batch)
        inputs, sizes = [b.inputs for b in drawn], [b.sizes for b in drawn]
        return {host: positional_trend(model, inputs, host, sizes=sizes) for host in self.hosts}

    def run(self, model: Any, processor: Any, trends: dict[str, PositionalTrend]) -> Iterator[Cell]:
        """Cells of the unpruned model, of random removal and of every host, task by task and for all tasks together."""
        asked = batches(model, processor, self.draw(), self.batch)
        yield from self._cells(right_answers(model, processor, asked, None), "", 1.0, "unpruned", "")
        for stage in dict.fromkeys(host.partition("@")[2] for host in self.hosts):
            for keep in self.keep:
                chance = f"random@{stage}" if stage else "random"
                right = right_answers(model, processor, asked, f"{chance}:keep={keep}")
                yield from self._cells(right, f"{chance}:keep={keep}", keep, chance, "")
        for host, trend in trends.items():
            for keep in self.keep:
                before = None
                for name, plan in variants(trend, keep).items():
                    right = right_answers(model, processor, asked, str(plan))
                    yield from self._cells(right, str(plan), keep, host, name, before)
                    before = right if before is None else before

    def _cells(
        self, right: Right, plan: str, keep: float, host: str, variant: str, before: Right | None = None
    ) -> Iterator[Cell]:
        from scipy.stats import binomtest

        parts = {task: slice(i * self.items, (i + 1) * self.items) for i, task in enumerate(self.tasks)}
        for task, part in {**parts, "all": slice(None)}.items():
            here = right[part]
            interval = binomtest(int(here.sum()), len(here)).proportion_ci(1 - LEVEL, method="wilson")
            cell = Cell(plan, task, keep, host, variant, len(here), int(here.sum()), interval.low, interval.high)
            if before is not None:
                test = paired(here, before[part])
                cell = replace(cell, better=test.better, worse=test.worse, p=test.p)
            yield cell


# ---- showing


TITLES = ("host", "keep", "task", "random", *VARIANTS)


def rows(cells: Sequence[Cell], study: Study) -> list[list[str]]:
    """The unpruned model, then host by host, budget by budget, the tasks and all of them together."""
    by = {(c.host, c.keep, c.task, c.variant): c for c in cells}
    tasks = [*study.tasks, "all"]
    table = [["unpruned", "1", task, "", str(by["unpruned", 1.0, task, ""]), "", "", ""] for task in tasks]
    for host in dict.fromkeys(c.host for c in cells if c.variant):
        _, at, stage = host.partition("@")
        for keep in study.keep:
            for task in tasks:
                chance = by[f"random{at}{stage}", keep, task, ""]
                found = [str(by[host, keep, task, v]) for v in VARIANTS]
                table.append([host, f"{keep:g}", task, str(chance), *found])
    return table


def verdict(cells: Sequence[Cell], variant: str) -> str:
    """How many of the tasks' cells a variant wins and loses."""
    own = [c for c in cells if c.variant == variant and c.task != "all"]
    won, lost = (sum(c.sign == sign for c in own) for sign in (" +", " -"))
    points = 100 * sum((c.better - c.worse) / c.items for c in own) / len(own)
    return f"{variant} against before: {won} of {len(own)} cells won, {lost} lost, {points:+.1f} points on average"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vlprune.eval.debiasing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="tiny-llava", help="a checkpoint folder or the name of a shipped model")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--hosts", nargs="+", default=list(HOSTS), help="pruner@layer")
    parser.add_argument("--keep", nargs="+", type=float, default=list(KEEP))
    parser.add_argument("--items", type=int, default=200, help="questions of each task")
    parser.add_argument("--calibration", type=int, default=200, help="pictures the trends are measured on")
    parser.add_argument(
        "--setting", choices=list(SETTINGS), default="both", help="padded pictures, evidence above, or both"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--quick", action="store_true", help="16 questions of each task, keep 0.111, 48 pictures")
    parser.add_argument("--out", help="write FILE.md and FILE.json")
    options = parser.parse_args(arguments)
    installed("scipy")
    if options.quick:
        options.items, options.keep, options.calibration = 16, [0.111], 48
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "vlprune.eval.debiasing", *given])
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.out:
        output_folder(Path(options.out).parent)

    model, processor = load(options.model, dtype=torch.float32, device=device)
    for host in options.hosts:
        reason = vlprune.why_unsupported(model, f"debias({host.partition('@')[0]})@{host.partition('@')[2]}", 0.5)
        if reason:
            raise UnsupportedStage(reason)
    study = Study(
        tuple(options.tasks), tuple(options.hosts), tuple(options.keep), options.items, options.calibration,
        options.setting, options.batch, options.seed,
    )  # fmt: skip
    trends = study.trends(model, processor)
    head = setting(device, "float32", command) | {
        "model": options.model, "items": f"{study.items} a task, seed {study.seed}", "setting": SETTINGS[study.setting],
        "calibration": f"{study.calibration} pictures, seed {study.seed + 1000}",
        "trends": {host: f"{t.trend.trend}, R^2 {t.trend.r2:.2f}, kappa {t.trend.kappa:.2f}"
                   for host, t in trends.items()},
    }  # fmt: skip
    cells: list[Cell] = []
    for cell in study.run(model, processor, trends):
        cells.append(cell)
        if cell.task == "all":
            print(f"{cell.plan or 'unpruned'}: {cell}", file=sys.stderr, flush=True)
    text = markdown(head, TITLES, rows(cells, study))
    text += "\n" + "\n".join(f"- {verdict(cells, variant)}" for variant in VARIANTS[1:]) + "\n"
    print(text, end="")
    if options.out:
        out = Path(options.out)
        data = {
            "setting": head,
            "cells": [asdict(c) for c in cells],
            "plans": {h: str(t.plan) for h, t in trends.items()},
        }
        write(out.with_name(out.name + ".json"), json.dumps(data, indent=2) + "\n")
        write(out.with_name(out.name + ".md"), text)


if __name__ == "__main__":
    main()
