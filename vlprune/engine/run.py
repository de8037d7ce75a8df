"""One forward pass: what it was given, what it still holds, what was seen on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlprune.engine.adapter import Item
from vlprune.engine.kept import Kept, Layout
from vlprune.engine.tap import Seen
from vlprune.engine.vision import Tape
from vlprune.trace import Trace

T = TypeVar("T")
Prompt = list[list[tuple[int, int]]]  # per batch row, runs of (kind, length); see chunk.read_prompt


@dataclass(frozen=True, eq=False)
class Visual:
    """One item of this chunk, in prompt order."""

    row: int
    item: int  # number within the chunk
    start: int  # chunk-local logical position of its first token
    tokens: int
    info: Item
    tape: Tape
    source: int  # its number on the tape
    picture: int  # its number among the pictures of the prompt


@dataclass(eq=False)
class Run:
    length: int = 0  # T of this chunk
    past: int = 0  # logical tokens already in the cache
    reading: Callable[[], Prompt] = list  # the kinds of the chunk's tokens, on their way to the host
    device: torch.device | None = None  # where the prompt lies
    has_visual: bool = False  # it holds pictures, and their tapes are here
    tapes: dict[str, Tape] = field(default_factory=dict)
    visuals: list[Visual] = field(default_factory=list)
    opened: Layout | None = None  # slots of this chunk before any stage; None until first looked at
    layout: Layout | None = None  # current slots
    layouts: dict[int, Layout] = field(default_factory=dict)  # layer where it began -> layout
    shift: Tensor | None = None  # [B] removed, compact positions only
    kv_offset: dict[bool, int] = field(default_factory=dict)  # is_sliding -> first column of the mask the model built
    seen: dict[int, Seen] = field(default_factory=dict)  # decoder layer -> its attention call
    embeddings: Tensor | None = None  # [B, T, D] input of layer 0
    cache: Any = None
    memo: dict[Any, Any] = field(default_factory=dict)
    left: dict[int, int] = field(default_factory=dict)  # layer -> visual tokens its cache holds after an eviction
    visual_left: dict[int, Tensor] = field(default_factory=dict)  # layer -> them, where an eviction takes any token
    clocks: list[Any] = field(default_factory=list)  # of the evictions
    done: set[int] = field(default_factory=set)  # steps that ran
    ahead: bool = False  # an attention module is being asked for its queries and keys alone
    batches: dict[int, Any] = field(default_factory=dict)  # step -> the items it will ask for, known in advance
    records: list[Any] = field(default_factory=list)  # what the trace will tell of each stage
    trace: Trace | None = None  # once the prefill is through
    fixation: Any = None  # decode step: the choice made at the last focal layer of this step

    @cached_property
    def prompt(self) -> Prompt:
        """Waits for the host's copy of the token kinds."""
        return self.reading()

    @property
    def placeholders(self) -> bool:
        """Whether any token stands for a picture."""
        return any(kind > 0 for runs in self.prompt for kind, _ in runs)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Layers between two stages share one mask, one position table, one kept set."""
        if key not in self.memo:
            self.memo[key] = make()
        value: T = self.memo[key]
        return value

    @property
    def shortened(self) -> Layout | None:
        """The layout if tokens are gone, else None."""
        return self.layout if self.layout is not None and self.layout.index is not None else None

    def at(self, layer: int) -> Layout | None:
        """The shortened layout in force in `layer`."""
        begun = max((k for k in self.layouts if k <= layer), default=None)
        return None if begun is None else self.layouts[begun]


class Reached(Exception):
    """The forward pass has come to layer `Runs.until` and ends here; what the layer was about to be called with."""

    def __init__(self, hidden: Tensor, arguments: dict[str, Any], kept: Kept | None) -> None:
        super().__init__()
        self.hidden, self.arguments, self.kept = hidden, arguments, kept


class Runs(threading.local):
    """The forward pass under way, the last trace, what the caller told: per thread, one model may serve several."""

    def __init__(self) -> None:
        self.now: Run | None = None
        self.last: Trace | None = None
        self.tapes: dict[str, Tape] = {}  # of the pictures handed to the model, on their way to its core
        self.sizes: list[tuple[int, int]] | None = None  # (width, height) of the pictures the model is given
        self.guide: list[Tensor] | None = None  # [N] scores of these pictures
        self.until: int | None = None  # the decoder layer that is not to be run any more
        self.recording = False  # the trace keeps every choice of a per-step pruner

    @property
    def told(self) -> tuple[list[tuple[int, int]] | None, list[Tensor] | None]:
        """What the caller told about the pictures."""
        return self.sizes, self.guide

    def __deepcopy__(self, memo: Any) -> Runs:
        return Runs()

    def __reduce__(self) -> Any:
        return Runs, ()
