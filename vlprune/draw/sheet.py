"""Pictures side by side, with titles and a legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import ceil, sqrt
from statistics import median

from PIL import Image, ImageDraw

from vlprune.draw import style
from vlprune.errors import SpecError


@dataclass(frozen=True, eq=False)
class Panel:
    """A picture and what stands above it."""

    image: Image.Image
    title: str = ""
    note: str = ""  # a second, quieter line


def sheet(
    rows: Sequence[Sequence[Panel | None]],
    heads: Sequence[str] = (),
    names: Sequence[str] = (),
    legend: Sequence[Panel] = (),
) -> Image.Image:
    """Rows of panels at their own size on white paper.

    Args:
        rows: None leaves a place empty.
        heads: titles of the columns. names: titles of the rows. legend: small pictures, each followed by its note.
    """
    columns = list(zip_longest(*rows))
    panels = [panel for row in rows for panel in row if panel is not None]
    if not panels:
        raise SpecError("there is no picture to lay out")
    text = min(max(round(median(p.image.width for p in panels) / 28), 13), 32)
    gap, line = round(text * 0.9), round(text * 1.45)
    widths = [max((p.image.width for p in column if p is not None), default=0) for column in columns]
    widths = [max(width, 7 * text) for width in widths]
    above = [line * max((bool(p.title) + bool(p.note) for p in row if p is not None), default=0) for row in rows]
    heights = [max((p.image.height for p in row if p is not None), default=0) for row in rows]
    margin = max((ceil(style.font(text).getlength(name)) for name in names), default=-gap) + 2 * gap
    head = gap + (line if any(heads) else 0)
    width = margin + sum(widths) + gap * len(widths)
    height = head + sum(above) + sum(heights) + gap * len(rows)
    foot = _legend(legend, width, gap, text)
    out = Image.new("RGB", (width, height + (foot.height if foot else 0)), style.PAPER)
    pen = ImageDraw.Draw(out)
    lefts = [margin + sum(widths[:i]) + gap * i for i in range(len(widths))]
    for title, left, room in zip(heads, lefts, widths, strict=False):
        _write(pen, (left, gap // 2), title, text, room, style.INK)
    top = head
    for number, row in enumerate(rows):
        if number < len(names):
            middle = top + above[number] + heights[number] // 2
            pen.text((gap, middle), names[number], fill=style.INK, font=style.font(text), anchor="lm")
        for panel, left, room in zip(row, lefts, widths, strict=False):
            if panel is None:
                continue
            at = top
            for words, colour in ((panel.title, style.INK), (panel.note, style.MUTED)):
                if words:
                    _write(pen, (left, at), words, text, room, colour)
                    at += line
            _place(out, panel.image, (left, top + above[number]))
        top += above[number] + heights[number] + gap
    if foot:
        out.paste(foot, (margin, height))
    return out


def _write(pen: ImageDraw.ImageDraw, at: tuple[int, int], words: str, size: int, room: int, colour: style.Colour) -> None:  # fmt: skip
    words, size = style.fitted(words, size, room)
    pen.text(at, words, fill=colour, font=style.font(size))


def _place(out: Image.Image, image: Image.Image, at: tuple[int, int]) -> None:
    """With a hairline around it: white pages end somewhere too."""
    box = (at[0] - 1, at[1] - 1, at[0] + image.width, at[1] + image.height)
    ImageDraw.Draw(out).rectangle(box, outline=style.RULE)
    out.paste(image, at)


def _legend(entries: Sequence[Panel], width: int, gap: int, text: int) -> Image.Image | None:
    """Swatches and words in a row, as many rows as it takes."""
    if not entries:
        return None
    small = max(11, round(text * 0.9))
    font, line = style.font(small), round(small * 1.9)
    places, x, y = [], 0, 0
    for entry in (_grown(entry, small / 13) for entry in entries):
        wide = entry.image.width + gap // 2 + ceil(font.getlength(entry.note)) + 2 * gap
        if x and x + wide > width:
            x, y = 0, y + line
        places.append((entry, x, y))
        x += wide
    out = Image.new("RGB", (width, y + line + gap // 2), style.PAPER)
    pen = ImageDraw.Draw(out)
    for entry, left, top in places:
        middle = top + line // 2
        _place(out, entry.image, (left + 1, middle - entry.image.height // 2))
        pen.text((left + entry.image.width + gap // 2, middle), entry.note, fill=style.MUTED, font=font, anchor="lm")
    return out


def _grown(entry: Panel, factor: float) -> Panel:
    size = (round(entry.image.width * factor), round(entry.image.height * factor))
    return Panel(entry.image.resize(size, Image.Resampling.NEAREST), note=entry.note)


def swatch(colour: style.Colour, rim: style.Colour | None = None) -> Image.Image:
    """A small square for a legend."""
    out = Image.new("RGB", (13, 13), colour)
    if rim:
        ImageDraw.Draw(out).rectangle((0, 0, 12, 12), outline=rim, width=2)
    return out


def scale(width: int = 120, height: int = 12) -> Image.Image:
    """The colours of a heat map, low to high."""
    out = Image.new("RGB", (width, height))
    for x in range(width):
        out.paste(style.shade(x / (width - 1)), (x, 0, x + 1, height))
    return out


def contact(panels: Sequence[Panel], legend: Sequence[Panel] = (), widest: int = 480) -> Image.Image:
    """Many panels in rows, about as wide as it is high by three to two, each at most `widest` pixels wide."""
    small = [Panel(shrunk(p.image, widest), p.title, p.note) for p in panels]
    if not small:
        raise SpecError("there is no picture to lay out")
    shape = small[0].image.width / small[0].image.height
    columns = min(len(small), max(1, round(sqrt(len(small) * 1.5 / shape))))
    return sheet([small[i : i + columns] for i in range(0, len(small), columns)], legend=legend)


def shrunk(image: Image.Image, widest: int) -> Image.Image:
    """At most `widest` pixels wide."""
    if image.width <= widest:
        return image
    return image.resize((widest, max(1, round(image.height * widest / image.width))), Image.Resampling.LANCZOS)


def compare(pictures: Mapping[str, Image.Image] | Mapping[tuple[str, str], Image.Image]) -> Image.Image:
    """A row for each method, a column for each budget.

        vlprune.draw.compare({"divprune:keep=0.333": trace.draw(image), "fastv@2:keep=0.333": ...})

    Args:
        pictures: by a plan's text with its budget, or by a pair (row, column). Rows and columns come in the order in
            which they are first named.
    Raises:
        SpecError: no picture, or a text without "keep=".
    """
    if not pictures:
        raise SpecError("compare needs pictures by plan, such as {'divprune:keep=0.333': trace.draw(image)}")
    places = {_place_of(key): image for key, image in pictures.items()}
    names, heads = (list(dict.fromkeys(place[i] for place in places)) for i in (0, 1))
    found = [[places.get((name, head)) for head in heads] for name in names]
    rows = [[None if image is None else Panel(image) for image in row] for row in found]
    return sheet(rows, heads, names)


def _place_of(key: str | tuple[str, str]) -> tuple[str, str]:
    if not isinstance(key, str):
        name, head = key
        return str(name), str(head)
    parts = key.split(":")
    budget = [part for part in parts if part.startswith("keep=")]
    if len(budget) != 1 or "+" in key:
        raise SpecError(f"{key!r} names no single budget; use a pair (row, column) as its key")
    keep = budget[0].removeprefix("keep=")
    head = f"keep {float(keep):.3g}" if "." not in keep else f"keep {100 * float(keep):.3g} %"
    return ":".join(part for part in parts if part != budget[0]), head
