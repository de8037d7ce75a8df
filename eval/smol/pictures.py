"""Seeded pictures with questions from a bank: photographed things, receipts in real typefaces, lines of manuals."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vlprune.errors import SpecError, nearest
from vlprune.eval.tiny.documents import MARGIN, blank_sheet, random_value
from vlprune.eval.tiny.drawing import (
    CENTRE,
    CHARACTER,
    N_TEXTURES,
    PAD_COLOR,
    PATCH,
    SECOND_CHARACTER,
    SHAPE,
    Box,
    Ink,
    Picture,
    crop,
    texture,
)
from vlprune.eval.tiny.scenes import QUESTIONS, Scene, Thing, Turn
from vlprune.eval.tiny.synth import SIDE, Item
from vlprune.eval.tiny.synth import training_sample as tiny_sample
from vlprune.eval.tiny.vocabulary import CHARACTERS, COLORS, KEYS, QUADRANTS, SHAPES

from .sources import KINDS, PLAIN, PLURALS, PRINTABLE, Bank, Page, Stamp, Word

TASKS = ("what", "where", "count", "exist", "kv", "line")
THINGS = (*SHAPES, *KINDS)  # what row SHAPE of the dense labels names, from 1
LABEL_CLASSES = (1 + len(PRINTABLE), 1 + len(PRINTABLE), 1 + len(THINGS), 1 + len(COLORS), 2)
TINY_CHARACTERS = np.array([0, *(1 + PRINTABLE.index(c) for c in CHARACTERS)], np.uint8)

SMALLEST, LARGEST = 52, 132  # pixels, the longer side of a thing
MIDDLE = 16  # pixels by which a thing's centre must clear the picture's middle lines to lie in a quadrant
MOST = 5  # things of one kind one may count
COVERED = 0.35  # share of a patch that a thing must cover to be its label
SIZES = (15, 16, 17, 18, 20, 22, 24)  # of type, in pixels
LINES = (2, 7)  # of a manual shown at once: from, below
ZOOM = (1.0, 1.7)
LONGEST = 60  # characters of a line one may ask for
ATTEMPTS = 400
MOST_TURNS = 10  # of a training sample
TILT = 20  # degrees by which training turns a stamp at most
VARIANTS = 24  # of a stamp in training
WEIGHTS = {"what": 2.0, "where": 1.5, "count": 1.5, "extreme": 0.7}  # how often a training turn asks what, else 1


@dataclass
class Seen(Thing):
    """A thing that a stamp shows; `shape` is its kind, and it has no colour to be asked for."""

    @property
    def name(self) -> str:
        return self.shape


class Written(NamedTuple):
    """Text as an answer spells it, and the patch under the middle of each of its characters."""

    text: str
    row: int
    columns: tuple[int, ...]


class Drawn(NamedTuple):
    picture: Picture
    turns: list[Turn]
    written: list[Written]


# ---- things


def draw_things(
    rng: random.Random, bank: Bank, difficulty: float = 1.0, repeats: int | None = None, varied: bool = False
) -> Scene:
    """1 to 8 stamps on a textured ground, none over another; larger and fewer at low difficulty.

    Args:
        repeats: so many are of one kind, as far as there is room; None leaves that to chance.
        varied: stamps are also turned, squeezed and toned: there are few of them to learn from.
    """
    picture = Picture(crop(rng, texture(rng.randrange(N_TEXTURES)), (SIDE, SIDE)))
    picture.letterbox(rng, None)
    scene = Scene(picture, picture.content)
    kinds = [kind for kind in KINDS if bank.stamps[kind]]
    repeated = rng.choice(kinds)
    if repeats is None:
        repeats = rng.randint(1, MOST) if rng.random() < 0.3 else 0
    others = rng.randint(0 if repeats else 1, 1 + int(2.99 * difficulty))
    chosen = [repeated] * repeats + [rng.choice(kinds) for _ in range(others)]
    rng.shuffle(chosen)
    room = LARGEST if len(chosen) < 4 else 92
    for kind in chosen:
        side = int(rng.uniform(SMALLEST + (1 - difficulty) * 20, room))
        stamp = rng.choice(bank.stamps[kind])
        place_stamp(rng, scene, varied_stamp(stamp, rng.randrange(VARIANTS)) if varied else stamp, side)
    return scene


@cache
def varied_stamp(stamp: Stamp, number: int) -> Stamp:
    """Turned, squeezed and toned at random; kept, since this takes longer than all the rest of a picture."""
    rng = random.Random(f"{stamp.kind}/{stamp.name}/{number}")
    image = Image.fromarray(stamp.pixels).convert("RGBa")  # premultiplied
    squeeze = rng.uniform(0.8, 1.25)
    image = image.resize((max(1, round(image.width * squeeze)), image.height), Image.Resampling.BILINEAR)
    image = image.rotate(rng.uniform(-TILT, TILT), Image.Resampling.BILINEAR, expand=True)
    image = image.crop(image.getchannel("a").point(lambda a: 255 * (a > 20)).getbbox())
    pixels = np.array(image.convert("RGBA"))
    color = pixels[..., :3].astype(np.float32)
    color += (color.mean(-1, keepdims=True) - color) * rng.uniform(-0.3, 0.5)
    color *= [rng.uniform(0.8, 1.2) for _ in range(3)]
    pixels[..., :3] = np.clip(color, 0, 255)
    return Stamp(stamp.kind, stamp.name, pixels)


def place_stamp(rng: random.Random, scene: Scene, stamp: Stamp, side: int) -> None:
    """Put a stamp where there is room, its longer side `side` pixels, perhaps mirrored and a little brighter."""
    pixels = scaled(stamp.pixels, side)
    if stamp.kind != "coin" and rng.random() < 0.5:  # a coin's mirror image has its figures the wrong way round
        pixels = pixels[:, ::-1]
    height, width = pixels.shape[:2]
    box = scene.place(rng, width, height)
    if box is None:
        return
    color = np.clip(pixels[..., :3] * rng.uniform(0.8, 1.15), 0, 255)
    alpha = pixels[..., 3:].astype(np.float32) / 255
    part = scene.picture.pixels[box.top : box.bottom, box.left : box.right]
    part[...] = (part + (color - part) * alpha + 0.5).astype(np.uint8)
    thing = Seen(stamp.kind, "", box)
    scene.things.append(thing)
    labels = scene.picture.labels
    above, before = box.top // PATCH, box.left // PATCH  # of the patches that it touches, the first
    rows, columns = -(-box.bottom // PATCH) - above, -(-box.right // PATCH) - before
    canvas = np.zeros((rows * PATCH, columns * PATCH), np.float32)
    y, x = box.top - above * PATCH, box.left - before * PATCH
    canvas[y : y + height, x : x + width] = alpha[..., 0]
    share = canvas.reshape(rows, PATCH, columns, PATCH).mean((1, 3))
    labels[SHAPE, above : above + rows, before : before + columns][share > COVERED] = 1 + THINGS.index(stamp.kind)
    labels[CENTRE, int(thing.y) // PATCH, int(thing.x) // PATCH] = 1


def scaled(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """[H, W, 4] with the longer side at `side`; colours are weighed by coverage, so that no fringe appears."""
    height, width = pixels.shape[:2]
    factor = side / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    image = Image.fromarray(pixels).convert("RGBa")  # premultiplied
    return np.array(image.resize(size, Image.Resampling.BILINEAR).convert("RGBA"))


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def quadrant_of(scene: Scene, thing: Thing) -> str | None:
    """Where a thing's centre lies, if it is clear of the middle lines."""
    right, below = thing.x - scene.picture.width / 2, thing.y - scene.picture.height / 2
    if min(abs(right), abs(below)) < MIDDLE:
        return None
    return next(name for name, place in QUADRANTS.items() if place == (int(below > 0), int(right > 0)))


