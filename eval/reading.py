"""Reading whole pages while every step looks at a few visual tokens: FastOCR beside its neighbours and beside eviction.

    python -m vlprune.eval.reading --model tiny-qwen2.5-vl --pages 20 --output reading/

FastOCR's focal layers are calibrated first, on other pages. Two numbers say what a decode step reads: the share of visual
tokens in the layers that are pruned, which is the budget, and the mean over all layers, of which some read everything.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vlprune
from vlprune.api import adapter_of
from vlprune.calibrate import FocalLayers, focal_layers_of
from vlprune.errors import SpecError, UnsupportedStage
from vlprune.eval.checkpoints import load
from vlprune.eval.files import output_folder, write
from vlprune.eval.report import markdown, setting
from vlprune.eval.significance import Interval, relative
from vlprune.eval.tiny import Item, items
from vlprune.eval.tiny.evaluate import edit_distance, generate, prompt
from vlprune.eval.tiny.sheets import SHEET_KINDS
from vlprune.eval.tiny.vocabulary import DOCUMENT

DENSE = "dense"
PLANS = ("fastocr", "delta", "snapkv", "fastv@4", "divprune", "visionzip:attention=received", "random")
KEEP = (0.2, 0.1, 0.05, 0.02)
CLAIM = (0.05, 0.98)  # the paper: share of visual tokens a step, share of the accuracy
CALIBRATION_PAGES, CALIBRATION_SEED = 8, 1_000_003
CHECK_STEPS = 200
VARIABLE = "VLPRUNE_KERNELS"  # which kernels run


@dataclass(frozen=True)
class Row:
    """One plan over all pages. Intervals are bootstrapped over pages, 95 %."""

    plan: str
    character_error: Interval  # insertions, deletions and substitutions over characters
    exact_lines: Interval  # share of lines that come out whole, in order
    accuracy: Interval  # 1 - character error, over that of the dense model
    agreement: Interval  # the same with the dense model's text as the truth
    by_kind: dict[str, float]  # character error of each kind of page
    pruned_layers: float  # share of visual tokens a decode step reads in layers that do not read all
    all_layers: float  # mean over the layers
    outputs: list[str]


@dataclass(frozen=True)
class Reading:
    """The dense model first."""

    setting: dict[str, Any]
    focal: FocalLayers | None
    rows: list[Row]
    checks: list[str]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read(
    model: Any,
    processor: Any,
    pages: Sequence[Item],
    plans: Sequence[str] = PLANS,
    keep: Sequence[float] = KEEP,
    batch: int = 20,
    checks: bool = False,
    command: str = "",
) -> Reading:
    """Let a model read pages under every plan at every budget.

    Args:
        pages: items whose answer is the page's text.
        plans: texts without a budget; `fastocr` without focal layers gets those found on the model.
        keep: budgets, as in `vlprune.wrap`.
        checks: whether to prove first that keep=1.0 is dense decoding and that both engines write the same tokens.
    Raises:
        SpecError, UnsupportedStage: a plan that cannot be read or served, before any page is.
    """
    focal = None
    if any(plan.startswith("fastocr") and "focal_layers=" not in plan for plan in plans):
        focal = calibrate(model, processor, batch=min(batch, CALIBRATION_PAGES))
        plans = [_with_focal_layers(plan, focal) for plan in plans]
    grid = [vlprune.Plan.parse(plan, k) for plan in plans for k in keep]
    for plan in grid:
        if len(plan.steps) > 1:
            raise SpecError(f"{plan}: a reading compares single methods; give one step")
        reason = vlprune.why_unsupported(model, plan)
        if reason:
            raise UnsupportedStage(reason)
    batches = [(part, prompt(processor, part)) for part in _parts(pages, batch)]
    proofs = []
    if checks:
        decoding = [plan for plan in grid if plan.steps[0].stage.name == "decode"]
        proofs = [line for plan in decoding[:1] for line in prove(model, batches, plan)]
    dense, _ = _read(model, processor, batches, None)
    rows = [_row(DENSE, pages, dense, dense, (1.0, 1.0))]
    for plan in grid:
        outputs, read_by_step = _read(model, processor, batches, plan)
        rows.append(_row(str(plan), pages, outputs, dense, read_by_step))
    head = setting(model.device, str(model.dtype).removeprefix("torch."), command)
    return Reading(head | {"pages": len(pages), "attention": model.config._attn_implementation}, focal, rows, proofs)


def calibrate(model: Any, processor: Any, batch: int, pages: int = CALIBRATION_PAGES) -> FocalLayers:
    """FastOCR's focal layers for this model, from pages that no table is made of."""
    drawn = items(DOCUMENT, pages, CALIBRATION_SEED)
    inputs = [prompt(processor, part).to(model.device, model.dtype) for part in _parts(drawn, batch)]
    return focal_layers_of(model, inputs)


