"""Asking a model the questions of one task: suites of our own directly, any other task through lmms-eval."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

import vlprune
from vlprune.api import adapter_of
from vlprune.errors import PruningError, SpecError, VlpruneError, nearest
from vlprune.eval.published import BENCHMARKS
from vlprune.eval.suites import SUITES, Suite, find, majority_answer
from vlprune.eval.timing import Marks, prefill
from vlprune.eval.tiny import Item
from vlprune.eval.tiny.evaluate import generate, prompt
from vlprune.releases import CACHE

PROBES = 3  # items whose prefill is timed
Tick = Callable[[int], None]  # told how many more items are answered


@dataclass(frozen=True)
class Answers:
    """What one plan answered on one task, and what that took."""

    outputs: list[str]
    scores: list[float]  # per item, higher is better
    value: float  # the task's own headline number
    visual: float  # visual tokens a prompt before pruning
    kept: float  # in the last layer
    layer_average: float
    kv_bytes: float  # of a prompt
    latency_ms: float  # of an answer, prompts run in batches
    prefill_ms: float | None  # of a prompt alone; None: not timed


class Task(Protocol):
    """Questions with a score for each answer."""

    @property
    def name(self) -> str: ...

    def size(self) -> int: ...

    def run(self, model: Any, processor: Any, batch: int, tick: Tick) -> Answers: ...

    def notes(self) -> list[str]: ...


@dataclass(eq=False)
class SuiteTask:
    """The first `count` items of a suite."""

    suite: Suite
    count: int
    seed: int
    prepared: tuple[int, list[tuple[list[Item], Any]]] | None = None

    @property
    def name(self) -> str:
        return self.suite.name

    @cached_property
    def items(self) -> list[Item]:
        return self.suite.draw(self.count, self.seed)

    def size(self) -> int:
        return self.count

    def _batches(self, processor: Any, batch: int) -> list[tuple[list[Item], Any]]:
        """Items with their prompts; drawn and processed once for all the plans of a comparison."""
        if self.prepared is None or self.prepared[0] != batch:
            parts = [self.items[at : at + batch] for at in range(0, len(self.items), batch)]
            self.prepared = batch, [(part, prompt(processor, part)) for part in parts]
        return self.prepared[1]

    def run(self, model: Any, processor: Any, batch: int, tick: Tick) -> Answers:
        outputs: list[str] = []
        batches = self._batches(processor, batch)
        kept = average = 0.0
        plan = current_plan(model)
        started = time.perf_counter()
        for part, inputs in batches:
            outputs += generate(model, processor, part, inputs.copy())
            if plan is not None:
                trace = vlprune.trace(model)
                kept, average = kept + trace.kept, average + trace.layer_average
            tick(len(part))
        seconds = time.perf_counter() - started
        n = len(self.items)
        scores = [self.suite.score(output, item.answer) for output, item in zip(outputs, self.items, strict=True)]
        visual, kv_bytes, prefill_ms = self._probe(model, processor)
        if plan is None:
            kept = average = visual * n
        return Answers(outputs, scores, sum(scores) / n, visual, kept / n, average / n, kv_bytes, seconds * 1e3 / n,
                       prefill_ms)  # fmt: skip

    @torch.inference_mode()
    def _probe(self, model: Any, processor: Any) -> tuple[float, float, float]:
        """A few items run alone: mean visual tokens, mean bytes that the cache holds, median milliseconds of the prefill."""
        ids = torch.tensor(list(adapter_of(model).visual_ids.values()), device=model.device)
        visual = held = 0.0
        times = []
        probes = self.items[:PROBES]
        for item in probes:
            inputs, marks = prompt(processor, [item]).to(model.device, model.dtype), Marks(model.device)
            visual += int(torch.isin(inputs["input_ids"], ids).sum())
            layers = prefill(model, inputs, marks)[CACHE].layers
            held += sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))
            times.append(marks.milliseconds("start", "end"))
        return visual / len(probes), held / len(probes), statistics.median(times)

    def notes(self) -> list[str]:
        if self.name != "easy_vqa":
            return []
        majority = majority_answer()
        share = sum(item.answer == majority for item in self.items) / self.count
        return [f"easy_vqa: always saying {majority!r} scores {share:.3f} on these items"]


@dataclass(eq=False)
class HarnessTask:
    """A task of lmms-eval; `count` 0 takes all of its items."""

    name: str
    count: int
    folder: Path  # for files that tasks write
    manager: Any

    def size(self) -> int:
        return self.count

    def run(self, model: Any, processor: Any, batch: int, tick: Tick) -> Answers:
        from lmms_eval.evaluator import simple_evaluate

        from vlprune.eval.lmms_model import Vlprune

        lent = Vlprune.around(model, processor, batch)
        found = simple_evaluate(
            model=lent, model_args="", tasks=[self.name], task_manager=self.manager, limit=self.count or None,
            bootstrap_iters=0, log_samples=True, cli_args=_arguments(self.folder),
        )  # fmt: skip
        samples, metrics = found["samples"][self.name], found["results"][self.name]
        metric = self._metric(samples[0], metrics)
        measured = found["throughput"]
        tick(len(samples))
        return Answers(
            outputs=[str(s["filtered_resps"][0]) for s in samples],
            scores=[_number(s[metric]) for s in samples],
            value=float(metrics[f"{metric},none"]),
            visual=measured["avg_visual_tokens"], kept=measured["avg_kept_visual_tokens"],
            layer_average=measured["avg_visual_tokens_per_layer"], kv_bytes=measured["avg_kv_bytes"],
            latency_ms=measured["avg_latency_ms"], prefill_ms=None,
        )  # fmt: skip

    def _metric(self, sample: dict[str, Any], metrics: dict[str, Any]) -> str:
        """The metric papers print, else the task's first that scores single items."""
        known = BENCHMARKS.get(self.name)
        names = [n.removesuffix(",none") for n in metrics if n.endswith(",none") and "_stderr" not in n]
        for name in [known.metric] if known else names:
            if name in sample and isinstance(metrics.get(f"{name},none"), (int, float)):
                return name
        raise VlpruneError(
            f"{self.name} scores no single items, so methods cannot be compared on it; run it with lmms-eval"
        )

    def notes(self) -> list[str]:
        known = BENCHMARKS.get(self.name)
        return [f"{self.name}: {known.trap}"] if known and known.trap else []


