"""The demonstration: one small trained model, a handful of pictures, five pruners at three budgets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import vlprune
from vlprune import Trace
from vlprune.eval.timing import prefill_times
from vlprune.eval.tiny import Item, items
from vlprune.eval.tiny.evaluate import answer, prompt

PRUNERS = (
    "random",
    "uniform",
    "fastv@4",
    "divprune",
    "visionzip",
)  # FastV's layer 2 of 32 is early; 4 of 8 ranks well here
BUDGETS = (0.333, 0.111, 0.056)
TASKS = ("color", "letter", "extreme", "sign", "kv")  # the first item of each is shown
PER_TASK = 4
SEED = 2026


@dataclass(frozen=True, eq=False)
class Answer:
    text: str
    trace: Trace | None
    tokens: list[str]  # the text, token by token


@torch.inference_mode()
def ask(
    model: Any, processor: Any, image: Image.Image, question: str, plan: str | None = None, longest: int = 24
) -> Answer:
    """One greedy answer of `longest` tokens at most, pruned by `plan` or with all tokens; the model is left as it was."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt").to(model.device, model.dtype)

    def generate() -> list[str]:
        ids = model.generate(**inputs, max_new_tokens=longest, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return vlprune.draw.pieces(processor, ids.tolist())

    if plan is None:
        tokens = generate()
        return Answer("".join(tokens).strip(), None, tokens)
    with vlprune.pruning(model, plan), vlprune.recording(model):
        tokens = generate()
        return Answer("".join(tokens).strip(), vlprune.trace(model), tokens)


def photograph() -> Image.Image | None:
    """The public-domain photograph among matplotlib's sample data, if matplotlib is there."""
    try:
        from matplotlib import get_data_path
    except ImportError:
        return None
    found = sorted((Path(get_data_path()) / "sample_data").glob("*.jpg"))
    return Image.open(found[0]).convert("RGB") if found else None


def served(model: Any) -> tuple[str, ...]:
    """PRUNERS; where the tower has no CLS token, VisionZip goes by the attention that tokens receive."""
    return tuple(p if vlprune.supported(model, p) else f"{p}:attention=received" for p in PRUNERS)


def run(model: Any, processor: Any, out: Path, console: Console) -> None:
    """Print questions, answers, accuracy and costs; write pictures of kept tokens to `out`."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    out.mkdir(parents=True, exist_ok=True)
    pruners = served(model)
    plans = [f"{p}:keep={k}" for k in BUDGETS for p in pruners]
    asked = [item for task in TASKS for item in items(task, PER_TASK, SEED)]
    shown = asked[::PER_TASK]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("asking", total=len(plans) + 2)
        answers: dict[str, list[str]] = {}
        right: dict[str, float] = {}
        for plan in ["all tokens", *plans]:
            if plan != "all tokens":
                vlprune.wrap(model, plan)
            got = [record.output for record in answer(model, processor, asked, batch=10)]
            answers[plan] = got[::PER_TASK]
            right[plan] = sum(a == i.answer for a, i in zip(got, asked, strict=True)) / len(asked)
            progress.advance(bar)
        vlprune.unwrap(model)
        costs = {plan: _cost(model, processor, shown[0], None if plan == "all tokens" else plan) for plan in answers}
        progress.advance(bar)
    _print_answers(console, shown, answers, pruners)
    _print_table(console, right, costs)
    written = _draw(model, processor, shown[0], out, pruners)
    console.print(
        f"kept tokens drawn to {len(written)} pictures in {out}: scene.png, photograph.png, and one per pruner"
    )


def _cost(model: Any, processor: Any, item: Item, plan: str | None) -> tuple[Trace | None, float]:
    """(trace, median milliseconds of the language model's prefill for one picture)."""
    inputs = prompt(processor, [item]).to(model.device, model.dtype)
    if plan is None:
        return None, prefill_times(model, inputs, repeats=3).language
    with vlprune.pruning(model, plan):
        times = prefill_times(model, inputs, repeats=3)
        return vlprune.trace(model), times.language


def _print_answers(
    console: Console, shown: list[Item], answers: dict[str, list[str]], pruners: tuple[str, ...]
) -> None:
    for number, item in enumerate(shown):
        table = Table("", *(f"{k:.1%}" for k in BUDGETS), title=f"{item.question}  [green]{item.answer}[/green]",
                      title_justify="left", caption=f"all tokens: {answers['all tokens'][number]}", caption_justify="left")  # fmt: skip
        for pruner in pruners:
            cells = [answers[f"{pruner}:keep={k}"][number] for k in BUDGETS]
            table.add_row(pruner, *(f"[{'green' if c == item.answer else 'red'}]{c}[/]" for c in cells))
        console.print(table)


def _print_table(console: Console, right: dict[str, float], costs: dict[str, tuple[Trace | None, float]]) -> None:
    table = Table("plan", "right", "kept", "layer average", "KV MiB", "prefill ms",
                  title=f"{PER_TASK * len(TASKS)} questions ({', '.join(TASKS)})", title_justify="left")  # fmt: skip
    full = next(t for t, _ in costs.values() if t is not None)
    for plan, (trace, ms) in costs.items():
        kept, average, kv = (full.visual, float(full.visual), full.kv_bytes_unpruned) if trace is None else (
            trace.kept, trace.layer_average, trace.kv_bytes)  # fmt: skip
        table.add_row(plan, f"{right[plan]:.0%}", str(kept), f"{average:.0f}", f"{kv / 2**20:.2f}", f"{ms:.1f}")
    console.print(table)


@torch.inference_mode()
def _draw(model: Any, processor: Any, item: Item, out: Path, pruners: tuple[str, ...]) -> list[Path]:
    """What every pruner keeps at every budget: a sheet for a drawn scene and one for a photograph, and for each pruner alone."""
    sources = {"scene": item.image}
    photo = photograph()
    if photo is not None:
        sources["photograph"] = photo
    written = []
    for name, image in sources.items():
        inputs = prompt(processor, [replace(item, image=image)]).to(model.device, model.dtype)
        drawn = {}
        for pruner in pruners:
            for keep in BUDGETS:
                plan = f"{pruner}:keep={keep}"
                with vlprune.pruning(model, plan):
                    model(**inputs)
                    drawn[plan] = vlprune.trace(model).draw(image, processor=processor)
        sheets = {name: drawn}
        for pruner in pruners:
            sheets[f"{name}-{pruner.partition(':')[0].replace('@', '-')}"] = {
                p: d for p, d in drawn.items() if p.startswith(f"{pruner}:")
            }
        for stem, overlays in sheets.items():
            path = out / f"{stem}.png"
            vlprune.draw.compare(overlays).save(path)
            written.append(path)
    return written
