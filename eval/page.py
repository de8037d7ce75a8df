"""What `compare` shows: a Pareto plot, and one self-contained page with the pictures that tell methods apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

import vlprune
from vlprune.draw import style
from vlprune.eval.answering import Answers, SuiteTask, Task
from vlprune.eval.files import reporting, write
from vlprune.eval.html import figure, page, table
from vlprune.eval.timing import Marks, prefill
from vlprune.eval.tiny import Item
from vlprune.eval.tiny.evaluate import prompt

if TYPE_CHECKING:
    from vlprune.eval.compare import Comparison, Row

THUMB = 200  # pixels on the page; pictures hold twice as many
PLOT = 1100
INKS = [
    "#{:02x}{:02x}{:02x}".format(*colour) for colour in style.GROUPS if sum(colour) < 530
]  # yellow is lost on white
MARKS = "osD^vP"


def write_page(
    folder: Path,
    comparison: Comparison,
    cells: Mapping[tuple[str, str], Answers],
    tasks: Sequence[Task],
    model: Any,
    processor: Any,
    pictures: int,
) -> list[Path]:
    """pareto.png and report.html; returns their paths."""
    plot = pareto(comparison, folder / "pareto.png")
    shown = disagreements(comparison, cells, tasks, pictures)
    drawn = [Drawn.of(case, model, processor) for case in shown]
    return [plot, write(folder / "report.html", _page(comparison, plot, drawn))]


# ---- the plot


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, score) points that none beats: none is as cheap and better, or cheaper and as good."""
    return [
        i
        for i, (cost, score) in enumerate(points)
        if not any((c <= cost and s > score) or (c < cost and s >= score) for c, s in points)
    ]


def pareto(comparison: Comparison, path: Path) -> Path:
    """Relative score against measured latency and against bytes of the key-value cache."""
    from matplotlib.figure import Figure

    rows = comparison.rows
    timed = [row.prefill_ms for row in rows if row.prefill_ms is not None]
    if len(timed) == len(rows):
        latency, label = timed, "prefill of one prompt, ms"
    else:
        latency, label = [row.latency_ms for row in rows], "answer, ms"
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    _panel(axes[0], rows, latency, label)
    _panel(axes[1], rows, [row.kv_bytes / 2**20 for row in rows], "key-value cache of one prompt, MiB")
    axes[0].set_ylabel("score relative to the unpruned model")
    figure.suptitle(f"{comparison.setting['model']}, {comparison.setting['device']}, {comparison.setting['dtype']}")
    with reporting(path):
        figure.savefig(path, dpi=130)
    return path


def _panel(axis: Any, rows: Sequence[Row], costs: Sequence[float], label: str) -> None:
    """Methods on the front in colour, `random` dashed, the others grey; budgets of one method are joined."""
    points = list(zip(costs, (row.average.value for row in rows), strict=True))
    best = front(points)
    leading = [*sorted({_family(rows[i]) for i in best} - {"random", "unpruned"}), "random", "unpruned"]
    for family in sorted({_family(row) for row in rows}):
        own = sorted((row.kept, *points[i]) for i, row in enumerate(rows) if _family(row) == family)
        look: dict[str, Any] = {"color": "0.8", "marker": "o", "markersize": 3, "zorder": 1}
        if family in leading:
            number = leading.index(family)  # neighbours in the legend look different
            look = {"color": INKS[number % len(INKS)], "marker": MARKS[number % len(MARKS)], "markersize": 6, "zorder": 2,
                    "label": family}  # fmt: skip
        if family == "random":
            look |= {"color": "black", "linestyle": "--", "marker": "o"}
        if family == "unpruned":
            look |= {"color": "black", "marker": "*", "markersize": 11}
        axis.plot([cost for _, cost, _ in own], [score for *_, score in own], linewidth=1, **look)
    edge = sorted(points[i] for i in best)
    axis.step([p[0] for p in edge], [p[1] for p in edge], where="post", color="0.4", linewidth=0.8, linestyle=":")
    axis.set_xlabel(label)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, title="on the front, and random", title_fontsize=8)


def _family(row: Row) -> str:
    """The plan without its budget."""
    return row.plan if "+" in row.plan else ":".join(p for p in row.plan.split(":") if not p.startswith("keep="))


# ---- pictures


@dataclass(frozen=True, eq=False)
class Case:
    """An item, and what each of several plans answered."""

    task: SuiteTask
    item: Item
    plans: list[str]
    outputs: list[str]
    scores: list[float]


