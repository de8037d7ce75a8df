"""What happened in the last prefill: counts, kept tokens, scores, bytes and times."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlprune.context import Grid


@dataclass(eq=False)
class ItemTrace:
    """One image at one stage. Tensors stay where they were made until somebody looks."""

    row: int  # batch row
    picture: int  # number among the pictures of the row
    grid: Grid
    tokens: int  # entering the stage
    kept: int
    chosen: Tensor | None = None  # [kept] which of the tokens stay, ascending; None: all
    scores: Tensor | None = None  # [tokens] float32
    places: Tensor | None = None  # [tokens] positions in the prompt; None: none of the picture has gone yet
    start: int = 0  # position of the picture's first token

    @property
    def cells(self) -> Tensor | None:
        """[tokens] cells of the grid the scores belong to; None: all, in order."""
        return None if self.places is None else self.places - self.start

    @property
    def index(self) -> Tensor | None:
        """[kept] cells of the grid that stay, ascending; None: all."""
        cells = self.cells
        if cells is None or self.chosen is None:
            return self.chosen if cells is None else cells
        return cells[self.chosen]

    def cells_kept(self) -> list[int]:
        index = self.index
        return list(range(self.tokens)) if index is None else [int(i) for i in index.tolist()]


@dataclass(eq=False)
class StageTrace:
    stage: str
    pruner: str
    items: list[ItemTrace] = field(default_factory=list)
    clocks: list[Any] = field(default_factory=list)  # milliseconds or pairs of device events; one a layer at "cache"

    @property
    def milliseconds(self) -> float:
        """Time of choosing and gathering."""
        self.clocks = [_elapsed(c) for c in self.clocks]
        return float(sum(self.clocks))

    @property
    def tokens(self) -> int:
        return sum(i.tokens for i in self.items)

    @property
    def kept(self) -> int:
        return sum(i.kept for i in self.items)


@dataclass(eq=False)
class Trace:
    """The last prefill that held pictures.

    prompt: logical tokens of the longest row; visual: visual tokens of the batch before pruning; layer_tokens[k]:
    visual tokens of the batch in decoder layer k.
    """

    plan: str
    family: str
    prompt: int = 0
    rows: int = 1
    visual: int = 0
    text: int = 0  # text tokens of the batch
    layer_tokens: list[int] = field(default_factory=list)
    kv_bytes_per_token: int = 0  # of one layer: keys and values
    stages: list[StageTrace] = field(default_factory=list)
    pictures: list[ItemTrace] = field(default_factory=list)  # what entered, untouched

    @property
    def kept(self) -> int:
        """Visual tokens of the batch that the last layer sees."""
        return self.layer_tokens[-1] if self.layer_tokens else self.visual

    @property
    def layer_average(self) -> float:
        """Visual tokens a layer sees on average: the number papers quote beside the final count."""
        return sum(self.layer_tokens) / max(1, len(self.layer_tokens))

    @property
    def kv_bytes(self) -> int:
        """Keys and values of the prompt, visual and text, over all layers."""
        return self.kv_bytes_per_token * (sum(self.layer_tokens) + self.text * len(self.layer_tokens))

    @property
    def kv_bytes_unpruned(self) -> int:
        return self.kv_bytes_per_token * (self.visual + self.text) * len(self.layer_tokens)

    def cells(self, picture: int = 0, row: int = 0, stage: str | None = None) -> list[int]:
        """Grid cells of a picture that survived `stage` (default: the last), ascending."""
        found = [
            i for s in self.stages if stage in (None, s.stage) for i in s.items if (i.row, i.picture) == (row, picture)
        ]
        if not found:
            found = [i for i in self.pictures if (i.row, i.picture) == (row, picture)]
        if not found:
            raise IndexError(f"no picture {picture} in row {row}; the trace has {len(self.pictures)}")
        return found[-1].cells_kept()

    def draw(self, image: Image.Image, picture: int = 0, row: int = 0, **options: Any) -> Image.Image:
        """The picture with kept tokens clear and dropped ones dimmed; options as in `vlprune.draw.overlay`."""
        from vlprune.draw import overlay

        grid = next(i.grid for i in self.pictures if (i.row, i.picture) == (row, picture))
        return overlay(image, grid, self.cells(picture, row), **options)

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan, "family": self.family, "prompt_tokens": self.prompt, "rows": self.rows,
            "visual_tokens": self.visual, "kept_tokens": self.kept, "layer_average": self.layer_average,
            "layer_tokens": self.layer_tokens, "kv_bytes": self.kv_bytes, "kv_bytes_unpruned": self.kv_bytes_unpruned,
            "stages": [
                {"stage": s.stage, "pruner": s.pruner, "tokens": s.tokens, "kept": s.kept,
                 "milliseconds": round(s.milliseconds, 4),
                 "items": [{"row": i.row, "picture": i.picture, "grid": list(i.grid), "tokens": i.tokens, "kept": i.kept}
                           for i in s.items]}
                for s in self.stages
            ],
        }  # fmt: skip

    def table(self) -> str:
        """A few lines to print."""
        lines = [f"{self.plan}  ({self.family})",
                 f"{'stage':<10} {'pruner':<24} {'tokens':>7} {'kept':>6} {'ms':>8}"]  # fmt: skip
        for s in self.stages:
            lines.append(f"{s.stage:<10} {s.pruner:<24} {s.tokens:>7} {s.kept:>6} {s.milliseconds:>8.2f}")
        saved = 1 - self.kv_bytes / max(1, self.kv_bytes_unpruned)
        lines.append(f"visual tokens {self.visual} -> {self.kept}, layer average {self.layer_average:.1f}, "
                     f"KV {self.kv_bytes / 2**20:.2f} MiB (-{saved:.0%})")  # fmt: skip
        return "\n".join(lines)


def _elapsed(clock: Any) -> float:
    if isinstance(clock, tuple):
        start, end = clock
        end.synchronize()
        return float(start.elapsed_time(end))
    return float(clock)


class Clock:
    """Milliseconds between two points without making the host wait."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.start = self._now()

    def _now(self) -> Any:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        from time import perf_counter

        return perf_counter()

    def stop(self) -> Any:
        end = self._now()
        return (self.start, end) if self.cuda else (end - self.start) * 1e3
