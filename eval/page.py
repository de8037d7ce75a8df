"""What `compare` shows: a Pareto plot, and one self-contained page with the pictures that tell methods apart."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

import vlprune
from vlprune.eval.answering import Answers, SuiteTask, Task
from vlprune.eval.files import reporting, write
from vlprune.eval.timing import Marks, prefill
from vlprune.eval.tiny import Item
from vlprune.eval.tiny.evaluate import prompt

if TYPE_CHECKING:
    from vlprune.eval.compare import Comparison, Row

THUMB = 168  # pixels
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1c1c1c }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace }
tr.base { background: #f3f3f3 } .wrong { color: #b3261e } .right { color: #1b6e3c }
.strip { display: flex; flex-wrap: wrap; gap: .8rem } figure { margin: 0; width: 168px; font-size: 12px }
figure img { width: 100%; display: block } figcaption { overflow-wrap: anywhere }
img.plot { max-width: 100% } p.setting { color: #666; font-size: 13px }
"""


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
    return [plot, write(folder / "report.html", _page(comparison, plot.read_bytes(), drawn))]


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
    families = sorted({_family(row) for row in rows})
    leading = {_family(rows[i]) for i in best} | {"random", "unpruned"}
    for number, family in enumerate(families):
        own = sorted((row.kept, *points[i]) for i, row in enumerate(rows) if _family(row) == family)
        look: dict[str, Any] = {"color": "0.8", "marker": "o", "markersize": 3, "zorder": 1}
        if family in leading:
            look = {"color": f"C{number % 10}", "marker": "o", "markersize": 5, "zorder": 2, "label": family}
        if family == "random":
            look |= {"color": "black", "linestyle": "--"}
        if family == "unpruned":
            look |= {"color": "black", "marker": "*", "markersize": 11}
        axis.plot([cost for _, cost, _ in own], [score for *_, score in own], linewidth=1, **look)
    edge = sorted(points[i] for i in best)
    axis.step([p[0] for p in edge], [p[1] for p in edge], where="post", color="0.4", linewidth=0.8, linestyle=":")
    axis.set_xlabel(label)
    axis.grid(alpha=0.25)
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
                kept.append(_thumb(vlprune.trace(model).draw(case.item.image)))
        return Drawn(case, _thumb(case.item.image), kept)


def _thumb(image: Image.Image) -> Image.Image:
    small = image.convert("RGB")
    small.thumbnail((2 * THUMB, 2 * THUMB))
    return small


# ---- the page


def _page(comparison: Comparison, plot: bytes, drawn: Sequence[Drawn]) -> str:
    from vlprune.eval.compare import cells_of, header

    tasks = list(comparison.rows[0].values)
    model = html.escape(str(comparison.setting["model"]))
    setting = html.escape(", ".join(f"{k} {v}" for k, v in comparison.setting.items()))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header(tasks))
    body = ""
    for number, row in enumerate(comparison.rows):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells_of(row, tasks))
        body += f"<tr>{cells}</tr>\n" if number else f'<tr class="base">{cells}</tr>\n'
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in comparison.notes)
    cases = "".join(map(_case, drawn)) or "<p>All methods agree on all items.</p>"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>vlprune compare: {model}</title>
<style>{STYLE}</style>
<h1>{model}: pruners compared</h1>
<p class="setting">{setting}</p>
<p>"relative" is the mean over tasks of score over the unpruned model's score, with a 95 % bootstrap interval over
items. "worse / better" counts items answered worse and better than by the unpruned model; p is the exact sign test on
them (McNemar's test where answers are right or wrong). "kept" are visual tokens in the last layer, "per layer" their
mean over layers.</p>
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
<ul>{notes}</ul>
<h2>Score against cost</h2>
<img class="plot" alt="score against latency and cache size" src="{_source(plot, "png")}">
<h2>Where methods disagree most</h2>
{cases}
</html>
"""


def _case(drawn: Drawn) -> str:
    case = drawn.case
    figures = [_figure(drawn.image, "the picture", "")]
    for plan, output, score, image in zip(case.plans, case.outputs, case.scores, drawn.kept, strict=True):
        answer = html.escape(output if len(output) < 60 else output[:57] + "...")
        verdict = f'<br><span class="{"right" if score == 1 else "wrong"}">{answer} ({score:.2f})</span>'
        figures.append(_figure(image, html.escape(plan), verdict))
    question, answer = html.escape(case.item.question), html.escape(case.item.answer)
    title = f'{case.task.name}: {question} <span class="right">{answer}</span>'
    return f'<h3>{title}</h3><div class="strip">{"".join(figures)}</div>\n'


def _figure(image: Image.Image, name: str, more: str) -> str:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    source = _source(data.getvalue(), "jpeg")
    return f'<figure><img src="{source}" alt="{name}"><figcaption>{name}{more}</figcaption></figure>'


def _source(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
