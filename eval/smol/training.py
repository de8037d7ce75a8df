"""Train smol-llava's tower and projector behind the frozen language model.

    python -m vlprune.eval.smol.training --out RUN --seconds 900                # one GPU, 15 cores
    python -m vlprune.eval.smol.training --out RUN --seconds 900 --stop 400     # leaves its state in RUN ...
    python -m vlprune.eval.smol.training --out RUN --seconds 900 --resume       # ... from which another run goes on

The tower starts from tiny-llava's. Pictures are drawn while training (`pictures.training_sample` holds the mixture) from
the bank of `vlprune.eval.smol.sources`; SmolLM2 comes from its package, or from --gguf. Sample i is a function of the
bank, the seed and i. With --steps the whole run is a function of the step; with --seconds the learning rate and the
difficulty of the pictures follow the clock.

RUN holds the state in parts of at most 12 MiB, log.txt, and at the end tower.safetensors and tower.json: what
`vlprune.eval.smol.assemble` makes a checkpoint of.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlprune.errors import VlpruneError
from vlprune.eval.files import output_folder, write
from vlprune.eval.tiny.optimizer import Muon, orthogonalise
from vlprune.eval.tiny.train import Clock, Schedule

from .assemble import save_tower
from .language import TEXT_TOKENS, Codec, Language
from .net import CONFIG, Decoder, Eyes, fit_scale, warm
from .objective import STATISTICS, Heads, losses
from .pictures import training_sample
from .sources import Bank

PART = 12 * 2**20  # bytes of a part of the state
SAVE_SECONDS = 60
LOG_STEPS = 100
WARM_STEPS = 3  # compiled within these; the clock starts after them
STATE = "state.json"
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe(Schedule):
    """Hyper-parameters. Shares are of the whole run."""

    batch: int = 64
    muon_lr: float = 2e-3  # matrices of the tower's layers and of the projector
    adam_lr: float = 1e-3  # everything else
    warmup: int = 100  # steps
    decay: float = 0.6  # last share, over which the learning rate falls to zero
    ramp: float = 0.25  # first share, over which pictures become as hard as they get
    scene_weight: float = 2.5  # of an answer token about a scene, against one that was read
    patch_weights: tuple[float, float] = (0.5, 0.1)  # weight of the dense labels until 0.3 and from 0.65 on
    contents_weight: float = 0.5


# ---- samples


class Samples(Dataset[dict[str, Any]]):
    """Sample number i, without end. `difficulty` is shared with the processes that draw."""

    def __init__(self, codec: Codec, bank: Bank, seed: int, recipe: Recipe, steps: int | None) -> None:
        self.codec, self.bank, self.seed, self.recipe, self.steps = codec, bank, seed, recipe, steps
        self.difficulty = multiprocessing.Value("d", 0.0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.steps is None:
            difficulty = float(self.difficulty.value)
        else:
            difficulty = self.recipe.difficulty(index // self.recipe.batch / self.steps)
        picture, turns = training_sample(f"{self.seed}/{index}", self.bank, difficulty)
        ids, marks = np.empty(TEXT_TOKENS, np.int32), np.empty(TEXT_TOKENS, np.uint8)
        self.codec.pack(turns, ids, marks)
        return {"pixels": picture.pixels, "labels": picture.labels.reshape(5, -1), "ids": ids, "marks": marks}


def batches(samples: Samples, start: int, workers: int, device: torch.device) -> Iterator[Batch]:
    """Batches `start`, `start + 1`, ... on the device."""
    size = samples.recipe.batch
    loader = DataLoader(
        samples, size, sampler=itertools.count(start * size), num_workers=workers,  # type: ignore[arg-type]
        pin_memory=device.type == "cuda", prefetch_factor=2 if workers else None, worker_init_fn=_one_thread,
    )  # fmt: skip
    for batch in loader:
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


# ---- training


class Trainer:
    """Tower, projector and heads under training: one step at a time, and the whole state on disk."""

    def __init__(
        self, recipe: Recipe, decoder: Decoder, codec: Codec, clock: Clock, seed: int, device: torch.device
    ) -> None:
        self.recipe, self.decoder, self.clock, self.seed, self.device = recipe, decoder, clock, seed, device
        self.step_number = 0
        torch.manual_seed(seed)
        self.eyes, self.heads = Eyes(CONFIG), Heads(CONFIG)
        warm(self.eyes)
        self.eyes.to(device)
        self.heads.to(device)
        self.prefix = torch.tensor(codec.prefix, device=device)
        matrices = self.eyes.matrices()
        inside = {id(p) for p in matrices}
        self.others = [p for p in self.eyes.parameters() if id(p) not in inside] + list(self.heads.parameters())
        self.muon = Muon(matrices)
        gpu = device.type == "cuda"
        self.adam = torch.optim.AdamW(self.others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=gpu)
        if gpu:
            self.eyes.compile_layers()
            self.decoder.compile()
            self.muon.orthogonalise = torch.compile(orthogonalise, dynamic=False)

    def step(self, batch: Batch) -> Tensor:
        """One update; returns the STATISTICS."""
        step, recipe, progress = self.step_number, self.recipe, self.clock.progress(self.step_number)
        if step == 0:
            fit_scale(self.eyes, self.decoder, batch["pixels"])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            answers, patches, contents, statistics = losses(
                self.eyes, self.heads, self.decoder, self.prefix, batch, recipe.scene_weight
            )
        loss = answers + recipe.patch_weight(progress) * patches + recipe.contents_weight * contents
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        rate = recipe.learning_rate(step, progress)
        self.muon.step(recipe.muon_lr * rate)
        self.adam.param_groups[0]["lr"] = recipe.adam_lr * rate
        self.adam.step()
        self.eyes.zero_grad()
        self.heads.zero_grad()
        self.step_number += 1
        return statistics

    # ---- on disk

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that changes in training, by name."""
        found = {f"eyes.{name}": value for name, value in self.eyes.state_dict().items()}
        found |= {f"heads.{name}": value for name, value in self.heads.state_dict().items()}
        found |= {f"muon.{i}": buffer for i, buffer in enumerate(self.muon.buffers)}
        for i, state in self.adam.state_dict()["state"].items():
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
                 "recipe": asdict(self.recipe), "parts": names}  # fmt: skip
        write(out / STATE, json.dumps(state) + "\n")
        for old in set(out.glob("part-*.safetensors")) - {out / name for name in names}:
            old.unlink()

    def load(self, out: Path, state: dict[str, Any]) -> None:
        stored = {name: value for part in state["parts"] for name, value in load_file(out / part).items()}

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}

        self.eyes.load_state_dict(under("eyes."))
        self.heads.load_state_dict(under("heads."))
        for i, buffer in enumerate(self.muon.buffers):
            buffer.copy_(stored[f"muon.{i}"])
        adam = self.adam.state_dict()
        numbers = {int(name.split(".")[0]) for name in under("adam.")}
        adam["state"] = {i: under(f"adam.{i}.") for i in sorted(numbers)}
        self.adam.load_state_dict(adam)
        self.step_number, self.clock.before = state["step"], state["progress"]