def _with_focal_layers(plan: str, focal: FocalLayers) -> str:
    name, colon, rest = plan.partition(":")
    if not name.startswith("fastocr") or "focal_layers=" in rest:
        return plan
    return f"{name}:focal_layers={focal.parameter}{colon}{rest}"


def _parts(pages: Sequence[Item], batch: int) -> list[Sequence[Item]]:
    return [pages[at : at + batch] for at in range(0, len(pages), batch)]


def _wrapped(model: Any, plan: vlprune.Plan | None) -> Any:
    return nullcontext() if plan is None else vlprune.pruning(model, plan)


def _read(
    model: Any, processor: Any, batches: Sequence[tuple[Sequence[Item], Any]], plan: vlprune.Plan | None
) -> tuple[list[str], tuple[float, float]]:
    """Texts, and what a decode step reads: (share in pruned layers, share over all layers), by visual token."""
    outputs: list[str] = []
    pruned = everywhere = visual = 0.0
    with _wrapped(model, plan):
        for part, inputs in batches:
            outputs += generate(model, processor, part, inputs.copy())
            if plan is not None:
                trace = vlprune.trace(model)
                here = shares(model, plan, trace)
                visual += trace.visual
                pruned, everywhere = pruned + here[0] * trace.visual, everywhere + here[1] * trace.visual
    return outputs, (pruned / max(visual, 1), everywhere / max(visual, 1))


def shares(model: Any, plan: vlprune.Plan, trace: vlprune.Trace) -> tuple[float, float]:
    """Visual tokens that a decode step reads, over those that are there: in the pruned layers, and over all layers.

    A per-step method takes f layers to look at everything, so its mean is ``(f + (L - f) K / N) / L``. Of a method that
    evicts it is the mean over the layers' caches.
    """
    step = plan.steps[0]
    if not isinstance(step.pruner, vlprune.DecodePruner):
        return trace.kept / trace.visual, trace.layer_average / trace.visual
    rule, depth = step.pruner, len(adapter_of(model).layers)
    focal = set(rule.focal(depth))
    full = focal | set(rule.dense(depth)) if rule.reads == "all" else set(range(depth)) - focal
    read = [0.0] * depth
    for picture in trace.pictures:
        due = step.budget.count(picture.tokens) if rule.worthwhile(picture.tokens) else picture.tokens
        for i in range(depth):
            read[i] += picture.tokens if i in full else rule.count(due, picture.tokens, i, depth)
    rest = [read[i] / trace.visual for i in range(depth) if i not in full]
    return sum(rest) / max(1, len(rest)), sum(read) / trace.visual / depth


def lines_read(output: str, answer: str) -> tuple[int, int]:
    """Lines of the answer that the output holds whole and in order, and all of them."""
    wanted, got = answer.split("\n"), output.split("\n")
    blocks = SequenceMatcher(None, wanted, got, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks), len(wanted)


def _row(name: str, pages: Sequence[Item], outputs: list[str], dense: list[str], read: tuple[float, float]) -> Row:
    def ratio(above: Sequence[float], below: Sequence[float]) -> Interval:
        return relative([np.array(above, float)], [np.array(below, float)])

    answers = [page.answer for page in pages]
    wrong = [edit_distance(o, a) for o, a in zip(outputs, answers, strict=True)]
    lines = [lines_read(o, a) for o, a in zip(outputs, answers, strict=True)]
    right = [max(0, len(a) - w) for a, w in zip(answers, wrong, strict=True)]
    before = [max(0, len(a) - edit_distance(d, a)) for a, d in zip(answers, dense, strict=True)]
    same = [max(0, len(d) - edit_distance(o, d)) for o, d in zip(outputs, dense, strict=True)]
    kinds: dict[str, list[tuple[int, int]]] = {}
    for page, w in zip(pages, wrong, strict=True):
        kind = SHEET_KINDS[page.index % len(SHEET_KINDS)] if page.task == DOCUMENT else page.task
        kinds.setdefault(kind, []).append((w, len(page.answer)))
    return Row(
        plan=name,
        character_error=ratio(wrong, [len(a) for a in answers]),
        exact_lines=ratio([hit for hit, _ in lines], [n for _, n in lines]),
        accuracy=ratio(right, before),
        agreement=ratio(same, [len(d) for d in dense]),
        by_kind={kind: sum(w for w, _ in found) / sum(n for _, n in found) for kind, found in kinds.items()},
        pruned_layers=read[0], all_layers=read[1], outputs=outputs,
    )  # fmt: skip


# ---- what must hold


