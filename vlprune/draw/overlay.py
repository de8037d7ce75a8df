"""One picture, and what became of the tokens that lie over it. The pixels of the result are the picture's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw

from vlprune.draw import style
from vlprune.errors import SpecError, nearest
from vlprune.geometry import View

SHOWS = ("kept", "score", "rank", "merge")
DIM = 0.74  # how far dropped tokens fade
HEAT = 0.62  # how much of a heat map is colour, the rest is picture
LINES = 160  # more merged tokens than this are told by colour alone
Box = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Fate:
    """What became of the tokens of one run, by their numbers in it.

    scores: of the tokens a rule ranked; higher stays.
    merged: token -> the kept token that took it in, or most of it.
    """

    kept: frozenset[int]
    scores: Mapping[int, float] = field(default_factory=dict)
    merged: Mapping[int, int] = field(default_factory=dict)


class Cell(NamedTuple):
    run: int
    token: int
    box: Box  # pixels, empty where the token shows padding only

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def seen(self) -> bool:
        return self.box[0] < self.box[2] and self.box[1] < self.box[3]

    @property
    def inside(self) -> Box:
        """The same for PIL's drawing, which counts the last pixel in."""
        return self.box[0], self.box[1], self.box[2] - 1, self.box[3] - 1


def cells(view: View, size: tuple[int, int]) -> Iterator[Cell]:
    """Every token of a view with its pixels: edges rounded, so that neighbours share none and leave none out."""
    for area in view.areas:
        columns, rows = _edges(area.columns, size[0]), _edges(area.rows, size[1])
        for r, (top, bottom) in enumerate(rows):
            for c, (left, right) in enumerate(columns):
                yield Cell(area.run, area.first + r * area.stride + c, (left, top, right, bottom))


def _edges(spans: Sequence[tuple[float, float]], length: int) -> list[tuple[int, int]]:
    return [(min(max(round(a), 0), length), min(max(round(b), 0), length)) for a, b in spans]


def overlay(image: Image.Image, view: View, fates: Sequence[Fate], show: str = "kept") -> Image.Image:
    """A picture with its tokens marked.

    kept: kept tokens exactly as they are, dropped ones faded, a blue line around what stayed.
    score, rank: a heat map, dark is low and last; a white line around what stayed. Ranks are printed where they fit.
    merge: as kept, and each merged token in the colour of the rim that the token which took it in has.

    Args:
        image: any size and mode.
        view: where the tokens lie on it.
        fates: of each run the view shows, by its number.
    Returns:
        RGB, same size. What no token shows is hatched.
    Raises:
        SpecError: no such drawing, or nothing to draw it from.
    """
    if show not in SHOWS:
        raise SpecError(f"there is no drawing called {show!r}{nearest(show, SHOWS)}; draw {', '.join(SHOWS)}")
    image = image.convert("RGB")
    grey = Image.merge("RGB", [image.convert("L")] * 3)
    faded = Image.blend(grey, Image.new("RGB", image.size, style.FADED), DIM)
    placed = [cell for cell in cells(view, image.size) if cell.seen]
    out = _hatched(faded, placed)
    if show in ("score", "rank"):
        _heat(out, grey, placed, fates, show)
    kept = Image.new("L", image.size, 0)
    for cell in placed:
        if cell.token in fates[cell.run].kept:
            kept.paste(255, cell.box)
    if show in ("kept", "merge"):
        out.paste(image, mask=kept)
    _outline(out, kept, style.PAPER if show in ("score", "rank") else style.KEPT)
    if show == "rank":
        _numbers(out, placed, fates)
    if show == "merge":
        _merged(out, grey, placed, fates)
    return out


def covers(placed: Iterable[Cell], size: tuple[int, int]) -> bool:
    """Whether every pixel lies under a token."""
    return sum((c.box[2] - c.box[0]) * (c.box[3] - c.box[1]) for c in placed if c.seen) == size[0] * size[1]


