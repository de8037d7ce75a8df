"""One forward pass: what it was given, what it still holds, what was seen on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlprune.engine.adapter import Item
from vlprune.engine.kept import Layout
from vlprune.engine.tap import Seen
from vlprune.engine.vision import Tape
from vlprune.trace import Trace

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Visual:
    """One item of this chunk, in prompt order."""

    row: int
    item: int  # number within the chunk
    start: int  # chunk-local logical position of its first token
    info: Item
    tape: Tape
    source: int  # its number on the tape
    picture: int  # its number among the pictures of the prompt

    @property
    def tokens(self) -> int:
        return self.info.length


@dataclass(eq=False)
class Run:
    length: int = 0  # T of this chunk
    past: int = 0  # logical tokens already in the cache
    prompt: list[list[tuple[int, int]]] = field(
        default_factory=list
    )  # per row, runs of (kind, length); see read_prompt
    has_visual: bool = False
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
    clocks: list[Any] = field(default_factory=list)  # of the evictions
    done: set[int] = field(default_factory=set)  # steps that ran
    ahead: bool = False  # an attention module is being asked for its queries and keys alone
    trace: Trace | None = None
    fixation: Any = None  # decode step: the choice made at the last focal layer of this step

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


class Runs(threading.local):
    """The forward pass under way, the last trace, what the caller told: per thread, one model may serve several."""

    def __init__(self) -> None:
        self.now: Run | None = None
        self.last: Trace | None = None
        self.tapes: dict[str, Tape] = {}  # of the pictures handed to the model, on their way to its core
        self.sizes: list[tuple[int, int]] | None = None  # (width, height) of the pictures the model is given

    def __deepcopy__(self, memo: Any) -> Runs:
        return Runs()

    def __reduce__(self) -> Any:
        return Runs, ()


def read_prompt(run: Run, ids: Tensor | None, embeds: Tensor | None, mask: Any, visual_ids: list[int],
                table: Callable[[Tensor], Tensor]) -> None:  # fmt: skip
    """Note the kind of every token: -1 padding, 0 text, 1 + n a placeholder of the n-th modality.

    The one place where the host waits for the device, once per prefill.
    """
    source: Any = ids if ids is not None else embeds
    kinds = torch.zeros(source.shape[:2], dtype=torch.int8, device=source.device)
    if ids is None:  # the caller embedded the prompt: the same test as the library's own placeholder mask
        rows = table(torch.tensor(visual_ids, device=source.device))
    for k, token in enumerate(visual_ids):
        found = ids == token if ids is not None else (source == rows[k]).all(-1)
        kinds = kinds.masked_fill(found, k + 1)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        kinds = kinds.masked_fill(mask[:, -run.length :].to(kinds.device) == 0, -1)
    for row in kinds.cpu():
        kind, length = row.unique_consecutive(return_counts=True)
        run.prompt.append(list(zip(kind.tolist(), length.tolist(), strict=True)))
    run.has_visual = any(kind > 0 for runs in run.prompt for kind, _ in runs)
