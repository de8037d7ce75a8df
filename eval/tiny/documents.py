"""Documents: key-value forms and dense text pages, and what can be asked about them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

from .drawing import N_FONTS, N_PAPERS, N_TEXTURES, Box, Ink, Picture, crop, glyphs, paper, text_size, texture
from .scenes import Turn, random_code
from .vocabulary import KEYS, MAX_LINES, WORDS

MARGIN = 4  # pixels
MAX_PAGE = 158  # characters, line breaks included
READ = "read the text."


class Row(NamedTuple):
    """One line of a document before it gets its height: (left, text) cells in one font."""

    cells: tuple[tuple[int, str], ...]
    font: int
    size: int


@dataclass
class Document:
    """Text lines from top to bottom with the boxes of their cells; `fields` maps a key to (row, value)."""

    picture: Picture
    lines: list[str]
    boxes: list[tuple[Box, ...]]
    fields: dict[str, tuple[int, str]]

    def page(self) -> Turn:
        return Turn("page", READ, "\n".join(self.lines), tuple(box for row in self.boxes for box in row))

    def line_turns(self) -> list[Turn]:
        numbered = list(zip(self.lines, self.boxes, strict=True))[:MAX_LINES]
        return [Turn("line", f"read line {i}.", line, boxes) for i, (line, boxes) in enumerate(numbered, 1)]

    def field_turns(self) -> list[Turn]:
        return [Turn("kv", f"what is the {key}?", v, self.boxes[row]) for key, (row, v) in self.fields.items()]


def random_value(rng: random.Random) -> str:
    kind = rng.randrange(7)
    if kind == 0:
        return f"${rng.randrange(1, 100)}.{rng.randrange(100):02d}"
    if kind == 1:
        return str(rng.randrange(10, 100000))
    if kind == 2:
        return random_code(rng, 2, 3) + "-" + random_code(rng, 2, 3)
    if kind == 3:
        return f"{rng.randrange(1, 32):02d}/{rng.randrange(1, 13):02d}"
    if kind == 4:
        return f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
    if kind == 5:
        return rng.choice(WORDS)
    return f"{rng.randrange(1, 100)}.{rng.randrange(10)}" + rng.choice(("", "%"))


def random_word(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.62:
        return rng.choice(WORDS)
    return random_code(rng, 2, 5) if kind < 0.76 else random_value(rng)


def blank_sheet(rng: random.Random, size: tuple[int, int], padded: bool | None) -> tuple[Picture, Ink]:
    """Mostly dark ink on paper, sometimes light ink on a dark ground."""
    light = rng.random() < 0.8
    if light:
        picture, span = Picture(crop(rng, paper(rng.randrange(N_PAPERS)), size)), (0, 70)
    else:
        picture, span = Picture(crop(rng, texture(rng.randrange(N_TEXTURES)), size) // 3), (205, 251)
    ink = (rng.randrange(*span), rng.randrange(*span), rng.randrange(*span))
    picture.letterbox(rng, padded)
    return picture, ink


def fit_font(rng: random.Random, sizes: tuple[int, ...], text: str, width: int) -> tuple[int, int]:
    """A random (font, size) in which the text fits, else the smallest."""
    for _ in range(8):
        font, size = rng.randrange(N_FONTS), rng.choice(sizes)
        if text_size(text, font, size)[0] <= width:
            return font, size
    for size in sorted(sizes):
        for font in (0, 2, 4):
            if text_size(text, font, size)[0] <= width:
                return font, size
    return 0, 13


def write_rows(
    rng: random.Random, picture: Picture, area: Box, rows: list[Row], ink: Ink, gaps: tuple[int, int]
) -> list[tuple[Box, ...]]:
    """Write rows below each other with one gap drawn from `gaps`, somewhere in the height of the area."""
    heights = [glyphs()[row.font, row.size]["A"].shape[0] for row in rows]
    room = area.height - 2 * MARGIN
    gap = min((room - sum(heights)) / max(1, len(rows)), rng.uniform(*gaps))
    need = sum(heights) + gap * (len(rows) - 1)
    y = area.top + MARGIN + rng.random() * max(0.0, room - need)
    boxes = []
    for row, height in zip(rows, heights, strict=True):
        boxes.append(tuple(picture.text(x, int(y), text, row.font, row.size, ink) for x, text in row.cells))
        y += height + gap
    return boxes


def draw_form(rng: random.Random, difficulty: float, size: tuple[int, int], padded: bool | None = None) -> Document:
    """A receipt or form: perhaps a heading, then 2 to 7 keys with values, in one of three styles."""
    picture, ink = blank_sheet(rng, size, padded)
    area = picture.content
    width, height = area.width - 12, area.height - 2 * MARGIN
    keys = rng.sample(KEYS, min(rng.randrange(2, 4 + int(4.99 * difficulty)), height // 26))
    values = [random_value(rng) for _ in keys]
    style = rng.randrange(3)
    sizes = (13, 14, 15, 16, 18, 20, 22) if height > 260 else (13, 14, 15, 16, 18)
    font, point = fit_font(rng, sizes, "WEIGHT  $88.88  ", width)
    key_width = max(text_size(key.upper() + ": ", font, point)[0] for key in keys)
    value_width = max(text_size(value, font, point)[0] for value in values)
    left = area.left + MARGIN + rng.randrange(max(1, width - key_width - value_width))
    right = min(area.right - 6, left + key_width + rng.randrange(60, 200))
    lines, rows = [], []
    if rng.random() < 0.35:
        heading = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 3)))
        heading_font = fit_font(rng, (15, 16, 18, 20, 22), heading, width)
        slack = max(1, width - text_size(heading, *heading_font)[0])
        rows.append(Row(((area.left + MARGIN + rng.randrange(slack), heading),), *heading_font))
        lines.append(heading)
    fields = {}
    for key, value in zip(keys, values, strict=True):
        name = key.upper()
        if style == 0:  # KEY: VALUE
            cells: tuple[tuple[int, str], ...] = ((left, f"{name}: {value}"),)
        elif style == 1:  # KEY      VALUE, right-aligned
            cells = ((left, name), (max(left + key_width, right - text_size(value, font, point)[0]), value))
        else:  # two columns
            cells = ((left, name), (left + key_width, value))
        fields[key] = (len(rows), value)
        rows.append(Row(cells, font, point))
        lines.append(" ".join(text for _, text in cells))
    return Document(picture, lines, write_rows(rng, picture, area, rows, ink, (5, 34)), fields)


def draw_page(
    rng: random.Random,
    difficulty: float,
    size: tuple[int, int],
    padded: bool | None = None,
    region: str | None = None,
    characters: tuple[int, int] | None = None,
) -> Document:
    """A page of up to ten lines. `characters` bounds the length aimed at; `region` lays the text in one half."""
    picture, ink = blank_sheet(rng, size, padded)
    area = picture.content_in(region)
    width, height = area.width - 12, area.height - 2 * MARGIN
    fewest, most = characters or (max(4, int(40 * difficulty)), int(12 + 138 * difficulty))
    target = rng.randint(fewest, most)
    count = max(1, min(10, round(target / rng.uniform(9, 9 + width / 25)), height // 22))
    goal = max(3, target / count)
    sizes = (13, 14, 15, 16, 18, 20) if height / count > 28 else (12, 13, 14, 15)
    lines: list[str] = []
    rows: list[Row] = []
    for _ in range(count):
        line = _line(rng, goal * rng.uniform(0.75, 1.25), width)
        if sum(map(len, lines)) + len(lines) + len(line) > MAX_PAGE:
            break
        font, point = (rows[-1].font, rows[-1].size) if rows else (0, 0)
        if not rows or rng.random() < 0.15 or text_size(line, font, point)[0] > width:
            font, point = fit_font(rng, sizes, line, width)
        slack = max(1, width - text_size(line, font, point)[0])
        indent = rng.randrange(slack) if rng.random() < 0.5 else min(slack - 1, 6)
        rows.append(Row(((area.left + MARGIN + indent, line),), font, point))
        lines.append(line)
    return Document(picture, lines, write_rows(rng, picture, area, rows, ink, (6, 40)), {})


def _line(rng: random.Random, goal: float, width: int) -> str:
    line = ""
    while True:
        longer = f"{line} {random_word(rng)}".lstrip()
        if line and (len(longer) > goal or text_size(longer, 0, 13)[0] > width):
            return line
        line = longer