def what(rng: random.Random, scene: Scene) -> list[Turn]:
    return [turn._replace(task="what") for turn in QUESTIONS["quadrant"](rng, scene)]


def where(rng: random.Random, scene: Scene) -> list[Turn]:
    alone = [things[0] for things in scene.by("name").values() if len(things) == 1]
    found = [(thing, quadrant_of(scene, thing)) for thing in alone]
    return [Turn("where", f"where is the {t.name}?", place, (t.box,)) for t, place in found if place]


def count(rng: random.Random, scene: Scene) -> list[Turn]:
    return [
        Turn("count", f"how many {PLURALS[kind]} are there?", str(len(things)), tuple(t.box for t in things))
        for kind, things in scene.by("name").items()
    ]


def exist(rng: random.Random, scene: Scene) -> list[Turn]:
    """As many yes as no."""
    present = scene.by("name")
    yes = [Turn("exist", f"is there {article(k)}?", "yes", tuple(t.box for t in ts)) for k, ts in present.items()]
    absent = rng.sample([kind for kind in KINDS if kind not in present], len(yes))
    return yes + [Turn("exist", f"is there {article(kind)}?", "no") for kind in absent]


ASK = {"what": what, "where": where, "count": count, "exist": exist}


# ---- text


def write(
    picture: Picture, left: int, top: int, text: str, font: ImageFont.FreeTypeFont, ink: Ink
) -> tuple[Box, Written]:
    """One line of text in a typeface, its characters labelled; returns where it is."""
    width, height = round(font.getlength(text)), sum(font.getmetrics())
    mask = Image.new("L", (width + 2, height))
    ImageDraw.Draw(mask).text((0, 0), text, fill=255, font=font)
    picture.blend(left, top, np.asarray(mask, np.float32) / np.float32(255), ink)
    box = Box(left, top, min(left + width, picture.width), min(top + height, picture.height))
    return box, label(picture, text, box, ends(font, text))


