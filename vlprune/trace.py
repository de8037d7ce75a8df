"""What happened in the last prefill: counts, kept tokens, scores, bytes and times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from vlprune.context import Grid
from vlprune.draw.overlay import Fate
from vlprune.errors import PruningError, SpecError
from vlprune.geometry import Lens, View
from vlprune.selection import Merge

if TYPE_CHECKING:
    from vlprune.draw.focus import Gazes
    from vlprune.draw.subjects import Pictures, Subject


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
    merge: Merge | None = None  # what the kept tokens absorbed
    grids: tuple[Grid, ...] = ()  # all of them, of what entered
    video: bool = False

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

    def fate(self) -> Fate:
        """For drawing: reads the tensors."""
        numbers = list(range(self.tokens)) if self.cells is None else self.cells.tolist()
        kept = self.cells_kept()
        scores = {} if self.scores is None else dict(zip(numbers, self.scores.tolist(), strict=True))
        merged: dict[int, tuple[float, int]] = {}
        if self.merge is not None:
            entries = zip(self.merge.source.tolist(), self.merge.slot.tolist(), self.merge.weight.tolist(), strict=True)
            for source, slot, weight in entries:
                token = numbers[source]
                merged[token] = max(merged.get(token, (weight, kept[slot])), (weight, kept[slot]))
        alive = frozenset(kept)
        return Fate(alive, scores, {token: into for token, (_, into) in merged.items() if token not in alive})

    def cells_kept(self) -> list[int]:
        index = self.index
        return list(range(self.tokens)) if index is None else [int(i) for i in index.tolist()]


@dataclass(frozen=True, eq=False)
class Look:
    """One choice of a per-step pruner among the tokens of one picture."""

    step: int  # 0: by the prompt's last token; n: while the n-th generated token was read
    layer: int  # the focal layer that chose
    row: int
    picture: int  # counted from the row's last, which is -1; earlier turns' come before this prompt's first
    chosen: Tensor  # [K] which of the tokens
    scores: Tensor | None  # [N] float32
    cells: Tensor | None  # [N] which tokens of the picture these are; None: all, in order

    def fate(self) -> Fate:
        chosen = self.chosen if self.cells is None else self.cells[self.chosen]
        if self.scores is None:
            return Fate(frozenset(chosen.tolist()))
        numbers = range(len(self.scores)) if self.cells is None else self.cells.tolist()
        return Fate(frozenset(chosen.tolist()), dict(zip(numbers, self.scores.tolist(), strict=True)))


@dataclass(eq=False)
class StageTrace:
    stage: str
    pruner: str
    items: list[ItemTrace] = field(default_factory=list)
    clocks: list[Any] = field(default_factory=list)  # milliseconds or pairs of device events; one a layer at "cache"

    @property
    def title(self) -> str:
        """For people: "fastv, before layer 2"."""
        name = self.pruner.partition("@")[0]
        return f"{name}, before layer {self.stage}" if self.stage.isdigit() else f"{name}, {self.stage}"

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
    text_tokens: list[int] | None = (
        None  # of them in each layer's cache, where a rule for all tokens drops text as well
    )
    layer_tokens: list[int] = field(default_factory=list)
    kv_bytes_per_token: int = 0  # of one layer: keys and values
    stages: list[StageTrace] = field(default_factory=list)
    pictures: list[ItemTrace] = field(default_factory=list)  # what entered, untouched
    lens: Lens = field(default_factory=Lens)  # how the family's processor lays tokens over pictures
    looks: list[Look] | None = None  # of a per-step pruner, within `vlprune.recording`

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
        text = self.text * len(self.layer_tokens) if self.text_tokens is None else sum(self.text_tokens)
        return self.kv_bytes_per_token * (sum(self.layer_tokens) + text)

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

    # ---- pictures

    def draw(
        self,
        images: Pictures,
        show: str = "kept",
        *,
        stage: str | None = None,
        picture: int = 0,
        row: int = 0,
        processor: Any = None,
        labels: bool = False,
    ) -> Image.Image:
        """What became of the tokens, on top of the pictures they were made of, at the pictures' own size.

        Args:
            images: the picture, or all pictures of the row in the prompt's order; a list of frames stands for a video.
            show: "kept", "score", "rank" or "merge"; see `vlprune.draw.overlay`.
            stage: as in the plan; default the last; "all" draws every stage beside the others.
            picture: which one of the row a single picture is.
            processor: the model's, where its settings are not the usual ones of the family.
            labels: title, count and legend, which sheets always have.
        Returns:
            one picture of the picture's size; where tiles, stages or pictures stand side by side, a sheet of such. A video
            is a contact sheet.
        Raises:
            SpecError: the pictures are not those of the prompt, or there is no such stage or drawing.
        """
        from vlprune.draw.subjects import Moment, draw

        subjects = self._subjects(images, picture, row, processor)
        stages = self._stages(stage, show)
        moments = [Moment("" if s is None else s.title, self.fates(s, row)) for s in stages]
        return draw(subjects, moments, show, labels)

    def _stages(self, name: str | None, show: str) -> list[StageTrace | None]:
        """The stages to draw; None stands for the prompt before any."""
        if name == "all":
            return list(self.stages) or [None]
        if name is not None:
            found = [s for s in self.stages if s.stage == name]
            if not found:
                raise SpecError(
                    f"nothing ran at stage {name!r}; {self.plan} has {[s.stage for s in self.stages]} and 'all'"
                )
            return [found[-1]]
        wanted = {"score": "scores", "rank": "scores", "merge": "merge"}.get(show)
        ran = [s for s in self.stages if not wanted or any(getattr(i, wanted) is not None for i in s.items)]
        return [ran[-1]] if ran else [self.stages[-1] if self.stages else None]

    def fates(self, stage: StageTrace | None = None, row: int = 0) -> list[Fate]:
        """What had become of each run of the row's tokens after a stage; None: before the first."""
        if stage is None:
            return [Fate(frozenset(range(i.tokens))) for i in self.pictures if i.row == row]
        return [i.fate() for i in stage.items if i.row == row]

    def _subjects(self, images: Pictures, picture: int, row: int, processor: Any) -> list[Subject]:
        from vlprune.draw.subjects import subjects

        lens = self.lens if processor is None else self.lens.read(processor)
        runs = [i for i in self.pictures if i.row == row]
        return subjects(images, [i.grids or (i.grid,) for i in runs], [i.video for i in runs], lens, picture)

    # ---- the way of a per-step pruner

    def gazes(self, picture: int = 0, row: int = 0) -> dict[int, Fate]:
        """Where a picture was looked at while the n-th token was written: the last focal layer's choice of each step.

        Raises:
            PruningError: nothing was recorded.
        """
        if not self.looks:
            raise PruningError("no choice of a per-step pruner was recorded; wrap the model with one, such as fastocr, and "
                               "generate inside `with vlprune.recording(model):`")  # fmt: skip
        number = picture - sum(i.row == row for i in self.pictures)
        steps = {
            look.step: look for look in self.looks if (look.row, look.picture) == (row, number)
        }  # the last layer's
        return {n: steps[n].fate() for n in sorted(steps)}

    def focus(
        self, image: Image.Image, tokens: Sequence[str], *, picture: int = 0, row: int = 0, processor: Any = None
    ) -> list[Image.Image]:
        """Frames of a moving focus over the page, one for each written token; `vlprune.draw.gif` makes a film of them.

        Args:
            tokens: the text of every generated token, as `vlprune.draw.pieces` gives it.
        """
        from vlprune.draw.focus import frames

        return frames(*self._page(image, picture, row, processor), tokens)

    def words(
        self, image: Image.Image, tokens: Sequence[str], *, picture: int = 0, row: int = 0, processor: Any = None
    ) -> Image.Image:
        """A heat map over the page for each written word; tokens as in `focus`."""
        from vlprune.draw.focus import words

        return words(*self._page(image, picture, row, processor), tokens)

    def _page(self, image: Image.Image, picture: int, row: int, processor: Any) -> tuple[Image.Image, View, Gazes]:
        """The page's finest view, and the gazes at each of its runs; a run that was too small to choose from is read whole."""
        (subject,) = self._subjects(image, picture, row, processor)
        everything = self.fates(self.stages[-1] if self.stages else None, row)
        ways = {run: self.gazes(run, row) for run in subject.runs}
        steps = sorted({step for way in ways.values() for step in way})
        gazes = {step: [ways[run].get(step, everything[run]) for run in subject.runs] for step in steps}
        return image, max(subject.views, key=lambda v: sum(len(a.rows) * len(a.columns) for a in v.areas)), gazes

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
        self.device, self.cuda = device, device.type == "cuda"
        self.start = self._now()

    def _now(self) -> Any:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        from time import perf_counter

        return perf_counter()

    def stop(self) -> Any:
        end = self._now()
        return (self.start, end) if self.cuda else (end - self.start) * 1e3