def prove(
    model: Any, batches: Sequence[tuple[Sequence[Item], Any]], plan: vlprune.Plan, steps: int = CHECK_STEPS
) -> list[str]:
    """Two facts in words: keep=1.0 against dense decoding, and the kernel engine against the reference engine."""
    step = plan.steps[0]
    every = vlprune.Plan((vlprune.Step(step.pruner, step.stage, vlprune.Budget(1.0)),))
    pages = sum(len(part) for part, _ in batches)
    same = equal = 0
    for _, inputs in batches:
        dense, found = _write(model, inputs, None, steps), _write(model, inputs, every, steps)
        logits = [torch.equal(a, b) for a, b in zip(dense[1], found[1], strict=True)]
        same += int((dense[0] == found[0]).all(1).sum()) if all(logits) else 0
        with kernels("reference"):
            plain = _write(model, inputs, plan, steps)[0]
        with kernels("triton"):
            fast = _write(model, inputs, plan, steps)[0]
        equal += int((plain == fast).all(1).sum())
    return [
        f"{every}: the same tokens and bit for bit the same logits as dense decoding on {same} of {pages} pages over "
        f"{steps} steps",
        f"{plan}: reference engine and kernel engine write the same tokens on {equal} of {pages} pages over {steps} steps",
    ]


@contextmanager
def kernels(backend: str) -> Iterator[None]:
    """Which kernels run, for the length of a with-block."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = backend
    try:
        yield
    finally:
        os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})


@torch.inference_mode()
def _write(model: Any, inputs: Any, plan: vlprune.Plan | None, steps: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Exactly `steps` greedy tokens of every row, beyond its end of sequence too, and the logits of every step."""
    inputs = inputs.copy().to(model.device, model.dtype)
    with _wrapped(model, plan):
        out = model.generate(
            **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    return out.sequences[:, inputs["input_ids"].shape[1] :], out.logits


# ---- showing


def table(reading: Reading) -> str:
    """Markdown: where it was measured, the rows, what was proven."""

    def span(x: Interval) -> str:
        return f"{x.value:.1%}" if x.low is None else f"{x.value:.1%} [{x.low:.1%}, {x.high:.1%}]"

    kinds = list(reading.rows[0].by_kind)
    titles = ["plan", "character error", "exact lines", "accuracy of dense", "agreement with dense",
              "read a step, pruned layers", "all layers", *(f"error, {kind}" for kind in kinds)]  # fmt: skip
    rows = [
        [row.plan, span(row.character_error), span(row.exact_lines), span(row.accuracy), span(row.agreement),
         f"{row.pruned_layers:.1%}", f"{row.all_layers:.1%}", *(f"{row.by_kind[kind]:.1%}" for kind in kinds)]
        for row in reading.rows
    ]  # fmt: skip
    notes = list(reading.checks)
    if reading.focal is not None:
        mass = ", ".join(f"{m:.2f}" for m in reading.focal.mass)
        concentration = ", ".join(f"{c:.2f}" for c in reading.focal.concentration)
        notes.append(f"focal layers {reading.focal.parameter}; attention on the page by layer {mass}; of it on the 5 % of "
                     f"tokens looked at most {concentration} ({reading.focal.steps} steps)")  # fmt: skip
    return markdown(reading.setting, titles, rows) + "".join(f"\n- {note}" for note in [*notes, *claim(reading)]) + "\n"


def claim(reading: Reading) -> list[str]:
    """Where FastOCR stands against its paper's 98 % of accuracy at 5 % of the visual tokens a step."""
    share, accuracy = CLAIM
    found = [r for r in reading.rows if r.plan.startswith("fastocr") and abs(r.pruned_layers - share) < 0.002]
    out = []
    for row in found:
        a = row.accuracy
        interval = "" if a.low is None else f" [{a.low:.1%}, {a.high:.1%}]"
        verdict = "reached" if a.value >= accuracy else "missed"
        out.append(f"paper: {accuracy:.0%} of the accuracy at {share:.0%} of the visual tokens a step, on Qwen2.5-VL; here "
                   f"{a.value:.1%}{interval} at {row.pruned_layers:.1%} of the pruned layers, which is {row.all_layers:.1%} "
                   f"over all layers: {verdict}")  # fmt: skip
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="python -m vlprune.eval.reading", description=lines[0])
    parser.add_argument("--model", default="tiny-qwen2.5-vl", help="a checkpoint that reads `document` items")
    parser.add_argument("--pages", type=int, default=20)
    parser.add_argument("--plans", nargs="+", default=list(PLANS), help="methods without a budget")
    parser.add_argument("--keep", type=lambda text: [float(k) for k in text.split(",")], default=list(KEEP))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checks", action="store_true", help="prove both engines equal first; needs a GPU")
    parser.add_argument("--output", help="folder for reading.md and reading.json")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    model, processor = load(options.model, dtype=options.dtype, device=options.device)
    command = " ".join(["python -m vlprune.eval.reading", *given])
    pages = items(DOCUMENT, options.pages, options.seed)
    found = read(model, processor, pages, options.plans, options.keep, options.batch, options.checks, command=command)
    text = table(found)
    print(text)
    if options.output:
        folder = output_folder(options.output)
        write(folder / "reading.json", json.dumps(found.to_dict(), indent=1) + "\n")
        write(folder / "reading.md", text)


if __name__ == "__main__":
    main()