def ends(font: ImageFont.FreeTypeFont, text: str) -> list[float]:
    """Widths of the first 0, 1, ... characters; what kerning takes away is spread over all of them."""
    widths = [0.0, *itertools.accumulate(advance(font, character) for character in text)]
    scale = font.getlength(text) / (widths[-1] or 1.0)
    return [width * scale for width in widths]


@cache
def advance(font: ImageFont.FreeTypeFont, character: str) -> float:
    return font.getlength(character)


def label(picture: Picture, text: str, box: Box, ends: Sequence[float]) -> Written:
    """Name the patch under the middle of each character; ends[i] is the width of the first i characters."""
    _, rows, last = picture.labels.shape
    row = min((box.top + box.height // 2) // PATCH, rows - 1)
    columns = tuple(min(int(box.left + (a + b) / 2) // PATCH, last - 1) for a, b in itertools.pairwise(ends))
    for character, column in zip(text, columns, strict=True):
        if character != " ":
            slot = SECOND_CHARACTER if picture.labels[CHARACTER, row, column] else CHARACTER
            picture.labels[slot, row, column] = 1 + PRINTABLE.index(character)
    return Written(text, row, columns)


def draw_receipt(rng: random.Random, bank: Bank, difficulty: float = 1.0) -> Drawn:
    """2 to 7 keys with values in one typeface, in one of three styles; the keys as forms spell them."""
    picture, ink = blank_sheet(rng, (SIDE, SIDE), None)
    area = picture.content
    font = bank.font(rng.randrange(len(bank.fonts)), rng.choice(SIZES))
    spell = rng.choice((str.title, str.upper, str.lower))
    step = sum(font.getmetrics()) + rng.randint(1, 14)
    most = min(2 + int(5.99 * difficulty), (area.height - 2 * MARGIN) // step)
    keys = rng.sample(KEYS, rng.randint(2, max(2, most)))
    values = [spell_value(rng, random_value(rng)) for _ in keys]
    style = rng.randrange(3)
    names = [spell(key) + (":" if style == 0 else "") for key in keys]
    column = max(font.getlength(name + "  ") for name in names)
    width = max(font.getlength(value) for value in values)
    left = area.left + MARGIN + rng.randrange(max(1, int(area.width - 2 * MARGIN - column - width)))
    right = min(area.right - MARGIN, int(left + column + width + rng.randrange(90)))
    top = area.top + MARGIN + rng.randrange(max(1, area.height - 2 * MARGIN - step * len(keys)))
    turns, written = [], list[Written]()
    for i, (key, name, value) in enumerate(zip(keys, names, values, strict=True)):
        y = top + i * step
        x = (left + font.getlength(name + " "), left + column, right - font.getlength(value))[style]
        both = write(picture, left, y, name, font, ink), write(picture, int(x), y, value, font, ink)
        boxes = both[0][0], both[1][0]
        written += [both[0][1], both[1][1]]
        if boxes[1].right < area.right and boxes[1].bottom <= area.bottom:
            turns.append(Turn("kv", f"what is the {key}?", value, boxes))
    return Drawn(picture, turns, written)


def spell_value(rng: random.Random, value: str) -> str:
    """Words as they are written in forms; codes and numbers stay."""
    return value.title() if value.isalpha() and rng.random() < 0.7 else value


def draw_note(rng: random.Random, bank: Bank, difficulty: float = 1.0) -> Drawn:
    """Two to six lines in one typeface: of a manual, or words of manuals thrown together."""
    picture, ink = blank_sheet(rng, (SIDE, SIDE), None)
    area = picture.content
    font = bank.font(rng.randrange(len(bank.fonts)), rng.choice(SIZES))
    step = sum(font.getmetrics()) + rng.randint(0, 10)
    room = (area.height - 2 * MARGIN) // step
    count = min(room, rng.randrange(LINES[0], min(LINES[1], LINES[0] + 1 + int(4.99 * difficulty))))
    left = area.left + MARGIN + rng.randrange(30)
    top = area.top + MARGIN + rng.randrange(max(1, area.height - 2 * MARGIN - step * count))
    turns, written = [], list[Written]()
    for number in range(1, count + 1):
        words = list(rng.choice(bank.lines))
        if rng.random() < 0.5:
            words = [rng.choice(rng.choice(bank.lines)) for _ in range(rng.randint(1, 7))]
        while len(words) > 1 and left + font.getlength(" ".join(words)) > area.right - MARGIN:
            words.pop()
        text = " ".join(words)
        box, line = write(picture, left, top + (number - 1) * step, text, font, ink)
        written.append(line)
        if box.right < area.right and len(text) <= LONGEST:
            turns.append(Turn("line", f"read line {number}.", text, (box,)))
    return Drawn(picture, turns, written)


def draw_manual(rng: random.Random, bank: Bank, difficulty: float = 1.0) -> Drawn:
    """A few lines of a manual's page, magnified, letterboxed; without what lies beside and between them.

    There are no turns where the chosen page has no such lines.
    """
    page = rng.choice(bank.pages)
    lines = consecutive(rng, page, difficulty)
    side = int(SIDE / (rng.uniform(*ZOOM) + 0.5 * (1 - difficulty)))  # pixels of the page across the picture
    left = min((word.box.left for line in lines for word in line), default=0) - rng.randrange(3, 10)
    cut = [[w for w in line if w.box.right <= left + side - 3] for line in lines]
    lines = [line for line in cut if line]
    texts = [" ".join(word.text for word in line).translate(PLAIN) for line in lines]
    picture = Picture(np.empty((SIDE, SIDE, 3), np.uint8))
    if not texts or any(not set(text) <= {*PRINTABLE, " "} for text in texts):
        return Drawn(picture, [], [])
    top = min(w.box.top for line in lines for w in line) - rng.randrange(3, 8)
    bottom = max(w.box.bottom for line in lines for w in line) + rng.randrange(3, 8)
    sheet, zoom = only(page, lines, Box(left, top, left + side, bottom)), SIDE / side
    height = round(sheet.shape[0] * zoom)
    if height > SIDE:
        return Drawn(picture, [], [])
    strip = np.array(Image.fromarray(sheet).resize((SIDE, height), Image.Resampling.BICUBIC))
    above = rng.randrange(SIDE - height + 1) if rng.random() < 0.3 else (SIDE - height) // 2
    picture.pixels[:] = PAD_COLOR if rng.random() < 0.5 else strip.max()
    tone = np.array([rng.uniform(0.86, 1.0) for _ in range(3)])
    picture.pixels[above : above + height] = (strip[..., None] * tone).astype(np.uint8)
    picture.content = Box(0, above, SIDE, above + height)
    turns, written = [], list[Written]()
    for number, (line, text) in enumerate(zip(lines, texts, strict=True), 1):
        boxes = tuple(magnified(word.box, left, top, zoom, above) for word in line)
        for word, box in zip(line, boxes, strict=True):
            plain = word.text.translate(PLAIN)
            found = label(picture, plain, box, [box.width * i / len(plain) for i in range(len(plain) + 1)])
            inside = word is not line[0]  # a word inside a line begins with its space
            columns = found.columns[:1] * inside + found.columns
            written.append(Written(" " * inside + plain, found.row, columns))
        if len(text) <= LONGEST:
            turns.append(Turn("line", f"read line {number}.", text, boxes))
    return Drawn(picture, turns, written)


def consecutive(rng: random.Random, page: Page, difficulty: float) -> list[list[Word]]:
    """Two to six lines of one block, below each other; none if the page has no such block where it was looked for."""
    block = rng.choice([b for b in page.blocks if len(b) >= LINES[0]] or [[]])
    count = rng.randrange(LINES[0], min(LINES[1], LINES[0] + 1 + int(4.99 * difficulty)))
    start = rng.randrange(max(1, len(block) - count + 1))
    lines = block[start : start + count]
    return lines if stacked(lines) else []


def stacked(lines: Sequence[Sequence[Word]]) -> bool:
    """Whether lines lie below each other, as in a paragraph, and not side by side, as the cells of a table do."""
    tops = [min(w.box.top for w in line) for line in lines if line]
    bottoms = [max(w.box.bottom for w in line) for line in lines if line]
    return len(tops) == len(lines) and all(low <= top + 4 for low, top in zip(bottoms, tops[1:], strict=False))


def only(page: Page, lines: Sequence[Sequence[Word]], part: Box) -> NDArray[np.uint8]:
    """A part of a page on which only these words stand, the rest painted over with the paper's tone."""
    height, width = page.pixels.shape
    paper = page.pixels.max()
    out = np.full((part.height, part.width), paper, np.uint8)
    for line in lines:
        for word in line:
            b = word.box
            box = Box(max(0, b.left), max(0, b.top), min(width, b.right), min(height, b.bottom))
            target = out[box.top - part.top : box.bottom - part.top, box.left - part.left : box.right - part.left]
            np.minimum(target, page.pixels[box.top : box.bottom, box.left : box.right][: target.shape[0], : target.shape[1]],
                       out=target)  # fmt: skip
    return out


def magnified(box: Box, left: int, top: int, zoom: float, above: int) -> Box:
    return Box(
        int((box.left - left) * zoom), above + int((box.top - top) * zoom),
        min(SIDE, int((box.right - left) * zoom) + 1), min(SIDE, above + int((box.bottom - top) * zoom) + 1),
    )  # fmt: skip


# ---- items and training samples


def items(task: str, n: int, seed: int, bank: Bank) -> list[Item]:
    """The first n items of a task; item i depends on the bank, the seed and i only.

    exist alternates between yes and no, count runs through 1 to MOST.

    Raises:
        SpecError: an unknown task.
    """
    if task not in TASKS:
        raise SpecError(f"unknown task {task!r}{nearest(task, TASKS)} (tasks: {', '.join(TASKS)})")
    return [item(task, index, seed, bank) for index in range(n)]


def item(task: str, index: int, seed: int, bank: Bank) -> Item:
    """Item number `index` of `items(task, n, seed, bank)`."""
    wanted = {"exist": ("yes", "no")[index % 2], "count": str(1 + index % MOST)}.get(task)
    for attempt in range(ATTEMPTS):
        rng = random.Random(f"smol/{seed}/{task}/{index}/{attempt}")
        if task in ASK:
            scene = draw_things(rng, bank, repeats=1 + index % MOST if task == "count" else None)
            picture, turns = scene.picture, ASK[task](rng, scene)
        else:
            picture, turns, _ = (draw_receipt if task == "kv" else draw_manual)(rng, bank)
        turns = [turn for turn in turns if wanted in (None, turn.answer)]
        if turns:
            turn = rng.choice(turns)
            image = Image.fromarray(picture.pixels)
            return Item(task, index, seed, image, turn.question, turn.answer, turn.boxes, picture.content)
    raise SpecError(f"no {task} item in {ATTEMPTS} pictures (item {index} of seed {seed}); the bank holds too little")


def mixed(rng: random.Random, turns: Sequence[Turn]) -> list[Turn]:
    """At most MOST_TURNS of them, tasks drawn by WEIGHTS, so that no kind of question crowds out the others."""
    pools: dict[str, list[Turn]] = {}
    for turn in rng.sample(turns, len(turns)):
        pools.setdefault(turn.task, []).append(turn)
    chosen: list[Turn] = []
    while pools and len(chosen) < MOST_TURNS:
        task = rng.choices(list(pools), [WEIGHTS.get(name, 1.0) for name in pools])[0]
        chosen.append(pools[task].pop())
        if not pools[task]:
            del pools[task]
    return chosen


def training_sample(key: str, bank: Bank, difficulty: float) -> Drawn:
    """A picture with its turns in asking order.

    40 % things, 15 % receipts, 13 % lines of manuals, 12 % notes, 20 % of what the tiny models' generator draws.
    """
    for attempt in range(ATTEMPTS):
        rng = random.Random(f"smol/train/{key}/{attempt}")
        kind = rng.random()
        if kind < 0.40:
            scene = draw_things(rng, bank, difficulty, varied=True)
            turns = [t for ask in ASK.values() for t in ask(rng, scene)] + QUESTIONS["extreme"](rng, scene)
            drawn = Drawn(scene.picture, turns, [])
        elif kind < 0.80:
            draw = draw_receipt if kind < 0.55 else draw_manual if kind < 0.68 else draw_note
            drawn = draw(rng, bank, difficulty)
        else:
            picture, turns = tiny_sample(f"smol/{key}/{attempt}", difficulty)
            for row in (CHARACTER, SECOND_CHARACTER):
                picture.labels[row] = TINY_CHARACTERS[picture.labels[row]]
            drawn = Drawn(picture, turns, [])
        if drawn.turns:
            return drawn._replace(turns=mixed(rng, drawn.turns))
    raise SpecError(f"no training sample in {ATTEMPTS} pictures; the bank holds too little")
