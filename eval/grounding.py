"""How much of the evidence a pruner keeps, whatever the model then answers: recall of relevant visual tokens.

    python -m vlprune.eval.grounding tiny-llava --plans fastv@4 divprune --keep 0.222,0.111 --items 20
    python -m vlprune.eval.grounding tiny-llava --tasks letter,kv --items 100 --answers --out grounding

Items of the drawn suites know the boxes their answers depend on. A token is relevant if its part of the picture shares
area with one of them, and

    recall = |kept and relevant| / |relevant|,   averaged over items; choosing at random gives kept / N.

One prefill an item is enough. --answers generates as well, and prints the mean score of the answers beside.

Merging is not seen: a token that another one absorbed counts as dropped. A rule that keeps other tokens in every layer's
cache, or looks at other tokens in every step, has no one kept set, and is left out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

import vlprune
from vlprune import Plan
from vlprune.errors import SpecError, nearest
from vlprune.eval.checkpoints import load
from vlprune.eval.compare import ALL, budgets, expand
from vlprune.eval.files import installed, output_folder, write
from vlprune.eval.report import console_for_tables, markdown, setting
from vlprune.eval.significance import LEVEL, RESAMPLES, Interval
from vlprune.eval.suites import SUITES, exact
from vlprune.eval.tiny import Item, items
from vlprune.eval.tiny.drawing import Box
from vlprune.eval.tiny.evaluate import generate, prompt
from vlprune.eval.tiny.vocabulary import TASKS
from vlprune.geometry import Area, View
from vlprune.trace import Trace

Token = tuple[int, int]  # run, number within it


def touches(area: Area, box: Box) -> list[Token]:
    """Tokens whose part of the picture shares area with a box."""
    columns = [c for c, (a, b) in enumerate(area.columns) if a < box.right and b > box.left]
    rows = [r for r, (a, b) in enumerate(area.rows) if a < box.bottom and b > box.top]
    return [(area.run, area.first + r * area.stride + c) for r in rows for c in columns]


def relevant(views: Iterable[View], boxes: Iterable[Box]) -> set[Token]:
    """Tokens that show evidence. Where tiles overlap a whole view, the tokens of both count."""
    boxes = list(boxes)
    return {token for view in views for area in view.areas for box in boxes for token in touches(area, box)}


@dataclass(frozen=True)
class Kept:
    """What one plan left of one item's evidence."""

    recall: float
    share: float  # of all visual tokens that were kept


def kept(trace: Trace, item: Item, processor: Any = None, row: int = 0) -> Kept:
    """Recall of an item whose picture is the only one in its row.

    Raises:
        SpecError: the item has no evidence, or its evidence lies where no token looks.
    """
    lens = trace.lens if processor is None else trace.lens.read(processor)
    runs = [i.grids or (i.grid,) for i in trace.pictures if i.row == row]
    wanted = relevant(lens.views(item.image.size, runs), item.boxes)
    if not wanted:
        raise SpecError(f"{item.task} item {item.index} of seed {item.seed} has no evidence that any token shows")
    fates = trace.fates(trace.stages[-1] if trace.stages else None, row)
    left = {(run, token) for run, fate in enumerate(fates) for token in fate.kept}
    tokens = sum(i.tokens for i in trace.pictures if i.row == row)
    return Kept(len(wanted & left) / len(wanted), len(left) / tokens)


@dataclass(frozen=True, eq=False)
class Asked:
    """A question with evidence, and how its answers are scored: score(output, answer) in [0, 1]."""

    item: Item
    score: Callable[[str, str], float]


@dataclass(frozen=True)
class Row:
    """One plan over all items with evidence."""

    plan: str
    kept: float  # share of all visual tokens
    recall: Interval
    by_task: dict[str, float]  # recall
    score: float | None  # of the answers, mean; None: none were generated


@torch.inference_mode()
def measure(model: Any, processor: Any, plan: Plan, asked: Sequence[Asked], answers: bool = False) -> Row:
    """Recall of every item, one prompt at a time.

    Args:
        asked: items with boxes.
        answers: whether to generate as well; without, one prefill an item is all.
    """
    found, scores, by_task = list[Kept](), list[float](), dict[str, list[float]]()
    with vlprune.pruning(model, plan):
        for one in asked:
            item, inputs = one.item, prompt(processor, [one.item]).to(model.device, model.dtype)
            with vlprune.image_sizes(model, [item.original_size]):
                if answers:
                    scores.append(one.score(generate(model, processor, [item], inputs)[0], item.answer))
                else:
                    model(**inputs, use_cache=True)
            found.append(kept(vlprune.trace(model), item, processor))
            by_task.setdefault(item.task, []).append(found[-1].recall)
    return Row(
        plan=str(plan),
        kept=float(np.mean([k.share for k in found])),
        recall=mean([k.recall for k in found]),
        by_task={task: float(np.mean(recalls)) for task, recalls in by_task.items()},
        score=float(np.mean(scores)) if answers else None,
    )


