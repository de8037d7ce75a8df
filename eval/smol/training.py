"""Train smol-llava's tower and projector behind the frozen language model.

    python -m vlprune.eval.smol.training --bundle BUNDLE --out RUN --total 700    # the shipped tower, on one H100
    python -m vlprune.eval.smol.training --bundle BUNDLE --out RUN --total 2100 --seconds 550             # a longer run
    python -m vlprune.eval.smol.training --bundle BUNDLE --out RUN --total 2100 --seconds 550 --resume    # until it is over

BUNDLE is what `vlprune.eval.smol.bundle` made: beside it torch, transformers, numpy, pillow and safetensors are enough. A
command ends within --seconds, and leaves in RUN its whole state, what it printed and the tower as it is; the next one goes
on from there. --total is the length of the training, without the start of each command and the questions at its end.

The tower starts from tiny-llava's. For the first eighth of a run it learns without the language model, at several times the
speed, what each patch shows; then the language model answers too. With --names, visual tokens are also drawn to the
embeddings of the words their patches show (`objective.like_words`). Pictures are drawn while training (`pictures.training_sample` holds the mixture). Sample i is a function of the bank, the seed and i.
With --steps the whole run is a function of the step, and a resumed run equals an uninterrupted one; with --total the
learning rate and the difficulty of the pictures follow the clock.

RUN holds run.json (the recipe, and of each command its speed, losses and held-out scores), the state in parts of at most
15 MiB, log.txt, tower.safetensors and tower.json: what `vlprune.eval.smol.assemble` makes a checkpoint of.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from vlprune.errors import VlpruneError
from vlprune.eval.files import output_folder, write
from vlprune.eval.tiny import items as tiny_items
from vlprune.eval.tiny.data import Arrays, Batch, Loader, Shape, Syllabus, batches
from vlprune.eval.tiny.evaluate import answer, score
from vlprune.eval.tiny.optimizer import Optimizer
from vlprune.eval.tiny.synth import SIDE
from vlprune.eval.tiny.train import Clock, Schedule

from .assemble import build, processor, save_tower
from .bundle import BANK, LANGUAGE
from .language import ASKED, TEXT_TOKENS, Codec, Language
from .net import CONFIG, Decoder, Eyes, fit_scale, warm
from .objective import TERMS, Heads, Losses, losses
from .pictures import TASKS, items, training_sample
from .sources import Bank

PART = 15 * 2**20  # bytes of a part of the state
SAVE_SECONDS = 120
LOG_STEPS = 200
RESERVE = 60  # seconds at the end of a command for questions and files
STATE = "run.json"
TINY_TASKS = ("color", "relation", "letter")  # held-out tasks of the tiny models that are asked too
EXAM_SEED, EXAM_BATCH = 20264, 32


@dataclass(frozen=True)
class Recipe(Schedule):
    """Hyper-parameters. Shares are of the whole run."""

    batch: int = 64
    muon_lr: float = 2e-3  # matrices of the tower's layers and of the projector
    adam_lr: float = 1e-3  # everything else
    warmup: int = 100  # steps
    decay: float = 0.6  # last share, over which the learning rate falls to zero
    ramp: float = 0.25  # first share, over which pictures become as hard as they get
    alone: float = 0.12  # first share, in which the language model is not asked
    scene_weight: float = 2.5  # of an answer token about a scene, against one that was read
    patch_weights: tuple[float, float] = (0.5, 0.1)  # weight of the dense labels until 0.3 and from 0.65 on
    names_weight: float = 0.0  # of the names of patches, against a dense label; in a miniature they did not help
    contents_weight: float = 0.5


# ---- samples


class Row(Shape):
    """A batch of squares for a larger vocabulary, with names of the patches."""

    def layout(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        patches = super().layout()["labels"][0][-1]
        wide = {"ids": ((self.batch, self.text), np.int32), "names": ((self.batch, 2, patches), np.int32)}
        return super().layout() | wide


def syllabus(batch: int) -> Syllabus:
    return Syllabus(((1.0, (Row(batch, (SIDE, SIDE), TEXT_TOKENS),)),))


def fill(bank: Bank, arrays: Arrays, codec: Codec, seed: int, step: int, difficulty: float) -> None:
    """Draw batch number `step`, samples `step * batch`, `step * batch + 1`, ..."""
    size = len(arrays["ids"])
    for row in range(size):
        picture, turns, written = training_sample(f"{seed}/{step * size + row}", bank, difficulty)
        arrays["pixels"][row] = picture.pixels
        arrays["labels"][row] = picture.labels.reshape(5, -1)
        arrays["names"][row] = codec.names(picture.labels, written)
        codec.pack(turns, arrays["ids"][row], arrays["marks"][row])


# ---- training


class Trainer:
    """Tower, projector and heads under training: one step at a time, and the whole state on disk."""

    def __init__(
        self, recipe: Recipe, decoder: Decoder, codec: Codec, clock: Clock, seed: int, device: torch.device
    ) -> None:
        self.recipe, self.decoder, self.clock, self.seed, self.device = recipe, decoder, clock, seed, device
        self.step_number, self.commands = 0, list[dict[str, Any]]()
        torch.manual_seed(seed)
        self.eyes, self.heads = Eyes(CONFIG), Heads(CONFIG)
        warm(self.eyes)
        self.eyes.to(device)
        self.heads.to(device)
        self.prefix = torch.tensor(codec.prefix, device=device)
        gpu = device.type == "cuda"
        self.optimizer = Optimizer(self.eyes.matrices(), (self.eyes, self.heads), gpu)
        if gpu:
            self.eyes.compile_layers()
            self.decoder.compile()
            self.optimizer.compile()

    def rehearse(self, batch: Batch) -> None:
        """Have everything compiled that a later step needs; nothing is learnt."""
        self._losses(batch, speaks=True).answers.backward()
        self.optimizer.clear()

    def step(self, batch: Batch) -> Tensor:
        """One update; returns `Losses.statistics`."""
        step, recipe, progress = self.step_number, self.recipe, self.clock.progress(self.step_number)
        if step == 0:
            with self._mixed():
                fit_scale(self.eyes, self.decoder, batch["pixels"])
        speaks = progress >= recipe.alone
        found = self._losses(batch, speaks)
        dense = found.patches + recipe.names_weight * found.names if recipe.names_weight else found.patches
        loss = recipe.patch_weight(progress) * dense + recipe.contents_weight * found.contents
        (loss + found.answers if speaks else loss).backward()
        rate = recipe.learning_rate(step, progress)
        self.optimizer.step(recipe.muon_lr * rate, recipe.adam_lr * rate)
        self.step_number += 1
        return found.statistics()

    def _losses(self, batch: Batch, speaks: bool) -> Losses:
        with self._mixed():
            return losses(self.eyes, self.heads, self.decoder, self.prefix, batch, self.recipe.scene_weight, speaks=speaks,
                          named=self.recipe.names_weight > 0)  # fmt: skip

    def _mixed(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    # ---- on disk

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that changes in training, by name."""
        found = {f"eyes.{name}": value for name, value in self.eyes.state_dict().items()}
        found |= {f"heads.{name}": value for name, value in self.heads.state_dict().items()}
        found |= {f"muon.{i}": buffer for i, buffer in enumerate(self.optimizer.muon.buffers)}
        for i, state in self.optimizer.adam.state_dict()["state"].items():
            found |= {f"adam.{i}.{name}": value for name, value in state.items()}
        return found

    def save(self, out: Path) -> None:
        """Write the state in parts, then the file that names them; a former state stays whole until then."""
        groups, room = list[dict[str, Tensor]](), 0
        for name, value in self._tensors().items():
            if value.nbytes > room:
                groups, room = [*groups, {}], PART
            groups[-1][name] = value.detach().cpu().contiguous()
            room -= value.nbytes
        names = [f"part-{self.step_number}-{i}.safetensors" for i in range(len(groups))]
        for name, group in zip(names, groups, strict=True):
            write(out / name, save(group))
        state = {"step": self.step_number, "progress": self.clock.progress(self.step_number), "seed": self.seed,
                 "recipe": asdict(self.recipe), "parts": names, "commands": self.commands}  # fmt: skip
        write(out / STATE, json.dumps(state, indent=1) + "\n")
        for old in set(out.glob("part-*.safetensors")) - {out / name for name in names}:
            old.unlink()

    def load(self, out: Path, state: dict[str, Any]) -> None:
        stored = {name: value for part in state["parts"] for name, value in load_file(out / part).items()}

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}

        self.eyes.load_state_dict(under("eyes."))
        self.heads.load_state_dict(under("heads."))
        self.optimizer.muon.load_state_dict({"buffers": list(under("muon.").values())})
        adam = self.optimizer.adam.state_dict()
        numbers = {int(name.split(".")[0]) for name in under("adam.")}
        adam["state"] = {i: under(f"adam.{i}.") for i in sorted(numbers)}
        self.optimizer.adam.load_state_dict(adam)
        self.step_number, self.clock.before, self.commands = state["step"], state["progress"], state["commands"]


