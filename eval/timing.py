"""Clocks for device code: marks that do not disturb the stream, repeated runs, medians with percentiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from vlprune.api import adapter_of
from vlprune.releases import CACHE


@dataclass(frozen=True)
class Spread:
    """Median and 20th and 80th percentile of repeated measurements, in the unit of the samples."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        if len(samples) == 1:
            return Spread(samples[0], samples[0], samples[0])
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return Spread(statistics.median(samples), fifths[0], fifths[3])


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(eq=False)
class Marks:
    """Named points in time: device events on a GPU, so that nothing waits between them; the host's clock elsewhere."""

    device: torch.device
    points: dict[str, Any] = field(default_factory=dict)

    def set(self, name: str) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.points[name] = event
        else:
            self.points[name] = time.perf_counter()

    def milliseconds(self, start: str, end: str) -> float:
        """Between two points that were set; waits for the device."""
        if self.device.type != "cuda":
            return float(self.points[end] - self.points[start]) * 1e3
        self.points[end].synchronize()
        return float(self.points[start].elapsed_time(self.points[end]))


@contextmanager
def vision_marks(tower: nn.Module, projector: nn.Module, marks: Marks) -> Iterator[None]:
    """Set "vision start" when the tower is first entered and "vision end" when tower or projector is last left.

    The projector follows the tower in the LLaVA families and is its last part in the Qwen-VL families.
    """

    def enter(*_: Any) -> None:
        if "vision start" not in marks.points:
            marks.set("vision start")

    def leave(*_: Any) -> None:
        marks.set("vision end")

    handles = [
        tower.register_forward_pre_hook(enter, prepend=True),
        tower.register_forward_hook(leave),
        projector.register_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def decoder_marks(text: nn.Module, marks: Marks) -> Iterator[None]:
    """Set "decoder start" and "decoder end" around the decoder stack, its hooks included."""
    handles = [
        text.register_forward_pre_hook(lambda *_: marks.set("decoder start"), prepend=True),
        text.register_forward_hook(lambda *_: marks.set("decoder end")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure(run: Callable[[], dict[str, float]], repeats: int, warmup: int) -> dict[str, Spread]:
    """Call `run` warmup + repeats times; the spread of every number it returns, over the last `repeats` calls."""
    for _ in range(warmup):
        run()
    samples = [run() for _ in range(repeats)]
    return {name: Spread.of([s[name] for s in samples]) for name in samples[0]}


def prefill(model: Any, inputs: Mapping[str, Any], marks: Marks) -> Any:
    """The model's output for a prompt, with a filled cache; sets "start", "end" and the marks of the vision part."""
    adapter = adapter_of(model)
    cache = DynamicCache(config=model.config.get_text_config())
    synchronise(marks.device)
    with vision_marks(adapter.tower, adapter.projector, marks), decoder_marks(adapter.text, marks):
        marks.set("start")
        out = model(**inputs, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        marks.set("end")
    return out


def prefill_parts(marks: Marks) -> dict[str, float]:
    """Milliseconds of the last `prefill`.

    "vision" is tower and projector, "decoder" the decoder stack with everything pruning does there, "language" all but
    the vision part (so with embedding, placeholder checks and the scatter of features), "prefill" the whole.
    """
    whole, vision = marks.milliseconds("start", "end"), marks.milliseconds("vision start", "vision end")
    decoder = marks.milliseconds("decoder start", "decoder end")
    return {"vision": vision, "decoder": decoder, "language": whole - vision, "prefill": whole}


@dataclass(frozen=True)
class PrefillTimes:
    """Medians in milliseconds."""

    vision: float
    decoder: float
    language: float
    prefill: float


@torch.inference_mode()
def prefill_times(model: Any, inputs: Mapping[str, Any], repeats: int = 5, warmup: int = 1) -> PrefillTimes:
    """How long a prompt takes, as the model is: wrapped or not."""

    def run() -> dict[str, float]:
        marks = Marks(model.device)
        prefill(model, inputs, marks)
        return prefill_parts(marks)

    return PrefillTimes(**{name: spread.median for name, spread in measure(run, repeats, warmup).items()})