def disagreements(
    comparison: Comparison, cells: Mapping[tuple[str, str], Answers], tasks: Sequence[Task], count: int
) -> list[Case]:
    """The items of our suites on which plans of one budget differ most, by the variance of their scores.

    The budget is the one at which plans differ most overall; no task takes more than its share of the cases.
    """
    suites: list[SuiteTask] = [task for task in tasks if isinstance(task, SuiteTask)]
    groups: dict[str, list[str]] = {}
    for row in comparison.rows[1:]:
        groups.setdefault(row.plan.rpartition("keep=")[2].partition(":")[0], []).append(row.plan)
    if not suites or not groups or count < 1:
        return []

    def variances(names: list[str], task: SuiteTask) -> Any:
        return np.var([cells[name, task.name].scores for name in names], axis=0)

    chosen = max(groups.values(), key=lambda names: sum(float(variances(names, task).sum()) for task in suites))
    share = -(-count // len(suites))
    ranked: list[tuple[float, SuiteTask, int]] = []
    for task in suites:
        spread = variances(chosen, task)
        order = np.argsort(-spread, kind="stable")[:share]
        ranked += [(float(spread[i]), task, int(i)) for i in order if spread[i] > 0]
    ranked.sort(key=lambda entry: -entry[0])
    cases = []
    for _, suite, i in ranked[:count]:
        found = [cells[name, suite.name] for name in chosen]
        cases.append(Case(suite, suite.items[i], chosen, [a.outputs[i] for a in found], [a.scores[i] for a in found]))
    return cases


@dataclass(frozen=True, eq=False)
class Drawn:
    """A case with its pictures: the item, and the tokens every plan kept."""

    case: Case
    image: Image.Image
    kept: list[Image.Image]

    @staticmethod
    @torch.inference_mode()
    def of(case: Case, model: Any, processor: Any) -> Drawn:
        inputs = prompt(processor, [case.item]).to(model.device, model.dtype)
        kept = []
        for plan in case.plans:
            with vlprune.pruning(model, plan):
                prefill(model, inputs, Marks(model.device))
                kept.append(_thumb(vlprune.trace(model).draw(case.item.image, processor=processor)))
        return Drawn(case, _thumb(case.item.image), kept)


def _thumb(image: Image.Image) -> Image.Image:
    small = image.convert("RGB")
    small.thumbnail((2 * THUMB, 2 * THUMB))
    return small


# ---- the page


def _page(comparison: Comparison, plot: Path, drawn: Sequence[Drawn]) -> str:
    from vlprune.eval.compare import cells_of, header

    tasks = list(comparison.rows[0].values)
    model = str(comparison.setting["model"])
    setting = escape(", ".join(f"{k} {v}" for k, v in comparison.setting.items()))
    rows = table(header(tasks), [cells_of(row, tasks) for row in comparison.rows], base=1)
    notes = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes)
    cases = "".join(map(_case, drawn)) or "<p>All methods agree on all items.</p>"
    return page(f"vlprune compare: {model}", f"""<h1>{escape(model)}: pruners compared</h1>
<p class="setting">{setting}</p>
<p>"relative" is the mean over tasks of score over the unpruned model's score, with a 95 % bootstrap interval over
items. "worse / better" counts items answered worse and better than by the unpruned model; p is the exact sign test on
them (McNemar's test where answers are right or wrong). "kept" are visual tokens in the last layer, "per layer" their
mean over layers.</p>
{rows}
<ul>{notes}</ul>
<h2>Score against cost</h2>
{figure(plot, "", "score against latency and cache size", PLOT)}
<h2>Where methods disagree most</h2>
{cases}""")  # fmt: skip


def _case(drawn: Drawn) -> str:
    case = drawn.case
    figures = [figure(drawn.image, "the picture", "the picture", THUMB)]
    for plan, output, score, image in zip(case.plans, case.outputs, case.scores, drawn.kept, strict=True):
        answer = escape(output if len(output) < 60 else output[:57] + "...")
        verdict = f'<span class="{"right" if score == 1 else "wrong"}">{answer} ({score:.2f})</span>'
        words = f"what {plan} kept of the picture"
        figures.append(figure(image, f"<b>{escape(plan)}</b><br>{verdict}", words, THUMB))
    question, answer = escape(case.item.question), escape(case.item.answer)
    title = f'{case.task.name}: {question} <span class="right">{answer}</span>'
    return f'<h3>{title}</h3><div class="strip">{"".join(figures)}</div>\n'
