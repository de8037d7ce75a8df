"""Train an embedded model on drawn pictures.

    python -m vlprune.eval.tiny.train --out RUN --seconds 480            # one GPU, 15 cores: the shipped quality
    python -m vlprune.eval.tiny.train --out RUN --seconds 480 --resume   # goes on where RUN/checkpoint.pt stands
    python -m vlprune.eval.tiny.train --out RUN --seconds 250 --family qwen --start FOLDER    # from trained weights

Batch s is a function of seed and s; so is everything else that is drawn. With --steps the whole run is a function of
the step, and a resumed run equals an uninterrupted one; with --seconds the learning rate and the difficulty of the
pictures follow the clock, so that the run ends in time on any machine.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlprune.errors import VlpruneError
from vlprune.models import embedded

from . import export
from .codec import Codec
from .data import Batch, Loader, Syllabus, all_sizes, batches, squares
from .net import NetConfig, TinyNet
from .objective import STATISTICS, Objective
from .optimizer import Optimizer
from .qwen import QwenConfig

CHECKPOINT_SECONDS = 60
LOG_STEPS = 200
CONFIGS = {config.family: config for config in (NetConfig, QwenConfig)}
COMPILE_STEPS = 4  # both sequence lengths are compiled within these; the clock starts after them


class Schedule:
    """How a run goes from its start (progress 0) to its end (1)."""

    warmup: int  # steps
    decay: float  # last share, over which the learning rate falls to zero
    ramp: float  # first share, over which pictures become as hard as they get
    patch_weights: tuple[float, float]  # weight of the dense labels until 0.3 and from 0.65 on

    def difficulty(self, progress: float) -> float:
        return min(1.0, progress / self.ramp)

    def learning_rate(self, step: int, progress: float) -> float:
        """Relative to its peak."""
        return min(1.0, (step + 1) / self.warmup) * min(1.0, max(0.0, 1 - progress) / self.decay)

    def patch_weight(self, progress: float) -> float:
        early, late = self.patch_weights
        return late + (early - late) * min(1.0, max(0.0, (0.65 - progress) / 0.35))


@dataclass(frozen=True)
class Recipe(Schedule):
    """Hyper-parameters, for a run from random weights. Shares are of the whole run."""

    batch: int = 256
    muon_lr: float = 4e-3  # matrices of hidden layers
    adam_lr: float = 2e-3  # everything else
    warmup: int = 150  # steps
    decay: float = 0.45  # last share, over which the learning rate falls to zero
    ramp: float = 0.35  # first share, over which pictures become as hard as they get
    scene_weight: float = 2.5  # of an answer token about a scene, against one that was read
    drop: float = 0.15  # share of steps in which the language model sees half of the visual tokens
    patch_weights: tuple[float, float] = (0.5, 0.075)  # weight of the dense labels until 0.3 and from 0.65 on
    contents_weight: float = 0.5


# from trained weights: lower peaks, most of the run spent coming down, dense labels hardly needed
CONTINUED = Recipe(batch=192, muon_lr=2e-3, adam_lr=1e-3, warmup=80, decay=0.8, ramp=0.1, drop=0.1,
                   patch_weights=(0.15, 0.05))  # fmt: skip


class Clock:
    """The share of a run that is over: counted in steps, or in seconds."""

    def __init__(self, steps: int | None = None, seconds: float | None = None) -> None:
        if (steps is None) == (seconds is None):
            raise VlpruneError("a training run needs a length: either steps or seconds")
        self.steps, self.seconds = steps, seconds
        self.created = time.monotonic()
        self.started: float | None = None
        self.before = 0.0  # what an earlier process has done

    def start(self) -> None:
        """Begin to count seconds; what passed since creation is taken off their number."""
        if self.started is None:
            self.started = time.monotonic()

    def progress(self, step: int) -> float:
        if self.steps is not None:
            return step / self.steps
        if self.started is None or self.seconds is None:
            return self.before
        left = max(1e-3, self.seconds - (self.started - self.created))
        return self.before + (time.monotonic() - self.started) / left


class Trainer:
    """A network under training: one step at a time, and its whole state on disk."""

    def __init__(
        self, recipe: Recipe, config: NetConfig, codec: Codec, clock: Clock, seed: int, device: torch.device
    ) -> None:
        self.recipe, self.clock, self.seed, self.device, self.step_number = recipe, clock, seed, device, 0
        torch.manual_seed(seed)
        self.net: TinyNet = export.twin(config).to(device)
        self.objective = Objective(self.net, codec.prefix, recipe.scene_weight).to(device)
        gpu = device.type == "cuda"
        self.optimizer = Optimizer(self.net.hidden_matrices(), (self.net, self.objective), gpu)
        self.generator = torch.Generator(device)
        if gpu and self.net.one_size:  # every other shape would be compiled anew
            self.net.compile_layers()
            self.objective.compile_terms()
            self.optimizer.compile()

    def step(self, batch: Batch) -> Tensor | None:
        """One update. Returns the STATISTICS, or None if the step saw half of the visual tokens."""
        step, recipe, progress = self.step_number, self.recipe, self.clock.progress(self.step_number)
        rng = random.Random(f"{self.seed}/{step}")
        self.generator.manual_seed(rng.getrandbits(32))
        drop = step in (1, 3) if step < COMPILE_STEPS else rng.random() < recipe.drop
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            answers, patches, contents, statistics = self.objective(
                self.net, batch, 0.5 if drop else 1.0, rng.random() < 0.5, self.generator
            )
        loss = answers + recipe.patch_weight(progress) * patches + recipe.contents_weight * contents
        loss.backward()
        rate = recipe.learning_rate(step, progress)
        self.optimizer.step(recipe.muon_lr * rate, recipe.adam_lr * rate)
        self.step_number += 1
        return None if drop else statistics

    def save(self, path: Path) -> None:
        """Write the state; an interrupted write leaves the former file whole."""
        state = {
            "step": self.step_number,
            "progress": self.clock.progress(self.step_number),
            "seed": self.seed,
            "family": self.net.config.family,
            "config": asdict(self.net.config),
            "net": self.net.state_dict(),
            "objective": self.objective.state_dict(),
            "muon": self.optimizer.muon.state_dict(),
            "adam": self.optimizer.adam.state_dict(),
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, state: dict[str, Any]) -> None:
        muon, adam = self.optimizer.muon, self.optimizer.adam
        for part, name in ((self.net, "net"), (self.objective, "objective"), (muon, "muon"), (adam, "adam")):
            part.load_state_dict(state[name])
        self.step_number, self.clock.before = state["step"], state["progress"]


def train(
    out: Path,
    clock: Clock,
    *,
    config: NetConfig | None = None,
    recipe: Recipe | None = None,
    syllabus: Syllabus | None = None,
    start: Path | None = None,
    seed: int = 1,
    workers: int = 0,
    resume: bool = False,
) -> TinyNet:
    """Train to the end of the clock; leaves checkpoint.pt, log.txt and the Hugging Face folder `model` in `out`.

    Args:
        config: sizes and family; default: tiny-llava's.
        recipe: default: `Recipe()`, or CONTINUED with `start`.
        syllabus: the shapes of batches; default: squares for LLaVA, pictures of all sizes for Qwen.
        start: folder of a trained checkpoint to begin from; default: random weights.
    Raises:
        VlpruneError: `out` holds a checkpoint and resume is False, or the other way round, or its seed differs, or
            `start` is a checkpoint of other sizes.
    """
    config = config or NetConfig()
    recipe = recipe or (CONTINUED if start else Recipe())
    syllabus = syllabus or (squares if config.family == "llava" else all_sizes)(recipe.batch)
    codec, checkpoint = Codec(config.family), out / "checkpoint.pt"
    state = _resumable(checkpoint, resume, seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first = state["step"] if state else 0
    loader = Loader(
        codec,
        syllabus,
        seed,
        difficulty=lambda step: recipe.difficulty(clock.progress(step)),
        workers=workers,
        start=first,
    )
    try:
        trainer = Trainer(recipe, config, codec, clock, seed, device)
        if state:
            trainer.load(state)
        elif start:
            export.load(trainer.net, start)
        with (out / "log.txt").open("a") as log:
            _loop(trainer, loader, syllabus, checkpoint, log)
    finally:
        loader.close()
    trainer.save(checkpoint)
    export.save(trainer.net, codec, out / "model")
    return trainer.net


def _resumable(checkpoint: Path, resume: bool, seed: int) -> dict[str, Any] | None:
    if resume != checkpoint.exists():
        found = "there is no checkpoint to resume" if resume else "a run lies there; resume it or choose another folder"
        raise VlpruneError(f"cannot train into {checkpoint.parent}: {found}")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if not resume:
        return None
    state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if state["seed"] != seed:
        raise VlpruneError(f"{checkpoint} was trained with seed {state['seed']}, not {seed}; resume it with that seed")
    return state


def _loop(trainer: Trainer, loader: Loader, syllabus: Syllabus, checkpoint: Path, log: Any) -> None:
    clock, first = trainer.clock, trainer.step_number
    recent: dict[str, list[Tensor]] = {}
    saved = began = time.monotonic()
    stream = batches(loader, trainer.device)
    while (progress := clock.progress(trainer.step_number)) < 1:
        label = syllabus.shape(trainer.seed, trainer.step_number).label
        statistics = trainer.step(next(stream))
        if statistics is not None:
            recent.setdefault(label, []).append(statistics)
        step, now = trainer.step_number, time.monotonic()
        if step == first + COMPILE_STEPS:
            if trainer.device.type == "cuda":
                torch.cuda.synchronize()
            clock.start()
        if step % LOG_STEPS == 0:
            for label, values in sorted(recent.items()):
                means = torch.stack(values).nanmean(0).tolist()  # a small batch may hold no answer of one kind
                losses = "  ".join(f"{name} {value:.3f}" for name, value in zip(STATISTICS, means, strict=True))
                line = f"{progress:5.1%}  step {step}  {now - began:.0f} s  {label:6} {losses}"
                print(line, flush=True)
                print(line, file=log, flush=True)
            recent = {}
        if now - saved > CHECKPOINT_SECONDS:
            trainer.save(checkpoint)
            saved = now


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlprune.eval.tiny.train", description="Train the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--seconds", type=float, help="wall time of the training, compilation included")
    length.add_argument("--steps", type=int)
    parser.add_argument("--family", choices=list(CONFIGS), default="llava")
    parser.add_argument("--start", help="a checkpoint folder, or the name of a shipped one, to train on")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, help="pictures; of all sizes: small ones")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="drawing processes")
    options = parser.parse_args(arguments)
    start = options.start and (Path(options.start) if Path(options.start).is_dir() else embedded(options.start))
    recipe = CONTINUED if start else Recipe()
    train(
        options.out,
        Clock(options.steps, options.seconds),
        config=CONFIGS[options.family](),
        recipe=replace(recipe, batch=options.batch) if options.batch else recipe,
        start=start,
        seed=options.seed,
        workers=options.workers,
        resume=options.resume,
    )


if __name__ == "__main__":
    main()
