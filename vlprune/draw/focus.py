"""Reading step by step: where a per-step pruner looked while each token was written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from vlprune.draw import style
from vlprune.draw.overlay import Fate, cells, overlay, thickness
from vlprune.draw.sheet import Panel, contact, scale
from vlprune.errors import SpecError
from vlprune.geometry import View

TRAIL = 12  # steps the way behind the gaze is drawn for
LINES = 3  # of text under the page
Gazes = Mapping[int, Sequence[Fate]]  # step -> what became of each run of the page's tokens


def peak(gaze: Sequence[Fate], among: Collection[tuple[int, int]]) -> tuple[int, int]:
    """(run, token) that was looked at most among some, or the first of those read."""
    scores = {(run, t): s for run, fate in enumerate(gaze) for t, s in fate.scores.items() if (run, t) in among}
    if scores:
        return max(scores, key=lambda at: scores[at])
    return min((run, t) for run, fate in enumerate(gaze) for t in fate.kept if (run, t) in among)


def frames(image: Image.Image, view: View, gazes: Gazes, tokens: Sequence[str]) -> list[Image.Image]:
    """A picture for each written token: what could be read is clear, a line follows the gaze, the text grows below.

    Args:
        gazes: where it was looked while the n-th token was written, for each run of the picture's tokens.
        tokens: what was written, as it is to be shown.
    """
    image = image.convert("RGB")
    centres = {(cell.run, cell.token): cell.centre for cell in cells(view, image.size)}
    steps = [n for n in gazes if n < len(tokens)]
    way = [centres[peak(gazes[n], centres)] for n in steps]
    size = min(max(image.width // 26, 13), 32)
    out = []
    for number, step in enumerate(steps):
        page = overlay(image, view, gazes[step])
        _trail(page, way[max(0, number - TRAIL) : number + 1])
        out.append(_captioned(page, tokens, step, size))
    return out


def _trail(page: Image.Image, way: Sequence[tuple[float, float]]) -> None:
    pen, width = ImageDraw.Draw(page, "RGBA"), 2 * thickness(page.size)
    for number, (a, b) in enumerate(pairwise(way)):
        pen.line((*a, *b), fill=(*style.FOCUS, round(255 * (number + 1) / len(way))), width=width)
    (x, y), radius = way[-1], 4 * width
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=style.FOCUS, width=width)


def _captioned(page: Image.Image, tokens: Sequence[str], step: int, size: int) -> Image.Image:
    """The text so far under the page, the token of this step marked; the last lines where it is long."""
    font, pad, line = style.font(size), size // 2, round(size * 1.5)
    out = Image.new("RGB", (page.width, page.height + LINES * line + 2 * pad), style.PAPER)
    out.paste(page)
    lines: list[list[tuple[float, str, bool]]] = [[]]
    x = float(pad)
    for number, token in enumerate(tokens[: step + 1]):
        *breaks, last = token.replace("\r", "").split("\n")
        for part in breaks:
            lines[-1].append((x, part, number == step))
            lines.append([])
            x = float(pad)
        if x > pad and x + font.getlength(last.rstrip()) > page.width - pad:
            lines.append([])
            x, last = float(pad), last.lstrip()
        lines[-1].append((x, last, number == step))
        x += font.getlength(last)
    pen = ImageDraw.Draw(out)
    for row, parts in enumerate(lines[-LINES:]):
        y = page.height + pad + row * line
        for x, part, now in parts:
            if now and part.strip():
                left = x + font.getlength(part[: len(part) - len(part.lstrip())])
                pen.rectangle((left - 2, y - 1, x + font.getlength(part) + 1, y + line - 3), fill=style.FOCUS)
            pen.text((x, y), part, fill=style.PAPER if now else style.INK, font=font)
    return out


def words(image: Image.Image, view: View, gazes: Gazes, tokens: Sequence[str]) -> Image.Image:
    """A heat map for each written word: the mean attention its tokens paid to every visual token."""
    panels = []
    for word, numbers in spelled(tokens):
        members = [gazes[n] for n in numbers if n in gazes]
        if members:
            fates = [mean(run) for run in zip(*members, strict=True)]
            panels.append(Panel(overlay(image, view, fates, "score"), word))
    return contact(panels, [Panel(scale(), note="attention, low to high")], 360)


def mean(gazes: Sequence[Fate]) -> Fate:
    """Several gazes at one run as one: mean scores, and all that was read."""
    scores = {token: sum(g.scores.get(token, 0.0) for g in gazes) / len(gazes) for token in gazes[0].scores}
    return Fate(frozenset().union(*(g.kept for g in gazes)), scores)


def spelled(tokens: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Words and the numbers of their tokens: a word ends where white space begins. Empty tokens belong to none."""
    out: list[tuple[str, list[int]]] = []
    open_word = False
    for number, token in enumerate(tokens):
        if not token.strip():
            open_word = open_word and not token
            continue
        if open_word and not token[0].isspace():
            word, members = out[-1]
            out[-1] = (word + token.strip(), [*members, number])
        else:
            out.append((token.strip(), [number]))
        open_word = not token[-1].isspace()
    return out


def pieces(processor: Any, ids: Iterable[int]) -> list[str]:
    """What each generated token adds to the text, spaces included, as `Trace.focus` and `Trace.words` take it."""
    out, before, seen = [], "", list[int]()
    for token in ids:
        seen.append(int(token))
        text = processor.decode(seen, skip_special_tokens=True)
        out.append(text[len(before) :])
        before = text
    return out


def gif(pictures: Sequence[Image.Image], path: str | Path, seconds: float = 0.25) -> Path:
    """Frames as an endless film; the last stands for a second longer.

    Raises:
        SpecError: there are no frames.
    """
    if not pictures:
        raise SpecError("there are no frames to write")
    path = Path(path)
    durations = [round(1000 * seconds)] * len(pictures)
    durations[-1] += 1000
    first, *rest = [p.convert("RGB").quantize(128) for p in pictures]
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)
    return path
