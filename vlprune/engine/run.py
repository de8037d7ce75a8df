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
    tape: Tape | None
    source: int  # its number on the tape
    picture: int  # its number among the pictures of the prompt

    @property
    def tokens(self) -> int:
        return self.info.length


@dataclass(eq=False)
class Run:
    length: int = 0  # T of this chunk
    past: int = 0  # logical tokens already in the cache
    kinds: list[list[int]] | None = None  # [B][T] 0 text, 1 + modality; None in a decode step
    valid: list[list[bool]] = field(default_factory=list)  # [B][T] not padding
    has_visual: bool = False
    encoder_outputs: Any = None
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
    done: set[int] = field(default_factory=set)  # steps that ran
    trace: Trace | None = None

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
    """The forward pass under way and the last trace, per thread: one wrapped model may serve several."""

    def __init__(self) -> None:
        self.now: Run | None = None
        self.last: Trace | None = None

    def __deepcopy__(self, memo: Any) -> Runs:
        return Runs()

    def __reduce__(self) -> Any:
        return Runs, ()


def read_prompt(run: Run, ids: Tensor | None, embeds: Tensor | None, mask: Any, visual_ids: list[int],
                table: Callable[[Tensor], Tensor]) -> None:  # fmt: skip
    """Find the visual tokens. The one place where the host waits for the device, once per prefill."""
    if ids is not None:
        kinds = torch.zeros_like(ids)
        for k, token in enumerate(visual_ids):
            kinds = torch.where(ids == token, k + 1, kinds)
    else:  # the caller embedded the prompt: the same test as the library's own placeholder mask
        assert embeds is not None
        rows = table(torch.tensor(visual_ids, device=embeds.device))
        same = (embeds[:, :, None] == rows).all(-1)  # [B, T, modalities]
        kinds = (same * torch.arange(1, len(visual_ids) + 1, device=embeds.device)).amax(-1)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        kinds = torch.where(mask[:, -run.length :].to(kinds.device) != 0, kinds, -1)
    run.kinds = kinds.tolist()
    run.valid = [[k >= 0 for k in row] for row in run.kinds]
    run.has_visual = any(k > 0 for row in run.kinds for k in row)