def train(
    out: Path,
    clock: Clock,
    language: Language,
    bank: Bank,
    *,
    recipe: Recipe | None = None,
    seed: int = 1,
    workers: int = 0,
    resume: bool = False,
    stop: float | None = None,
) -> Eyes:
    """Train to the end of the clock, or for `stop` seconds of it.

    Raises:
        VlpruneError: `out` holds a state and resume is False, or the other way round, or its seed or recipe differs.
    """
    recipe = recipe or Recipe()
    state = _resumable(out, resume, seed, recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec = Codec(language.tokenizer)
    samples = Samples(codec, bank, seed, recipe, clock.steps)
    stream = batches(samples, state["step"] if state else 0, workers, device)
    decoder = Decoder(language.model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    trainer = Trainer(recipe, decoder, codec, clock, seed, device)
    if state:
        trainer.load(out, state)
    with (out / "log.txt").open("a") as log:
        _loop(trainer, samples, stream, out, log, None if stop is None else clock.created + stop)
    trainer.save(out)
    if clock.progress(trainer.step_number) >= 1:
        about = {"seed": seed, "steps": trainer.step_number, "samples": trainer.step_number * recipe.batch}
        save_tower(trainer.eyes, out, about | {"recipe": asdict(recipe)})
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


def _loop(
    trainer: Trainer, samples: Samples, stream: Iterator[Batch], out: Path, log: Any, until: float | None
) -> None:
    clock, first, recent = trainer.clock, trainer.step_number, list[Tensor]()
    saved = began = time.monotonic()
    while (progress := clock.progress(trainer.step_number)) < 1 and (until is None or time.monotonic() < until):
        samples.difficulty.value = trainer.recipe.difficulty(progress)
        recent.append(trainer.step(next(stream)))
        step, now = trainer.step_number, time.monotonic()
        if step == first + WARM_STEPS:
            if trainer.device.type == "cuda":
                torch.cuda.synchronize()
            print(f"compiled after {now - began:.0f} s", flush=True)
            clock.start()
        if step % LOG_STEPS == 0:
            means = torch.stack(recent).nanmean(0).tolist()  # a small batch may hold no answer of one kind
            values = "  ".join(f"{name} {value:.3f}" for name, value in zip(STATISTICS, means, strict=True))
            line = f"{progress:5.1%}  step {step}  {now - began:.0f} s  {values}"
            print(line, flush=True)
            print(line, file=log, flush=True)
            recent = []
        if now - saved > SAVE_SECONDS:
            trainer.save(out)
            saved = time.monotonic()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vlprune.eval.smol.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--seconds", type=float, help="wall time of the whole training")
    length.add_argument("--steps", type=int)
    parser.add_argument("--stop", type=float, help="end this process after so many seconds, its state on disk")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--bank", type=Path, help="default: what vlprune.eval.smol.sources wrote")
    parser.add_argument("--gguf", type=Path, help="the language model's file; default: the installed package's")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="drawing processes")
    o = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    clock = Clock(o.steps, o.seconds)
    train(o.out, clock, Language.open(o.gguf), Bank.open("train", o.bank), recipe=Recipe(batch=o.batch), seed=o.seed,
          workers=o.workers, resume=o.resume, stop=o.stop)  # fmt: skip


if __name__ == "__main__":
    main()