def mean(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean with a percentile bootstrap interval."""
    from scipy.stats import bootstrap

    data = np.array(values)
    if len(data) < 2:
        return Interval(float(data.mean()), None, None)
    with warnings.catch_warnings():  # values that are all the same have an interval of no width
        warnings.simplefilter("ignore")
        found = bootstrap((data,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile",
                          rng=np.random.default_rng(seed))  # fmt: skip
    return Interval(float(data.mean()), *map(float, found.confidence_interval))


def draw(tasks: Sequence[str], n: int, seed: int) -> list[Asked]:
    """The first n items of each task, without those that have no evidence: denied existence, a count of nothing.

    Args:
        tasks: of the tiny generator, scored by exact match, or suites.
    Raises:
        SpecError: an unknown task, or one without boxes.
    """
    drawn: list[Asked] = []
    for name in tasks:
        if name not in TASKS and name not in SUITES:
            known = [*TASKS, *SUITES]
            raise SpecError(f"unknown task {name!r}{nearest(name, known)} (tasks: {', '.join(known)})")
        found, score = (
            (SUITES[name].draw(n, seed), SUITES[name].score) if name in SUITES else (items(name, n, seed), exact)
        )
        if not any(item.boxes for item in found):
            raise SpecError(f"{name} has no boxes of evidence")
        drawn += [Asked(item, score) for item in found if item.boxes]
    return drawn


def plans_for(model: Any, names: Sequence[str], keep: Sequence[float | int]) -> tuple[list[Plan], list[str]]:
    """Plans with one kept set, `random` among them, and notes about what was left out.

    Raises:
        SpecError: a plan that was named has no one kept set.
    """
    plans, notes = expand(names, keep, model)
    fit, left_out = [], dict[str, str]()
    for plan in plans:
        stages = sorted({step.stage.name for step in plan.steps} & {"cache", "decode"})
        if not stages:
            fit.append(plan)
        elif ALL in names:
            left_out[plan.steps[0].pruner.name] = " and ".join(stages)
        else:
            raise SpecError(f"{plan} chooses anew at {' and '.join(stages)}; it has no one kept set to measure")
    return fit, notes + [f"{name} is left out: it chooses anew at {stage}" for name, stage in left_out.items()]


# ---- showing


def cells(row: Row) -> list[str]:
    r = row.recall
    span = "" if r.low is None else f" [{r.low:.3f}, {r.high:.3f}]"
    answers = [] if row.score is None else [f"{row.score:.3f}"]
    recalls = [f"{value:.2f}" for value in row.by_task.values()]
    return [row.plan, f"{row.kept:.3f}", f"{r.value:.3f}{span}", f"{r.value / row.kept:.1f}", *answers, *recalls]


def titles(row: Row) -> list[str]:
    answers = [] if row.score is None else ["score"]
    return ["plan", "kept", "recall [95 %]", "over chance", *answers, *row.by_task]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vlprune.eval.grounding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a checkpoint folder, a repository, or a shipped checkpoint")
    parser.add_argument("--plans", nargs="+", default=[ALL], help="pruners or plans; default: all")
    parser.add_argument("--keep", type=budgets, default=[0.222, 0.111], help="comma-separated")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS), help="comma-separated")
    parser.add_argument("--items", type=int, default=4, help="of each task")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--answers", action="store_true", help="generate, and print the mean score")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", help="folder for table.md and results.json")
    options = parser.parse_args(arguments)
    installed("scipy")

    console = console_for_tables()
    folder = None if options.out is None else output_folder(options.out)
    asked = draw(options.tasks, options.items, options.seed)
    model, processor = load(options.model, dtype=options.dtype, device=options.device)
    plans, notes = plans_for(model, options.plans, options.keep)
    rows = []
    for plan in plans:
        rows.append(measure(model, processor, plan, asked, options.answers))
        print(f"{plan}: recall {rows[-1].recall.value:.3f}", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: (-round(row.kept, 3), -row.recall.value))
    head = setting(torch.device(options.device), options.dtype, f"python -m vlprune.eval.grounding {_spelt(arguments)}")
    text = markdown({**head, "items": len(asked)}, titles(rows[0]), map(cells, rows))
    text += "".join(f"\n- {note}" for note in notes) + ("\n" if notes else "")
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if folder is not None:
        write(folder / "table.md", text)
        found = {"setting": head, "rows": [asdict(row) for row in rows], "notes": notes}
        write(folder / "results.json", json.dumps(found, indent=2) + "\n")


def _spelt(arguments: Sequence[str] | None) -> str:
    return shlex.join(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
