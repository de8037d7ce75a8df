r"""A grid of methods, budgets and tasks on one model: what each costs, what it keeps, and how sure that is.

    python -m vlprune.eval.compare tiny-llava --plans holov divprune fastv@4 --keep 0.333,0.222,0.111 \
        --tasks tiny_vqa,tiny_pope,tiny_kv,tiny_ocr --items 100 --output comparison/

The unpruned model and the pruner `random` are always among the rows. Every finished cell is a line of cells.jsonl:
the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import vlprune
from vlprune.errors import SpecError, UnsupportedStage, VlpruneError
from vlprune.eval import published
from vlprune.eval.answering import Answers, Task, open_tasks
from vlprune.eval.checkpoints import load
from vlprune.eval.files import installed, output_folder, reporting, write
from vlprune.eval.report import console_for_tables
from vlprune.eval.significance import Interval, Paired, paired, relative
from vlprune.support import variants

UNPRUNED = "unpruned"
ALL = "all"
CELLS = "cells.jsonl"
TASKS = ("tiny_vqa", "tiny_pope", "tiny_kv", "tiny_ocr")
KEEP = (0.333, 0.222, 0.111)
Key = tuple[str, str]  # plan, task


@dataclass(frozen=True)
class Row:
    """One plan over all tasks, against the unpruned model on the same items."""

    plan: str
    values: dict[str, float]  # by task
    relative: dict[str, Interval]
    average: Interval  # mean relative score over the tasks
    paired: Paired  # items of all tasks together
    visual: float
    kept: float
    layer_average: float
    kv_bytes: float
    latency_ms: float
    prefill_ms: float | None
    paper: dict[str, list[str]]  # by task: published scores and where they stand


@dataclass(frozen=True)
class Comparison:
    """All rows, the unpruned model first."""

    setting: dict[str, Any]
    rows: list[Row]
    notes: list[str]

    def row(self, plan: str) -> Row:
        return next(row for row in self.rows if row.plan == plan)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# ---- cells on disk


@dataclass(eq=False)
class Cells:
    """Finished cells, one JSON line each behind a line that says what they are cells of."""

    path: Path
    setting: dict[str, Any]
    done: dict[Key, Answers]

    @staticmethod
    def open(folder: Path, setting: dict[str, Any]) -> Cells:
        """Start a file, or go on with one of the same setting.

        Raises:
            SpecError: the folder holds cells of another setting, or a file that is no such file.
        """
        path = folder / CELLS
        cells = Cells(path, setting, {})
        if not path.exists():
            write(path, json.dumps({"setting": setting}) + "\n")
            return cells
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # an interrupted write leaves half a line
        try:
            first, *lines = [json.loads(line) for line in whole.splitlines()]
            found = first["setting"]
            cells.done = {(line.pop("plan"), line.pop("task")): Answers(**line) for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise SpecError(f"{path} is not a file of cells ({error}); choose another output folder") from error
        if found != setting:
            names = sorted(k for k in found.keys() | setting.keys() if found.get(k) != setting.get(k))
            differ = ", ".join(f"{k} {found.get(k)!r} there, {setting.get(k)!r} here" for k in names)
            raise SpecError(f"{folder} holds another comparison ({differ}); choose another output folder")
        if whole != content:
            write(path, whole)
        return cells

    def add(self, key: Key, answers: Answers) -> None:
        """Append a cell, on disk before the next begins."""
        line = json.dumps({"plan": key[0], "task": key[1], **dataclasses.asdict(answers)}) + "\n"
        with reporting(self.path), open(self.path, "a") as f:
            f.write(line)
            f.flush()
            os.fsync(f.fileno())
        self.done[key] = answers


# ---- the grid


def expand(plans: Sequence[str], keep: Sequence[float | int], model: Any) -> tuple[list[vlprune.Plan], list[str]]:
    """Every plan at every budget, `random` among them, and notes about what "all" left out.

    A plan that names its budget itself is one row. "all" stands for every registered pruner this model can serve, with
    other choices than its own (attention=received, say) where these alone fit.

    Raises:
        SpecError, BudgetError, UnsupportedStage: a plan that was named cannot be read or served.
    """
    found: dict[str, vlprune.Plan] = {}
    notes = []
    names = [*plans, "random"] if not any(p.partition(":")[0] == "random" for p in plans) else list(plans)
    for text in names:
        for name in _registered(model) if text == ALL else [text]:
            for plan in [vlprune.Plan.parse(name, k) for k in ([None] if "keep=" in name else keep)]:
                reason = vlprune.why_unsupported(model, plan)
                if reason and text != ALL:
                    raise UnsupportedStage(reason)
                if not reason and text == ALL and "guide" in plan.steps[0].pruner.needs:
                    reason = "it ranks by scores from outside, and a comparison has none"
                if reason:
                    notes.append(f"{name} is left out: {reason.splitlines()[0]}")
                    break
                found[str(plan)] = plan
    return list(found.values()), notes


def _registered(model: Any) -> list[str]:
    """Every pruner by name, in the first of its variants that this model can serve; one that wraps another wraps fastv."""
    by_name: dict[str, list[str]] = {}
    for text, pruner in variants():
        by_name.setdefault(pruner.name, []).append(text)
    return [next((t for t in texts if vlprune.supported(model, t)), texts[0]) for texts in by_name.values()]


def compare(
    model: str,
    plans: Sequence[str] = (ALL,),
    tasks: Sequence[str] = TASKS,
    keep: Sequence[float | int] = KEEP,
    *,
    items: int = 100,
    seed: int = 0,
    batch: int = 8,
    dtype: str | None = None,
    attention: str | None = None,
    device: str | None = None,
    output: str | Path = "comparison",
    pictures: int = 6,
    console: Console | None = None,
) -> Comparison:
    """Run what is missing of a grid, then write table.md, results.json, pareto.png and report.html beside the cells.

    Args:
        model: a checkpoint folder, a repository, or a shipped checkpoint.
        plans: pruners or plans without a budget, plans with one, or "all".
        tasks: suites (`vlprune.eval.suites`) or tasks of lmms-eval.
        keep: budgets for plans without one.
        items: of each task; 0 takes all items of an lmms-eval task.
        dtype: default: float32 on a CPU, the checkpoint's own elsewhere.
        pictures: items with kept-token pictures in the report, those where methods disagree most.
    Raises:
        SpecError, BudgetError, UnsupportedModel, UnsupportedStage: before the first item is asked.
        VlpruneError: the output folder cannot be written to, or pictures cannot be read.
    """
    from vlprune.eval.page import write_page

    installed("scipy", "matplotlib")
    console = console or console_for_tables()
    folder = output_folder(output)
    opened = open_tasks(tasks, items, seed, folder)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if place == "cpu" else "auto")
    loaded, processor = load(model, dtype=dtype, attention=attention, device=place)
    rows, notes = expand(plans, keep, loaded)
    name = torch.cuda.get_device_name(place) if place.startswith("cuda") else "cpu"
    setting = {
        "model": model, "items": items, "seed": seed, "batch": batch, "device": name,
        "dtype": str(loaded.dtype).removeprefix("torch."), "attention": loaded.config._attn_implementation,
        "vlprune": vlprune.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    cells = Cells.open(folder, setting)
    _run(loaded, processor, [None, *rows], opened, cells, batch, console)
    notes += [note for task in opened for note in task.notes()]
    paper = published.recognise(loaded.config)
    if paper:
        names = {step.pruner.name for plan in rows for step in plan.steps}
        notes += [f"published numbers: {trap}" for n in sorted(names) for trap in published.traps(n, paper)]
    comparison = summarise(cells, rows, [task.name for task in opened], notes, paper, loaded)
    write(folder / "results.json", json.dumps(comparison.to_dict(), indent=2) + "\n")
    write(folder / "table.md", markdown(comparison))
    console.print(table(comparison))
    for note in comparison.notes:
        console.print(note, markup=False)
    written = write_page(folder, comparison, cells.done, opened, loaded, processor, pictures)
    console.print(f"written: {', '.join(str(path) for path in [folder / 'table.md', *written])}", markup=False)
    return comparison


def _run(
    model: Any,
    processor: Any,
    plans: Sequence[vlprune.Plan | None],
    tasks: Sequence[Task],
    cells: Cells,
    batch: int,
    console: Console,
) -> None:
    """Fill in the cells that are missing."""
    grid = [(plan, task) for plan in plans for task in tasks]
    missing = [(plan, task) for plan, task in grid if (str(plan or UNPRUNED), task.name) not in cells.done]
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn()]  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bars:
        whole = bars.add_task("cells", total=len(grid), completed=len(grid) - len(missing))
        for plan, task in missing:
            text = str(plan or UNPRUNED)
            inner = bars.add_task(f"{text}, {task.name}", total=task.size() or None)
            with _wrapped(model, plan):
                answers = task.run(model, processor, batch, lambda n, bar=inner: bars.advance(bar, n))  # type: ignore[misc]
            cells.add((text, task.name), answers)
            bars.remove_task(inner)
            bars.advance(whole)


@contextmanager
def _wrapped(model: Any, plan: vlprune.Plan | None) -> Iterator[None]:
    if plan is None:
        yield
        return
    with vlprune.pruning(model, plan):
        yield


# ---- the table


def summarise(cells: Cells, plans: Sequence[vlprune.Plan], tasks: Sequence[str], notes: list[str], paper: str | None,
              model: Any) -> Comparison:  # fmt: skip
    """Rows from finished cells."""
    base = {task: cells.done[UNPRUNED, task] for task in tasks}
    usable = [task for task in tasks if sum(base[task].scores)]
    notes = notes + [f"{t}: the unpruned model scores nothing, so it is no part of the average" for t in tasks
                     if t not in usable]  # fmt: skip
    if not usable:
        raise VlpruneError("the unpruned model answers nothing right on any task; there is nothing to compare with")
    before = {task: np.array(base[task].scores) for task in tasks}
    rows = []
    for plan in [None, *plans]:
        mine = {task: cells.done[str(plan or UNPRUNED), task] for task in tasks}
        scores = {task: np.array(mine[task].scores) for task in tasks}
        n = len(tasks)
        prefill = [a.prefill_ms for a in mine.values() if a.prefill_ms is not None]
        rows.append(Row(
            plan=str(plan or UNPRUNED),
            values={task: a.value for task, a in mine.items()},
            relative={task: relative([scores[task]], [before[task]]) for task in usable},
            average=relative([scores[t] for t in usable], [before[t] for t in usable]),
            paired=paired(np.concatenate(list(scores.values())), np.concatenate(list(before.values()))),
            visual=sum(a.visual for a in mine.values()) / n, kept=sum(a.kept for a in mine.values()) / n,
            layer_average=sum(a.layer_average for a in mine.values()) / n,
            kv_bytes=sum(a.kv_bytes for a in mine.values()) / n,
            latency_ms=sum(a.latency_ms for a in mine.values()) / n,
            prefill_ms=sum(prefill) / n if len(prefill) == n else None,
            paper=_paper(plan, tasks, paper, model),
        ))  # fmt: skip
    return Comparison(cells.setting, rows, notes)


def _paper(plan: vlprune.Plan | None, tasks: Sequence[str], model_name: str | None, model: Any) -> dict[str, list[str]]:
    """What papers print for this plan, for the tasks they used."""
    if model_name is None:
        return {}
    layers = model.config.get_text_config().num_hidden_layers
    if plan is None:
        found = published.lookup(model_name, published.UNPRUNED)
    else:
        found = published.beside(model_name, plan, layers)
    out: dict[str, list[str]] = {}
    for task in tasks:
        known = published.BENCHMARKS.get(task)
        if known:
            out[task] = [f"{r.scores[known.column]:g} ({r.source.id}{', ' + r.note if r.note else ''})" for r in found
                         if known.column in r.scores]  # fmt: skip
    return out


def cells_of(row: Row, tasks: Sequence[str]) -> list[str]:
    interval = row.average
    span = "" if interval.low is None else f" [{interval.low:.1%}, {interval.high:.1%}]"
    values = []
    for task in tasks:
        known = published.BENCHMARKS.get(task)
        value = f"{row.values[task] * known.scale:.1f}" if known else f"{row.values[task]:.3f}"
        paper = row.paper.get(task)
        values.append(f"{value} | {', '.join(paper)}" if paper else value)
    return [
        row.plan, *values, f"{interval.value:.1%}{span}", f"{row.paired.worse} / {row.paired.better}",
        f"{row.paired.p:.2g}", f"{row.kept:.0f}", f"{row.layer_average:.0f}", f"{row.kv_bytes / 2**20:.2f}",
        "-" if row.prefill_ms is None else f"{row.prefill_ms:.1f}", f"{row.latency_ms:.0f}",
    ]  # fmt: skip


def header(tasks: Sequence[str]) -> list[str]:
    return ["plan", *tasks, "relative [95 %]", "worse / better", "p", "kept", "per layer", "KV MiB", "prefill ms",
            "answer ms"]  # fmt: skip


def table(comparison: Comparison) -> Table:
    """The rows for a terminal."""
    tasks = list(comparison.rows[0].values)
    shown = Table(title=f"{comparison.setting['model']}, {comparison.setting['items']} items a task")
    for number, name in enumerate(header(tasks)):
        shown.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in comparison.rows:
        shown.add_row(*cells_of(row, tasks))
    return shown


def markdown(comparison: Comparison) -> str:
    """The rows for a page."""
    tasks = list(comparison.rows[0].values)
    names = header(tasks)
    lines = ["  ".join(f"{k} {v}" for k, v in comparison.setting.items()), "", f"| {' | '.join(names)} |",
             f"|---|{'---:|' * (len(names) - 1)}"]  # fmt: skip
    for row in comparison.rows:
        lines.append(f"| {' | '.join(cell.replace(' | ', '; papers: ') for cell in cells_of(row, tasks))} |")
    lines += ["", *(f"- {note}" for note in comparison.notes)] if comparison.notes else []
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="python -m vlprune.eval.compare", description=lines[0])
    parser.add_argument("model", help="a checkpoint folder, a repository, or a shipped checkpoint")
    parser.add_argument("--plans", nargs="+", default=[ALL], help="pruners or plans; default: all")
    parser.add_argument("--keep", type=budgets, default=list(KEEP), help="comma-separated")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS), help="comma-separated")
    parser.add_argument("--items", type=int, default=100, help="of each task; 0: all (tasks of lmms-eval)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype")
    parser.add_argument("--attention")
    parser.add_argument("--device")
    parser.add_argument("--output", default="comparison")
    parser.add_argument("--pictures", type=int, default=6)
    compare(**vars(parser.parse_args(arguments)))


def budgets(text: str) -> list[float | int]:
    """``"0.333,64"`` as a share and a count."""
    return [float(part) if "." in part else int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