def _hatched(faded: Image.Image, placed: Sequence[Cell]) -> Image.Image:
    """Diagonal lines over what lies under no token."""
    if covers(placed, faded.size):
        return faded
    seen = Image.new("L", faded.size, 0)
    for cell in placed:
        seen.paste(255, cell.box)
    out = hatch(Image.blend(faded, Image.new("RGB", faded.size, style.PAPER), 0.5), max(6, min(faded.size) // 40))
    out.paste(faded, mask=seen)
    return out


def hatch(out: Image.Image, step: int) -> Image.Image:
    """The same picture with diagonal lines on it."""
    pen, width, height = ImageDraw.Draw(out), *out.size
    for x in range(-height, width, step):
        pen.line((x, height, x + height, 0), fill=style.RULE, width=max(1, step // 8))
    return out


def thickness(size: tuple[int, int]) -> int:
    """Of lines on a picture."""
    return max(1, round(min(size) / 320))


def _outline(out: Image.Image, kept: Image.Image, colour: style.Colour) -> None:
    """A line around the kept tokens, on the side of the dropped ones: no kept pixel changes."""
    width = thickness(out.size)
    wide = kept
    for dx, dy in ((width, 0), (0, width)):
        moved = [wide]
        for sign in (-1, 1):
            shift = Image.new("L", out.size, 0)
            shift.paste(wide, (sign * dx, sign * dy))
            moved.append(shift)
        wide = ImageChops.lighter(ImageChops.lighter(moved[0], moved[1]), moved[2])
    out.paste(colour, mask=ImageChops.subtract(wide, kept))


# ---- heat maps


def levels(scores: Sequence[float]) -> tuple[float, float]:
    """The scores that get the first and the last colour: the 2nd and 98th percentile, so that one peak hides nothing."""
    ordered = sorted(s for s in scores if isfinite(s))
    if not ordered:
        return 0.0, 0.0
    last = len(ordered) - 1
    return ordered[round(0.02 * last)], ordered[round(0.98 * last)]


def ranks(fates: Sequence[Fate]) -> dict[tuple[int, int], int]:
    """(run, token) -> 1 for the highest score of all; ties go to the earlier token."""
    ordered = sorted(
        ((run, token) for run, fate in enumerate(fates) for token in fate.scores),
        key=lambda at: (-_number(fates[at[0]].scores[at[1]]), at),
    )
    return {at: rank for rank, at in enumerate(ordered, 1)}


def _number(score: float) -> float:
    return score if score == score else -float("inf")  # NaN ranks last


def _heat(out: Image.Image, grey: Image.Image, placed: Sequence[Cell], fates: Sequence[Fate], show: str) -> None:
    if not any(fate.scores for fate in fates):
        raise SpecError(f"these tokens have no scores to draw as {show!r}; draw 'kept'")
    colours = Image.new("RGB", out.size)
    ranked = Image.new("L", out.size, 0)
    order = ranks(fates)
    low, high = levels([s for fate in fates for s in fate.scores.values()])
    for cell in placed:
        score = fates[cell.run].scores.get(cell.token)
        if score is None or score != score:
            continue
        if show == "rank":
            value = 1 - (order[cell.run, cell.token] - 1) / max(1, len(order) - 1)
        else:
            value = (score - low) / (high - low) if high > low else 0.5
        colours.paste(style.shade(value), cell.box)
        ranked.paste(255, cell.box)
    out.paste(Image.blend(grey, colours, HEAT), mask=ranked)


def _numbers(out: Image.Image, placed: Sequence[Cell], fates: Sequence[Fate]) -> None:
    order = ranks(fates)
    pen = ImageDraw.Draw(out)
    for cell in placed:
        rank = order.get((cell.run, cell.token))
        side = min(cell.box[2] - cell.box[0], cell.box[3] - cell.box[1])
        size = round(side * (0.5 if len(order) < 100 else 0.42))
        if rank is None or size < 9:
            continue
        ground = out.resize((1, 1), Image.Resampling.BOX, cell.box).getpixel((0, 0))
        pen.text(cell.centre, str(rank), fill=style.legible(ground), font=style.font(size), anchor="mm")  # type: ignore[arg-type]


# ---- merges


def hues(centres: Mapping[tuple[int, int], tuple[float, float]]) -> dict[tuple[int, int], style.Colour]:
    """A colour for each token that took others in, such that tokens of one colour lie far apart."""
    out: dict[tuple[int, int], style.Colour] = {}
    for at, (x, y) in centres.items():

        def room(colour: style.Colour, x: float = x, y: float = y) -> float:
            same = [centres[other] for other, used in out.items() if used == colour]
            return min(((x - a) ** 2 + (y - b) ** 2 for a, b in same), default=float("inf"))

        out[at] = max(style.GROUPS, key=room)
    return out


def _merged(out: Image.Image, grey: Image.Image, placed: Sequence[Cell], fates: Sequence[Fate]) -> None:
    """Merged tokens in the colour of where they went, with lines to it where they are few."""
    into = {(run, target) for run, fate in enumerate(fates) for target in fate.merged.values()}
    if not into:
        raise SpecError("nothing was merged here; draw 'kept'")
    targets = {(cell.run, cell.token): cell for cell in placed if (cell.run, cell.token) in into}
    colours = hues({at: cell.centre for at, cell in targets.items()})
    sources = [(c, (c.run, fates[c.run].merged[c.token])) for c in placed if c.token in fates[c.run].merged]
    layer, mask = Image.new("RGB", out.size), Image.new("L", out.size, 0)
    for cell, target in sources:
        layer.paste(colours.get(target, style.MUTED), cell.box)
        mask.paste(255, cell.box)
    out.paste(Image.blend(grey, layer, 0.5), mask=mask)
    pen, width = ImageDraw.Draw(out), thickness(out.size)
    for cell, target in sources if len(sources) <= LINES else ():
        if target in targets:
            pen.line((*cell.centre, *targets[target].centre), fill=style.INK, width=width)
    for at, cell in targets.items():
        pen.rectangle(cell.inside, outline=colours[at], width=width + 1)


def coverage(view: View, fates: Sequence[Fate], size: tuple[int, int]) -> tuple[int, int, int]:
    """Tokens of a view, kept ones, and kept ones that show padding only."""
    every = list(cells(view, size))
    kept = [cell for cell in every if cell.token in fates[cell.run].kept]
    return len(every), len(kept), sum(not cell.seen for cell in kept)