def train(
    out: Path,
    clock: Clock,
    language: Language,
    bank: Bank,
    held_out: Bank,
    *,
    recipe: Recipe | None = None,
    seed: int = 1,
    workers: int = 0,
    resume: bool = False,
    until: float | None = None,
    questions: int = 0,
) -> Eyes:
    """Train to the end of the clock, or up to a moment; leaves the state and the tower in `out`.

    Args:
        until: on time.monotonic's clock.
        questions: asked of each held-out task when training stops.
    Raises:
        VlpruneError: `out` holds a state and resume is False, or the other way round, or its seed or recipe differs.
    """
    recipe = recipe or Recipe()
    state = _resumable(out, resume, seed, recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec = Codec(language.tokenizer)
    loader = Loader(
        codec,
        syllabus(recipe.batch),
        seed,
        difficulty=lambda step: recipe.difficulty(clock.progress(step)),
        workers=workers,
        start=state["step"] if state else 0,
        draw=partial(fill, bank),
    )
    try:
        decoder = Decoder(language.model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        trainer = Trainer(recipe, decoder, codec, clock, seed, device)
        if state:
            trainer.load(out, state)
        with (out / "log.txt").open("a") as log:
            report = _loop(trainer, loader, out, log, until)
            trainer.save(out)
            report["held_out"] = examine(trainer.eyes, language, held_out, questions)
            _print_tasks(report, log)
    finally:
        loader.close()
    trainer.commands.append(report)
    trainer.save(out)
    about = {"seed": seed, "steps": trainer.step_number, "samples": trainer.step_number * recipe.batch}
    save_tower(trainer.eyes, out, about | {"recipe": asdict(recipe), "held_out": report["held_out"]})
    return trainer.eyes


def _resumable(out: Path, resume: bool, seed: int, recipe: Recipe) -> dict[str, Any] | None:
    path = output_folder(out) / STATE
    if resume != path.exists():
        found = "there is no state to resume" if resume else "a run lies there; resume it or choose another folder"
        raise VlpruneError(f"cannot train into {out}: {found}")
    if not resume:
        return None
    state: dict[str, Any] = json.loads(path.read_text())
    wanted = json.loads(json.dumps({"seed": seed, "recipe": asdict(recipe)}))
    for name, value in wanted.items():
        if state[name] != value:
            raise VlpruneError(f"{out} was trained with {name} {state[name]}, not {value}; resume it with the same")
    return state


def _loop(trainer: Trainer, loader: Loader, out: Path, log: Any, until: float | None) -> dict[str, Any]:
    """Steps until the clock or `until` says stop; returns what is worth keeping of them."""
    clock, first = trainer.clock, trainer.step_number
    recent = deque[Tensor](maxlen=LOG_STEPS)
    waited, stream = 0.0, batches(loader, trainer.device)
    saved = began = logged = time.monotonic()
    while (progress := clock.progress(trainer.step_number)) < 1 and (until is None or time.monotonic() < until):
        asked = time.monotonic()
        batch = next(stream)
        waited += time.monotonic() - asked
        started = trainer.step_number > first
        if trainer.device.type == "cuda" and not started:
            trainer.rehearse(batch)
        recent.append(trainer.step(batch))
        if not started:  # all is compiled and the first pictures are drawn: from here on speed is measured
            ready = recent[-1].isfinite().sum().item() and time.monotonic()  # waits for the device
            print(f"ready after {ready - began:.0f} s", flush=True)
            clock.start()
            saved = began = logged = ready
            waited = 0.0
        step, now = trainer.step_number, time.monotonic()
        if step % LOG_STEPS == 0:
            line = f"{progress:5.1%}  step {step}  {now - began:.0f} s  {len(recent) / (now - logged):.1f} steps/s"
            _say(log, line + "".join(f"  {name} {value:.3f}" for name, value in _terms(recent).items()))
            logged = now
        if now - saved > SAVE_SECONDS:
            trainer.save(out)
            saved = time.monotonic()
    steps, seconds = trainer.step_number - first - 1, max(1e-9, time.monotonic() - began)
    report = {"steps": steps + 1, "seconds": round(seconds, 1), "steps_per_second": round(steps / seconds, 2),
              "data_wait": round(waited / seconds, 4), "progress": round(clock.progress(trainer.step_number), 4),
              "losses": _terms(recent), "tasks": _tasks(recent)}  # fmt: skip
    _say(log, f"{report['steps']} steps, {report['steps_per_second']} a second, {waited / seconds:.1%} of the time waiting for "
              f"pictures; {report['progress']:.1%} of the run is done")  # fmt: skip
    return report


def _say(log: Any, line: str) -> None:
    print(line, flush=True)
    print(line, file=log, flush=True)


def _terms(recent: Sequence[Tensor]) -> dict[str, float]:
    """Means of the TERMS there were."""
    if not recent:
        return {}
    means = torch.stack(list(recent))[:, : len(TERMS)].nanmean(0).tolist()
    return {name: round(value, 4) for name, value in zip(TERMS, means, strict=True) if value == value}


def _tasks(recent: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    """Cross entropy of an answer's token and the share of right ones, in training, by task."""
    if not recent:
        return {}
    sums = torch.stack(list(recent))[:, len(TERMS) :].sum(0).view(3, -1).T.tolist()
    return {
        task: {"loss": round(ce / number, 4), "right": round(right / number, 4)}
        for task, (number, ce, right) in zip(ASKED, sums, strict=True)
        if number
    }


def examine(eyes: Eyes, language: Language, bank: Bank, questions: int) -> dict[str, dict[str, float]]:
    """Greedy answers through transformers to the first questions of each held-out task."""
    if not questions:
        return {}
    device = next(eyes.parameters()).device
    model = build(language, eyes.config, {name: value.cpu() for name, value in eyes.state_dict().items()})
    model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    drawn = {task: items(task, questions, EXAM_SEED, bank) for task in TASKS}
    drawn |= {f"tiny {task}": tiny_items(task, questions, EXAM_SEED) for task in TINY_TASKS}
    found = {}
    for name, asked in drawn.items():
        (result,) = score(answer(model, processor(language.tokenizer), asked, EXAM_BATCH)).values()
        found[name] = {"exact": round(result.exact, 4), "character_error": round(result.character_error, 4)}
    return found


def _print_tasks(report: dict[str, Any], log: Any) -> None:
    """Training and held-out scores, a line a task."""
    _say(log, f"{'task':14}{'loss':>7}{'tokens right':>14}{'held-out':>10}{'char. error':>13}")
    for name in dict.fromkeys((*report["tasks"], *report["held_out"])):
        seen, asked = report["tasks"].get(name), report["held_out"].get(name)
        left = f"{seen['loss']:7.3f}{seen['right']:14.3f}" if seen else " " * 21
        _say(log, f"{name:14}{left}" + (f"{asked['exact']:10.3f}{asked['character_error']:13.3f}" if asked else ""))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vlprune.eval.smol.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", type=Path, required=True, help="a folder of vlprune.eval.smol.bundle")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--total", type=float, help="seconds of the whole training")
    length.add_argument("--steps", type=int, help="of the whole training")
    parser.add_argument("--seconds", type=float, help="within which this command ends")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--names", type=float, default=Recipe.names_weight, help="weight of the names of patches")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="drawing processes")
    parser.add_argument("--questions", type=int, default=64, help="asked of each held-out task at the end")
    o = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    clock = Clock(o.steps, o.total)
    until = None if o.seconds is None else clock.created + o.seconds - RESERVE
    language = Language.open(o.bundle / LANGUAGE)
    bank, held_out = (Bank.open(split, o.bundle / BANK) for split in ("train", "held-out"))
    recipe = Recipe(batch=o.batch, names_weight=o.names)
    train(o.out, clock, language, bank, held_out, recipe=recipe, seed=o.seed, workers=o.workers, resume=o.resume,
          until=until, questions=o.questions)  # fmt: skip


if __name__ == "__main__":
    main()