def _number(value: Any) -> float:
    return float(value["score"] if isinstance(value, dict) else value)


def _arguments(folder: Path) -> argparse.Namespace:
    """What tasks look up in lmms-eval's own command line."""
    return argparse.Namespace(output_path=str(folder), process_with_media=False, reasoning_tags=None, verbosity="ERROR")


def current_plan(model: Any) -> vlprune.Plan | None:
    """What the model is wrapped with now."""
    try:
        return vlprune.plan_of(model)
    except PruningError:
        return None


def open_tasks(names: Sequence[str], count: int, seed: int, folder: Path) -> list[Task]:
    """Tasks by name. SpecError for a name that neither the suites nor lmms-eval know."""
    others = [name for name in names if name not in SUITES]
    manager = _manager(others) if others else None
    tasks: list[Task] = []
    for name in names:
        if name in SUITES:
            if count < 1:
                raise SpecError(f"{name} has no end: say how many items")
            tasks.append(SuiteTask(find(name), count, seed))
        else:
            tasks.append(HarnessTask(name, count, folder, manager))
    return tasks


def _manager(names: Sequence[str]) -> Any:
    suites = f"suites: {', '.join(SUITES)}"
    try:
        from lmms_eval.tasks import TaskManager
    except ImportError as error:
        raise SpecError(
            f"no suite is called {', '.join(names)}{nearest(names[0], SUITES)} ({suites}). Other tasks need lmms-eval: "
            "pip install --no-deps lmms-eval==0.7.3"
        ) from error
    manager = TaskManager("ERROR")
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            close = nearest(name, [*SUITES, *known])
            raise SpecError(f"unknown task {name!r}{close} ({suites}; lmms-eval's own: lmms-eval --tasks list)")
    return manager
