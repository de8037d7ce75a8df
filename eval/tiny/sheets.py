"""Whole sheets of 60 to 200 characters: prose, columns, receipts, tables and forms, in several typefaces and sizes."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

from .documents import (
    MARGIN,
    Document,
    Row,
    blank_sheet,
    draw_form,
    fit_font,
    random_value,
    random_word,
    write_rows,
)
from .drawing import BOLD_FONTS, N_FONTS, Box, Ink, Picture, text_size
from .vocabulary import KEYS, WORDS

SHEET_SIZES = ((896, 1120), (1120, 896), (784, 1120), (896, 1232))  # 1280, 1280, 1120 and 1408 visual tokens
FEWEST, MOST = 60, 200  # characters, line breaks included
BODY = (14, 15, 16, 18, 20, 22, 24, 28)  # pixels
HEADING = (22, 24, 28, 32, 40)
GUTTER = 44  # pixels between two columns, at least


class Sheet:
    """A document under construction: what is written comes last in reading order."""

    def __init__(self, rng: random.Random, picture: Picture, ink: Ink, target: int) -> None:
        self.rng, self.ink, self.target = rng, ink, target
        self.document = Document(picture, [], [], {})
        side = min(picture.width, picture.height) // 16
        margins = [rng.randrange(MARGIN, side) for _ in range(4)]
        area = picture.content
        self.area = Box(
            area.left + margins[0], area.top + margins[1], area.right - margins[2], area.bottom - margins[3]
        )

    @property
    def left(self) -> int:
        """Characters still to be written."""
        return self.target - sum(len(line) + 1 for line in self.document.lines)

    def write(self, area: Box, rows: list[Row], gaps: tuple[int, int]) -> list[tuple[Box, ...]]:
        boxes = write_rows(self.rng, self.document.picture, area, rows, self.ink, gaps)
        self.document.lines += [" ".join(text for _, text in row.cells) for row in rows]
        self.document.boxes += boxes
        return boxes

    def rule(self, box: Box) -> None:
        self.document.picture.pixels[box.top : box.bottom, box.left : box.right] = self.ink

    def heading(self) -> None:
        """One or two words across the top, in a larger size; the area below it is what is left."""
        text = " ".join(self.rng.choice(WORDS) for _ in range(self.rng.randrange(1, 3)))
        font, size = fit_font(self.rng, HEADING, text, self.area.width)
        width, height = text_size(text, font, size)
        x = self.area.left + self.rng.randrange(max(1, self.area.width - width))
        strip = self.area._replace(bottom=self.area.top + height + 2 * MARGIN)
        self.write(strip, [Row(((x, text),), font, size)], (0, 1))
        self.area = self.area._replace(top=strip.bottom + self.rng.randrange(6, 40))


def words(rng: random.Random, goal: float, width: int, font: int, size: int) -> str:
    """Words of about `goal` characters that fit into a line."""
    line = ""
    while True:
        longer = f"{line} {random_word(rng)}".lstrip()
        if line and (len(longer) > goal or text_size(longer, font, size)[0] > width):
            return line
        line = longer


def rows_that_fit(height: int, size: int) -> int:
    return max(1, height // (size + 10))


def paragraph(sheet: Sheet, area: Box, target: int, longest: int) -> None:
    """Lines of one typeface and size, sometimes changing on the way, about `target` characters in all."""
    rng = sheet.rng
    font, size = rng.randrange(N_FONTS), rng.choice(BODY)
    goal, rows = rng.uniform(0.5, 1.0) * longest, list[Row]()
    centred = rng.random() < 0.2
    ragged = rng.random() < 0.4
    while target > 3 and len(rows) < rows_that_fit(area.height, size):
        if rng.random() < 0.08:
            font, size = rng.randrange(N_FONTS), rng.choice([s for s in BODY if s <= size])
        line = words(rng, min(target, goal * rng.uniform(0.7, 1.3)), area.width, font, size)
        if text_size(line, font, size)[0] > area.width or len(line) >= sheet.left + 20:
            break
        slack = max(1, area.width - text_size(line, font, size)[0])
        indent = slack // 2 if centred else rng.randrange(slack) if ragged and rng.random() < 0.5 else min(slack - 1, 6)
        rows.append(Row(((area.left + indent, line),), font, size))
        target -= len(line) + 1
    sheet.write(area, rows, (6, 70))


def prose(sheet: Sheet) -> None:
    if sheet.rng.random() < 0.5:
        sheet.heading()
    paragraph(sheet, sheet.area, sheet.left, sheet.area.width // 22)


def columns(sheet: Sheet) -> None:
    """Two or three columns, read one after the other; a rule between them, or nothing."""
    rng = sheet.rng
    if rng.random() < 0.5:
        sheet.heading()
    area, count = sheet.area, 3 if sheet.area.width > 900 and rng.random() < 0.4 else 2
    pitch = area.width // count
    ruled, target = rng.random() < 0.5, sheet.left
    for i in range(count):
        left = area.left + i * pitch + (GUTTER // 2 if i else 0)
        right = area.left + (i + 1) * pitch - (GUTTER // 2 if i < count - 1 else 0)
        share = target // count if i < count - 1 else sheet.left
        paragraph(sheet, area._replace(left=left, right=right), share, (right - left) // 20)
        if i and ruled:
            middle = area.left + i * pitch
            sheet.rule(Box(middle, area.top, middle + 2, area.bottom))


def receipt(sheet: Sheet) -> None:
    """Items with prices set flush right, a rule, and keys with values below it; a strip somewhere on the sheet."""
    rng, area = sheet.rng, sheet.area
    font, size = rng.randrange(N_FONTS), rng.choice(BODY[:-1])
    width = min(area.width, int(size * rng.uniform(16, 30)))
    left = area.left + rng.randrange(area.width - width + 1)
    sheet.area = area = area._replace(left=left, right=left + width)
    if rng.random() < 0.7:
        sheet.heading()
        area = sheet.area

    def row(name: str, value: str) -> Row:
        edge = area.right - text_size(value, font, size)[0]
        return Row(
            ((area.left, name), (max(edge, area.left + text_size(name + " ", font, size)[0]), value)), font, size
        )

    keys = rng.sample(KEYS, rng.randrange(1, 4))
    values = [random_value(rng) for _ in keys]
    after = sum(len(key) + len(value) + 2 for key, value in zip(keys, values, strict=True))
    room = rows_that_fit(area.height, size) - len(keys) - 2
    rows: list[Row] = []
    used = 0
    while len(rows) < room and used < sheet.left - after:
        name = rng.choice(WORDS) if rng.random() < 0.7 else f"{rng.randrange(2, 10)} {rng.choice(WORDS)}"
        rows.append(row(name, f"{rng.randrange(1, 100)}.{rng.randrange(100):02d}"))
        used += len(name) + 7
    gap = rng.randrange(4, 16)
    need = sum(text_size("A", r.font, r.size)[1] + gap for r in rows) + 2 * MARGIN
    upper = area._replace(bottom=min(area.bottom - len(keys) * (size + 14), area.top + need))
    sheet.write(upper, rows, (gap, gap + 1))
    edge = upper.bottom + rng.randrange(2, 10)
    sheet.rule(Box(area.left, edge, area.right, edge + rng.randrange(1, 4)))
    first = len(sheet.document.lines)
    foot = area._replace(top=edge + 4, bottom=min(area.bottom, edge + 4 + len(keys) * (size + gap + 8) + 2 * MARGIN))
    sheet.write(foot, [row(key.upper(), value) for key, value in zip(keys, values, strict=True)], (gap, gap + 1))
    for number, (key, value) in enumerate(zip(keys, values, strict=True)):
        sheet.document.fields[key] = (first + number, value)


def table(sheet: Sheet) -> None:
    """Cells in rows and columns, read row by row, with rules between the rows and sometimes between the columns."""
    rng = sheet.rng
    if rng.random() < 0.5:
        sheet.heading()
    area = sheet.area
    font, size = rng.randrange(N_FONTS), rng.choice(BODY)
    count, lines, used = rng.randrange(2, 5), list[list[str]](), 0
    while used < sheet.left and len(lines) < min(9, rows_that_fit(area.height, size + 8)):
        cells = [rng.choice(WORDS) if not lines or i == 0 else random_value(rng) for i in range(count)]
        lines.append(cells)
        used += sum(len(cell) + 1 for cell in cells)
    widths = [max(text_size(line[i], font, size)[0] for line in lines) for i in range(count)]
    while sum(widths) + 24 * len(widths) > area.width and len(widths) > 1:
        widths.pop()
    count = len(widths)
    spare = (area.width - sum(widths)) // count
    pad = rng.randrange(20, max(21, min(90, spare)))
    starts = [0]
    for w in widths:
        starts.append(starts[-1] + w + pad)
    width = starts[-1]
    left = area.left + rng.randrange(max(1, area.width - width + 1))
    head = rng.choice(BOLD_FONTS) if rng.random() < 0.5 else font
    rows = []
    for number, line in enumerate(lines):
        fits = all(text_size(line[i], head, size)[0] <= widths[i] + pad - 8 for i in range(count))
        placed = tuple((left + starts[i] + 6, line[i]) for i in range(count))
        rows.append(Row(placed, head if not number and fits else font, size))
    boxes = sheet.write(area, rows, (10, 44))
    edges = [max(0, boxes[0][0].top - 5)]
    edges += [(above[0].bottom + below[0].top) // 2 for above, below in pairwise(boxes)]
    edges.append(min(sheet.document.picture.height - 2, boxes[-1][0].bottom + 4))
    thick, framed = rng.randrange(1, 3), rng.random() < 0.5
    for edge in edges:
        sheet.rule(Box(left, edge, left + width, edge + thick))
    for start in starts if framed else ():
        sheet.rule(Box(left + start, edges[0], left + start + thick, edges[-1] + thick))


KINDS: dict[str, Callable[[Sheet], None]] = {"prose": prose, "columns": columns, "receipt": receipt, "table": table}
SHEET_KINDS = (*KINDS, "form")


def draw_sheet(rng: random.Random, difficulty: float, size: tuple[int, int], kind: str | None = None) -> Document:
    """One document of one of the SHEET_KINDS, mostly of FEWEST to MOST characters at difficulty 1."""
    kind = kind or rng.choice((*SHEET_KINDS, "prose", "columns"))
    if kind == "form":
        return draw_form(rng, difficulty, size, padded=False)
    picture, ink = blank_sheet(rng, size, padded=False)
    target = rng.randint(int(20 + (FEWEST - 20) * difficulty), int(60 + (MOST - 60) * difficulty))
    sheet = Sheet(rng, picture, ink, target)
    KINDS[kind](sheet)
    return sheet.document
