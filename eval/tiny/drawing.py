"""Drawing with numpy alone: glyphs from a stored atlas, textures and shapes from formulas, dense labels beside them.

No font, no renderer and no network takes part, so a seed gives the same picture everywhere.
"""

from __future__ import annotations

import math
import random
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .vocabulary import ASSETS, CHARACTERS, COLORS, SHAPES

PATCH = 14  # pixels; the side of one cell of the dense labels
MAX_SIDE = 1344  # pixels
TEXTURE_SIDE = 736  # larger than a small picture, so that crops differ; mirrored, larger than any
N_TEXTURES, N_PAPERS = 72, 36
N_FONTS = 6
BOLD_FONTS = (1, 3, 5)
PAD_COLOR = (122, 116, 104)  # the mean colour of CLIP's training pictures, as LLaVA pads to a square with it
CHARACTER, SECOND_CHARACTER, SHAPE, COLOR, CENTRE = range(5)  # rows of Picture.labels
LABEL_CLASSES = (1 + len(CHARACTERS), 1 + len(CHARACTERS), 1 + len(SHAPES), 1 + len(COLORS), 2)

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
Ink = tuple[int, int, int]


class Box(NamedTuple):
    """Pixels left <= x < right, top <= y < bottom."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top


@cache
def glyphs() -> dict[tuple[int, int], dict[str, Floats]]:
    """(font, size) -> character -> coverage in [0, 1], shape [height, advance]."""
    with np.load(ASSETS / "glyphs.npz") as stored:
        table = {}
        for font in range(N_FONTS):
            for size in stored["sizes"].tolist():
                strip = stored[f"g{font}_{size}"].astype(np.float32) / 255.0
                ends = np.cumsum(stored[f"w{font}_{size}"].astype(int)).tolist()
                cells = {c: strip[:, a:b] for c, a, b in zip(CHARACTERS, [0, *ends], ends, strict=False)}
                cells[" "] = np.zeros((strip.shape[0], int(stored[f"s{font}_{size}"])), np.float32)
                table[font, size] = cells
    return table


def text_size(text: str, font: int, size: int) -> tuple[int, int]:
    """(width, height) of a line of text in pixels."""
    cells = glyphs()[font, size]
    return sum(cells[c].shape[1] for c in text), cells["A"].shape[0]


def _upsample(grid: Floats, side: int) -> Floats:
    """[k, k, c] -> [side, side, c], linear along both axes."""
    k = grid.shape[0]
    x = np.arange(side, dtype=np.float32) * np.float32((k - 1) / (side - 1))
    low = np.minimum(x.astype(int), k - 2)
    t = x - low.astype(np.float32)
    rows = grid[low] * (1 - t)[:, None, None] + grid[low + 1] * t[:, None, None]
    return rows[:, low] * (1 - t)[None, :, None] + rows[:, low + 1] * t[None, :, None]


@cache
def texture(number: int) -> Pixels:
    """One of N_TEXTURES muted backgrounds: blotches, stripes, gradients, grain, in six mixtures."""
    rng = np.random.Generator(np.random.PCG64(20240501 + number))
    side, kind = TEXTURE_SIDE, number % 6
    base = 85 + 95 * rng.random(3, dtype=np.float32)
    base = base * np.float32(0.35) + base.mean() * np.float32(0.65)  # greyish
    img = np.broadcast_to(base, (side, side, 3)).astype(np.float32)
    if kind in (1, 2, 5):
        k = int(rng.integers(5, 26))
        img += (_upsample(rng.random((k, k, 3), dtype=np.float32), side) - 0.5) * 36
        img += (_upsample(rng.random((k, k, 1), dtype=np.float32), side) - 0.5) * 50
    if kind in (2, 3):
        y, x = np.ogrid[:side, :side]
        across, down, period = int(rng.integers(-3, 4)), int(rng.integers(1, 4)), int(rng.integers(24, 70))
        img += (((x * across + y * down) // 2 % period) < period // 2)[..., None] * np.float32(18) - 9
    if kind in (0, 4):
        img += _upsample(rng.random((2, 2, 3), dtype=np.float32), side) * 44 - 22
    if kind in (3, 4, 5):
        img += (rng.random((side, side, 1), dtype=np.float32) - 0.5) * 22
    return np.clip(np.rint(img), 0, 255).astype(np.uint8)


@cache
def paper(number: int) -> Pixels:
    """One of N_PAPERS light sheets with a faint structure."""
    relief = (texture(number * 5 % N_TEXTURES).astype(np.int32) - 128) // 6
    tone = (238, 236, 230) if number % 3 else (226, 222, 214)
    return np.clip(relief + np.array(tone), 0, 255).astype(np.uint8)


def crop(rng: random.Random, sheet: Pixels, size: tuple[int, int]) -> Pixels:
    """A random cut-out of (width, height), perhaps mirrored."""
    width, height = size
    if max(size) >= TEXTURE_SIDE:
        sheet = np.concatenate([sheet, sheet[::-1]])
        sheet = np.concatenate([sheet, sheet[:, ::-1]], axis=1)
    top, left = rng.randrange(len(sheet) - height), rng.randrange(sheet.shape[1] - width)
    part = sheet[top : top + height, left : left + width]
    if rng.random() < 0.5:
        part = part[:, ::-1]
    if rng.random() < 0.5:
        part = part[::-1]
    return part.copy()


def shape_alpha(kind: str, radius: float, angle: float) -> Floats:
    """Coverage in [0, 1] of a shape, from its signed distance; square, side int(2 radius + 4)."""
    n = int(2 * radius + 4)
    axis = np.arange(n, dtype=np.float64) - (n - 1) / 2
    x, y = axis[None, :], axis[:, None]
    u = x * math.cos(angle) + y * math.sin(angle)
    v = y * math.cos(angle) - x * math.sin(angle)
    r = np.sqrt(u * u + v * v)
    if kind == "circle":
        d = r - radius * 0.95
    elif kind == "ring":
        d = np.abs(r - radius * 0.75) - radius * 0.22
    elif kind == "square":
        d = np.maximum(np.abs(u), np.abs(v)) - radius * 0.8
    elif kind == "diamond":
        d = (np.abs(u) / 0.72 + np.abs(v) - radius) * 0.6
    elif kind == "triangle":
        d = np.maximum(v - radius * 0.6, np.abs(u) * 0.8660254 - v * 0.5 - radius * 0.5)
    elif kind == "cross":
        upright = np.maximum(np.abs(u) - radius * 0.3, np.abs(v) - radius)
        d = np.minimum(upright, np.maximum(np.abs(u) - radius, np.abs(v) - radius * 0.3))
    elif kind == "star":
        turn = np.arctan2(u, -v) + math.pi / 5
        k = np.abs(np.mod(turn, 2 * math.pi / 5) - math.pi / 5)  # 0 at a tip, pi/5 at a notch
        d = r * (0.306 * np.cos(k) + 0.952 * np.sin(k)) - radius * 0.31
    else:  # moon: a disc without a shifted disc
        d = np.maximum(r - radius * 0.95, radius * 0.78 - np.sqrt((u - radius * 0.5) ** 2 + v * v))
    return np.clip(0.5 - d, 0, 1).astype(np.float32)


class Picture:
    """Pixels [H, W, 3], the part that is not padding, and labels [5, H/14, W/14] for dense supervision."""

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        self.height, self.width = pixels.shape[:2]
        self.labels = np.zeros((5, self.height // PATCH, self.width // PATCH), np.uint8)
        self.content = Box(0, 0, self.width, self.height)

    def letterbox(self, rng: random.Random, padded: bool | None) -> None:
        """Cover two opposite margins with padding. None leaves it to chance: a third of the square pictures."""
        if padded is None:
            padded = self.height == self.width and rng.random() < 0.35
        if not padded:
            return
        share, horizontal = rng.uniform(0.6, 0.92), rng.random() < 0.5
        side = self.height if horizontal else self.width
        start = (side - int(side * share)) // 2
        stop = start + int(side * share)
        canvas = self.pixels if horizontal else self.pixels.transpose(1, 0, 2)
        canvas[:start] = PAD_COLOR
        canvas[stop:] = PAD_COLOR
        self.content = Box(0, start, self.width, stop) if horizontal else Box(start, 0, stop, self.height)

    def content_in(self, region: str | None) -> Box:
        """The content that lies in the upper or lower half of the picture; None is all of it."""
        if region == "upper":
            return self.content._replace(bottom=min(self.content.bottom, self.height // 2))
        if region == "lower":
            return self.content._replace(top=max(self.content.top, self.height // 2))
        return self.content

    def blend(self, left: int, top: int, alpha: Floats, color: Ink) -> None:
        """Paint a colour through a coverage mask; what would leave the picture is cut."""
        part = self.pixels[top : top + alpha.shape[0], left : left + alpha.shape[1]]
        a = alpha[: part.shape[0], : part.shape[1], None]
        part[...] = (part + (np.asarray(color, np.float32) - part) * a + 0.5).astype(np.uint8)

    def text(self, left: int, top: int, text: str, font: int, size: int, color: Ink) -> Box:
        """Write one line of text, label its characters, return where it is."""
        cells = [glyphs()[font, size][c] for c in text]
        strip = np.concatenate(cells, axis=1)
        self.blend(left, top, strip, color)
        height, width = strip.shape
        row, x = min((top + height // 2) // PATCH, self.labels.shape[1] - 1), left
        for character, cell in zip(text, cells, strict=True):
            if character != " ":
                column = min(int(x + cell.shape[1] / 2) // PATCH, self.labels.shape[2] - 1)
                slot = SECOND_CHARACTER if self.labels[CHARACTER, row, column] else CHARACTER
                self.labels[slot, row, column] = 1 + CHARACTERS.index(character)
            x += cell.shape[1]
        return Box(left, top, min(left + width, self.width), min(top + height, self.height))
