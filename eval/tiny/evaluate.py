"""Ask a model the tiny benchmark's questions through the ordinary Hugging Face API.

From the command line:

    python -m vlprune.eval.tiny.evaluate tiny-llava --items 100 --seed 7
    python -m vlprune.eval.tiny.evaluate FOLDER --items 50 --seed 7 --plan fastv:keep=0.333 --tasks color,kv
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlprune.models import embedded
from vlprune.processors import load_processor

from . import synth
from .vocabulary import DOCUMENT, TASKS

READING = ("sign", "kv", "line", "page", DOCUMENT)  # a share of wrong characters says more than right or wrong
MAX_NEW_TOKENS = {"page": 176, "line": 64, DOCUMENT: 224}  # at most 158 and 200 characters, one token each
SHORT_ANSWER = 24


@dataclass(frozen=True)
class Record:
    """One answered item."""

    task: str
    index: int
    seed: int
    question: str
    answer: str
    output: str

    @property
    def exact(self) -> bool:
        return self.output == self.answer

    @property
    def character_errors(self) -> int:
        """Insertions, deletions and substitutions that turn the output into the answer."""
        return edit_distance(self.output, self.answer)


@dataclass(frozen=True)
class Score:
    """Shares over the items of one task: right answers, and wrong characters per character of the answers."""

    items: int
    exact: float
    character_error: float


def evaluate(
    model: Any,
    processor: Any,
    tasks: Iterable[str] = TASKS,
    items: int = 100,
    seed: int = 0,
    batch: int = 8,
    size: tuple[int, int] | None = None,
) -> list[Record]:
    """Greedy answers to the first `items` items of each task under `seed`.

    Args:
        model: any image-text-to-text model of transformers, wrapped by vlprune or not.
        processor: its processor; prompts are padded on the left.
        items: number of items of each task.
        batch: prompts answered together; answers agree with batch 1 up to rounding.
        size: (width, height) of the pictures; default: as in `synth.items`.
    """
    drawn = (synth.items(task, items, seed, size=size) for task in tasks)
    return [record for part in drawn for record in answer(model, processor, part, batch=batch)]


@torch.inference_mode()
def answer(model: Any, processor: Any, items: Sequence[synth.Item], batch: int = 8) -> list[Record]:
    """Greedy answers to the given items, in their order."""
    records = []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        outputs = generate(model, processor, part, prompt(processor, part))
        records += [
            Record(item.task, item.index, item.seed, item.question, item.answer, output)
            for item, output in zip(part, outputs, strict=True)
        ]
    return records


@torch.inference_mode()
def generate(model: Any, processor: Any, items: Sequence[synth.Item], inputs: Any) -> list[str]:
    """Greedy answers to items whose `prompt` is at hand."""
    limit = max(MAX_NEW_TOKENS.get(item.task, SHORT_ANSWER) for item in items)
    inputs = inputs.to(model.device, model.dtype)
    ids = model.generate(**inputs, max_new_tokens=limit, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return [output.strip() for output in processor.batch_decode(ids, skip_special_tokens=True)]


def prompt(processor: Any, items: Sequence[synth.Item]) -> Any:
    """Model inputs for one question with one picture a row, padded on the left."""
    texts = []
    for item in items:
        content = [{"type": "image"}, {"type": "text", "text": item.question}]
        message = {"role": "user", "content": content}
        texts.append(processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False))
    pictures = [item.image for item in items]
    return processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")


def score(records: Iterable[Record]) -> dict[str, Score]:
    """Scores by task, in the order in which the tasks appear."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.task, []).append(record)
    return {
        task: Score(
            items=len(group),
            exact=sum(record.exact for record in group) / len(group),
            character_error=sum(r.character_errors for r in group) / sum(len(r.answer) for r in group),
        )
        for task, group in groups.items()
    }


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlprune.eval.tiny.evaluate", description="Score a model.")
    parser.add_argument("model", help="a checkpoint folder, a repository, or the name of a shipped model")
    parser.add_argument("--items", type=int, default=100, help="items of each task")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--plan", help="how to prune, such as fastv:keep=0.333; without it all tokens are kept")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated")
    parser.add_argument("--size", help="of the pictures, such as 448x336; default: 336x336, and whole sheets")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)

    # Imported here: the functions above work on a loaded model and need neither.
    from transformers import AutoModelForImageTextToText

    import vlprune

    local = Path(options.model).is_dir() or "/" in options.model
    path = options.model if local else embedded(options.model)
    processor = load_processor(path)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval().to(options.device)
    if options.plan:
        vlprune.wrap(model, options.plan)
    width, _, height = (options.size or "").partition("x")
    size = (int(width), int(height)) if options.size else None
    print(f"{options.model}  plan {options.plan or 'none'}  {options.items} items a task  seed {options.seed}")
    print(f"{'task':10}{'exact':>7}{'char. error':>13}{'s / item':>10}")
    for task in options.tasks.split(","):
        started = time.perf_counter()
        records = evaluate(model, processor, [task], options.items, options.seed, options.batch, size)
        result = score(records)[task]
        seconds = (time.perf_counter() - started) / options.items
        character_error = f"{result.character_error:.4f}" if task in READING else "-"
        print(f"{task:10}{result.exact:7.3f}{character_error:>13}{seconds:10.3f}", flush=True)


if __name__ == "__main__":
    main()
