"""Colours, type and the colour scale. All of it is told apart with any of the common colour vision deficiencies."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from PIL import ImageFont

Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
INK: Colour = (31, 35, 40)
MUTED: Colour = (100, 108, 118)
RULE: Colour = (208, 213, 219)
FADED: Colour = (236, 238, 240)  # what dropped tokens fade towards
KEPT: Colour = (0, 114, 178)  # blue and vermillion of Okabe and Ito's palette
FOCUS: Colour = (213, 94, 0)
GROUPS: tuple[Colour, ...] = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
                              (204, 121, 167))  # fmt: skip  # the same palette
SCALE: tuple[Colour, ...] = ((0, 34, 78), (26, 56, 111), (67, 78, 108), (97, 101, 111), (125, 124, 120), (155, 148, 118),
                             (188, 174, 108), (222, 201, 88), (254, 232, 56))  # fmt: skip  # cividis at nine places


def shade(value: float) -> Colour:
    """0, low, to 1, high, as a colour: dark blue over grey to yellow, lighter all the way."""
    at = min(max(value, 0.0), 1.0) * (len(SCALE) - 1)
    low = min(int(at), len(SCALE) - 2)
    return blend(SCALE[low], SCALE[low + 1], at - low)


def blend(a: Colour, b: Colour, share: float) -> Colour:
    """From a, at 0, to b, at 1."""
    r, g, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return r, g, blue


def legible(on: Colour) -> Colour:
    """Black or white, whichever reads better on a colour."""
    return INK if 0.299 * on[0] + 0.587 * on[1] + 0.114 * on[2] > 140 else PAPER


@lru_cache(maxsize=64)
def font(size: int) -> Any:
    """The typeface that comes with PIL. It knows Latin letters; others are boxes."""
    return ImageFont.load_default(size=size)


def fitted(text: str, size: int, width: float, smallest: int = 10) -> tuple[str, int]:
    """The text and the type size, down to `smallest`, in which it is `width` pixels wide at most; then cut short."""
    while size > smallest and font(size).getlength(text) > width:
        size -= 1
    if font(size).getlength(text) <= width:
        return text, size
    while text and font(size).getlength(text + "...") > width:
        text = text[:-1]
    return text + "...", size
