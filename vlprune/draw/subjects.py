"""Pictures and videos of a prompt at one or several stages, laid out on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vlprune.context import Grid
from vlprune.draw import style
from vlprune.draw.overlay import Fate, cells, coverage, covers, hatch, overlay
from vlprune.draw.sheet import Panel, contact, scale, sheet, swatch
from vlprune.errors import SpecError
from vlprune.geometry import Lens, View

Pictures = Image.Image | Sequence[Image.Image | Sequence[Image.Image]]


@dataclass(frozen=True, eq=False)
class Subject:
    """A picture, or the frames of a video, the runs of tokens that show it, and where they lie."""

    frames: tuple[Image.Image, ...]
    views: tuple[View, ...]
    runs: tuple[int, ...]


def subjects(
    images: Pictures, runs: Sequence[tuple[Grid, ...]], video: Sequence[bool], lens: Lens, picture: int = 0
) -> list[Subject]:
    """The pictures and videos of one row of a prompt, each with its runs of tokens.

    Args:
        images: all of the row in the prompt's order, or a single one; a list of frames stands for a video.
        runs: the grids of each run of the row. video: which of the runs show videos.
        picture: the run of a single picture, where pictures have one each.
    Raises:
        SpecError: these are not the pictures of the row.
    """
    given: list[Any] = [images] if isinstance(images, Image.Image) else list(images)
    still = [isinstance(one, Image.Image) for one in given]
    if runs and all(video) and all(still):  # a flat list of frames, where nothing but a video is there
        given, still = [given], [False]
    if not given or not 0 <= picture < len(runs):
        raise SpecError(
            f"this row has {len(runs)} runs of visual tokens; {len(given)} pictures were given, from {picture}"
        )
    numbers = list(range(len(runs)))
    if still == [True] and lens.count(given[0].size) == 1:
        numbers = [picture]
    elif picture:
        raise SpecError("a number fits a single picture of a family without tiles; pass all pictures of the prompt")
    flat, filmed = [k for k in numbers if not video[k]], [k for k in numbers if video[k]]
    films = [one for one, alone in zip(given, still, strict=True) if not alone]
    lengths = [len(filmed) // len(films) if filmed else len(film) for film in films]
    sizes = [one.size for one, alone in zip(given, still, strict=True) if alone]
    counts = lens.share(sizes, len(flat) - (0 if filmed else sum(lengths))) if sizes else []
    out = []
    for one, alone in zip(given, still, strict=True):
        queue, length = (flat, counts.pop(0)) if alone else (filmed or flat, lengths.pop(0))
        mine, queue[:length] = tuple(queue[:length]), []
        if not mine or len(mine) < length:
            raise SpecError(f"this row has {len(runs)} runs of visual tokens, too few for these pictures and videos")
        grids, frames = [runs[k] for k in mine], (one,) if alone else tuple(one)
        views = lens.views(one.size, grids) if alone else lens.film(frames[0].size, len(frames), grids)
        out.append(Subject(frames, views, mine))
    return out


@dataclass(frozen=True, eq=False)
class Moment:
    """What had become of every run when one stage was through."""

    title: str
    fates: Sequence[Fate]

    def of(self, subject: Subject) -> list[Fate]:
        return [self.fates[run] for run in subject.runs]


def draw(subjects: Sequence[Subject], moments: Sequence[Moment], show: str, labels: bool) -> Image.Image:
    """A column for each moment, a row for each view of each subject; one moment alone has its views side by side."""
    rows = [[[_panel(s, v, m, show) for m in moments] for v in s.views] for s in subjects]
    if len(moments) > 1:
        flat = [row for views in rows for row in views]
        return sheet(flat, [m.title for m in moments], _names(subjects), legend=_legend(subjects, show))
    lines = [[row[0] for row in views] for views in rows]
    if len(lines) == 1 and len(subjects[0].frames) > 1:
        return contact(lines[0], _legend(subjects, show))
    if not labels and len(lines) == 1 and len(lines[0]) == 1:
        return lines[0][0].image
    names = [f"picture {i}" for i in range(1, len(subjects) + 1)] if len(subjects) > 1 else []
    return sheet(lines, [moments[0].title] if moments[0].title else (), names, legend=_legend(subjects, show))


def _panel(subject: Subject, view: View, moment: Moment, show: str) -> Panel:
    image, fates = subject.frames[view.frame], moment.of(subject)
    tokens, kept, hidden = coverage(view, fates, image.size)
    note = f"{kept} of {tokens} kept, {kept / tokens:.1%}" + (f"; {hidden} on padding" if hidden else "")
    title = view.name if len(subject.views) > 1 else ""
    return Panel(overlay(image, view, fates, show), title, note)


def _names(subjects: Sequence[Subject]) -> list[str]:
    if len(subjects) == 1:
        return []
    return [f"picture {i}" for i, s in enumerate(subjects, 1) for _ in s.views]


def _legend(subjects: Sequence[Subject], show: str) -> list[Panel]:
    entries = _entries(show)
    if not all(covers(cells(view, s.frames[0].size), s.frames[0].size) for s in subjects for view in s.views):
        entries.append(Panel(hatch(swatch(style.PAPER), 4), note="seen by no token"))
    return entries


def _entries(show: str) -> list[Panel]:
    stays = Panel(swatch(style.PAPER, style.KEPT), note="kept")
    gone = Panel(swatch(style.FADED), note="dropped")
    if show in ("score", "rank"):
        words = "score, low to high" if show == "score" else "rank, last to first"
        return [Panel(scale(), note=words), Panel(swatch(style.SCALE[1], style.PAPER), note="kept")]
    if show == "merge":
        return [stays, gone, Panel(swatch(style.GROUPS[0]), note="merged, into the rim of its colour")]
    return [stays, gone]
