"""Seeded pictures with questions from a bank: photographed things, receipts in real typefaces, lines of manuals."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

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

from .sources import KINDS, PLURALS, Bank, Page, Stamp, Word

TASKS = ("what", "where", "count", "exist", "kv", "line")
PRINTABLE = "".join(map(chr, range(33, 127)))
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
PLAIN = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "‐": "-", "…": "...", "ﬁ": "fi", "ﬂ": "fl"}
)
ATTEMPTS = 400
MOST_TURNS = 10  # of a training sample
WEIGHTS = {"what": 2.0, "where": 1.5, "count": 1.5, "extreme": 0.7}  # how often a training turn asks what, else 1


@dataclass
class Seen(Thing):
    """A thing that a stamp shows; `shape` is its kind, and it has no colour to be asked for."""

    @property
    def name(self) -> str:
        return self.shape


# ---- things


def draw_things(rng: random.Random, bank: Bank, difficulty: float = 1.0, repeats: int | None = None) -> Scene:
    """1 to 8 stamps on a textured ground, none over another; larger and fewer at low difficulty.

    `repeats` of them are of one kind, as far as there is room; None leaves that to chance.
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
        place_stamp(rng, scene, rng.choice(bank.stamps[kind]), side)
    return scene


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
    labels, canvas = scene.picture.labels, np.zeros((scene.picture.height, scene.picture.width), np.float32)
    canvas[box.top : box.bottom, box.left : box.right] = alpha[..., 0]
    rows, columns = labels.shape[1:]
    share = canvas[: rows * PATCH, : columns * PATCH].reshape(rows, PATCH, columns, PATCH).mean((1, 3))
    labels[SHAPE][share > COVERED] = 1 + THINGS.index(stamp.kind)
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


def write(picture: Picture, left: int, top: int, text: str, font: ImageFont.FreeTypeFont, ink: Ink) -> Box:
    """One line of text in a typeface, its characters labelled; returns where it is."""
    width, height = round(font.getlength(text)), sum(font.getmetrics())
    mask = Image.new("L", (width + 2, height))
    ImageDraw.Draw(mask).text((0, 0), text, fill=255, font=font)
    picture.blend(left, top, np.asarray(mask, np.float32) / np.float32(255), ink)
    box = Box(left, top, min(left + width, picture.width), min(top + height, picture.height))
    label(picture, text, box, [font.getlength(text[:i]) for i in range(len(text) + 1)])
    return box


def label(picture: Picture, text: str, box: Box, ends: Sequence[float]) -> None:
    """Name the patch under the middle of each character; ends[i] is the width of the first i characters."""
    row = min((box.top + box.height // 2) // PATCH, picture.labels.shape[1] - 1)
    for i, character in enumerate(text):
        if character == " ":
            continue
        column = min(int(box.left + (ends[i] + ends[i + 1]) / 2) // PATCH, picture.labels.shape[2] - 1)
        slot = SECOND_CHARACTER if picture.labels[CHARACTER, row, column] else CHARACTER
        picture.labels[slot, row, column] = 1 + PRINTABLE.index(character)


def draw_receipt(rng: random.Random, bank: Bank, difficulty: float = 1.0) -> tuple[Picture, list[Turn]]:
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
    turns = []
    for i, (key, name, value) in enumerate(zip(keys, names, values, strict=True)):
        y = top + i * step
        x = (left + font.getlength(name + " "), left + column, right - font.getlength(value))[style]
        boxes = write(picture, left, y, name, font, ink), write(picture, int(x), y, value, font, ink)
        if boxes[1].right < area.right and boxes[1].bottom <= area.bottom:
            turns.append(Turn("kv", f"what is the {key}?", value, boxes))
    return picture, turns


def spell_value(rng: random.Random, value: str) -> str:
    """Words as they are written in forms; codes and numbers stay."""
    return value.title() if value.isalpha() and rng.random() < 0.7 else value


def draw_manual(rng: random.Random, bank: Bank, difficulty: float = 1.0) -> tuple[Picture, list[Turn]]:
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
        return picture, []
    top = min(w.box.top for line in lines for w in line) - rng.randrange(3, 8)
    bottom = max(w.box.bottom for line in lines for w in line) + rng.randrange(3, 8)
    sheet, zoom = only(page, lines, Box(left, top, left + side, bottom)), SIDE / side
    height = round(sheet.shape[0] * zoom)
    if height > SIDE:
        return picture, []
    strip = np.array(Image.fromarray(sheet).resize((SIDE, height), Image.Resampling.BICUBIC))
    above = rng.randrange(SIDE - height + 1) if rng.random() < 0.3 else (SIDE - height) // 2
    picture.pixels[:] = PAD_COLOR if rng.random() < 0.5 else strip.max()
    tone = np.array([rng.uniform(0.86, 1.0) for _ in range(3)])
    picture.pixels[above : above + height] = (strip[..., None] * tone).astype(np.uint8)
    picture.content = Box(0, above, SIDE, above + height)
    turns = []
    for number, (line, text) in enumerate(zip(lines, texts, strict=True), 1):
        boxes = tuple(magnified(word.box, left, top, zoom, above) for word in line)
        for word, box in zip(line, boxes, strict=True):
            plain = word.text.translate(PLAIN)
            label(picture, plain, box, [box.width * i / len(plain) for i in range(len(plain) + 1)])
        if len(text) <= LONGEST:
            turns.append(Turn("line", f"read line {number}.", text, boxes))
    return picture, turns


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
            picture, turns = (draw_receipt if task == "kv" else draw_manual)(rng, bank)
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


def training_sample(key: str, bank: Bank, difficulty: float) -> tuple[Picture, list[Turn]]:
    """A picture with its turns in asking order.

    40 % things, 15 % receipts, 20 % lines of manuals, 25 % scenes, forms and pages of the tiny models' generator.
    """
    for attempt in range(ATTEMPTS):
        rng = random.Random(f"smol/train/{key}/{attempt}")
        kind = rng.random()
        if kind < 0.40:
            scene = draw_things(rng, bank, difficulty)
            picture = scene.picture
            turns = [t for ask in ASK.values() for t in ask(rng, scene)] + QUESTIONS["extreme"](rng, scene)
        elif kind < 0.55:
            picture, turns = draw_receipt(rng, bank, difficulty)
        elif kind < 0.75:
            picture, turns = draw_manual(rng, bank, difficulty)
        else:
            picture, turns = tiny_sample(f"smol/{key}/{attempt}", difficulty)
            for row in (CHARACTER, SECOND_CHARACTER):
                picture.labels[row] = TINY_CHARACTERS[picture.labels[row]]
        if turns:
            return picture, mixed(rng, turns)
    raise SpecError(f"no training sample in {ATTEMPTS} pictures; the bank holds too little")
