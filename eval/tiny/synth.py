"""Seeded pictures with questions: training samples with many turns, and evaluation items with exact evidence boxes."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from vlprune.errors import SpecError, nearest

from .documents import draw_form, draw_page
from .drawing import MAX_SIDE, PATCH, Box, Picture
from .scenes import QUESTIONS, Turn, draw_scene, locate
from .sheets import FEWEST, MOST, SHEET_KINDS, SHEET_SIZES, draw_sheet
from .vocabulary import DOCUMENT, SCENE_TASKS, TASKS

SIDE = 336  # pixels
SHEET_AREA = 400_000  # pixels from which training draws whole sheets
REGIONS = ("upper", "lower")
MIX = {"relation": 3.0, "locate": 2.0, "letter": 2.5, "count": 1.5, "sign": 1.5}  # how often a training turn asks what
ATTEMPTS = 1000  # a picture on which the question cannot be asked is drawn anew


@dataclass(frozen=True, eq=False)
class Item:
    """One question about one picture.

    `boxes` (left, top, right, bottom, in pixels) hold the evidence, in reading order of the question; a rightly denied
    existence and a count of nothing have none. `content` is the part of the picture that is not padding, so
    `original_size` is what a photograph had before it was padded to a square.
    """

    task: str
    index: int
    seed: int
    image: Image.Image
    question: str
    answer: str
    boxes: tuple[Box, ...]
    content: Box

    @property
    def original_size(self) -> tuple[int, int]:
        """(width, height) without the padding."""
        return self.content.width, self.content.height


def items(
    task: str,
    n: int,
    seed: int,
    *,
    size: tuple[int, int] | None = None,
    padded: bool | None = None,
    region: str | None = None,
) -> list[Item]:
    """The first n items of a task. Item i depends on its arguments and on i only, not on n and not on the process.

    Args:
        task: one of TASKS, or "document". exist and relation alternate between yes and no, count runs through 1 to 6,
            documents through their kinds.
        seed: any int; another seed gives other pictures. Training never draws any of them.
        size: (width, height) in pixels, multiples of 14 between 112 and 1344; default: 336 x 336, and the four
            SHEET_SIZES in turn for documents.
        padded: True letterboxes every picture, False none, None about a third of the square ones, as in training.
        region: "upper" or "lower" puts all evidence into that half of the picture. Documents take neither.
    Raises:
        SpecError: an unknown task or region, or a size out of range.
    """
    return [item(task, index, seed, size=size, padded=padded, region=region) for index in range(n)]


def item(
    task: str,
    index: int,
    seed: int,
    *,
    size: tuple[int, int] | None = None,
    padded: bool | None = None,
    region: str | None = None,
) -> Item:
    """Item number `index` of `items(task, n, seed, ...)`."""
    known = (*TASKS, DOCUMENT)
    if task not in known:
        raise SpecError(f"unknown task {task!r}{nearest(task, known)} (tasks: {', '.join(known)})")
    if size is None:
        size = SHEET_SIZES[index % len(SHEET_SIZES)] if task == DOCUMENT else (SIDE, SIDE)
    if region is not None and region not in REGIONS:
        raise SpecError(f"unknown region {region!r} (regions: {', '.join(REGIONS)}, or None)")
    if any(side % PATCH or not 112 <= side <= MAX_SIDE for side in size):
        raise SpecError(f"size {size}: each side must be a multiple of {PATCH} from 112 to {MAX_SIDE} pixels")
    for attempt in range(ATTEMPTS):
        rng = random.Random(f"{seed}/{task}/{index}/{attempt}")
        if task == DOCUMENT:
            picture, turns = _read_sheet(rng, index, size)
        else:
            picture, turns = _ask(rng, task, size, padded, region)
        answer = _forced_answer(task, index)
        turns = [turn for turn in turns if answer in (None, turn.answer) and _inside(turn.boxes, picture, region)]
        if turns:
            turn = rng.choice(turns)
            image = Image.fromarray(picture.pixels)
            return Item(task, index, seed, image, turn.question, turn.answer, turn.boxes, picture.content)
    raise SpecError(f"no {task} item fits size {size}, padded={padded}, region={region} (item {index} of seed {seed})")


def _ask(
    rng: random.Random, task: str, size: tuple[int, int], padded: bool | None, region: str | None
) -> tuple[Picture, list[Turn]]:
    """Counting and page reading look at everything, so a region moves everything; elsewhere distractors stay around."""
    if task in SCENE_TASKS:
        scene = draw_scene(rng, 1.0, size, padded, region if task == "count" else None, want=task)
        return scene.picture, QUESTIONS[task](rng, scene) if scene.things else []
    if task == "kv":
        form = draw_form(rng, 1.0, size, padded)
        return form.picture, form.field_turns()
    if task == "line":
        page = draw_page(rng, 1.0, size, padded, characters=(40, 110))
        return page.picture, page.line_turns()
    page = draw_page(rng, 1.0, size, padded, region, characters=(40, 150))
    return page.picture, [page.page()]


def _read_sheet(rng: random.Random, index: int, size: tuple[int, int]) -> tuple[Picture, list[Turn]]:
    sheet = draw_sheet(rng, 1.0, size, SHEET_KINDS[index % len(SHEET_KINDS)])
    turn = sheet.page()
    return sheet.picture, [turn._replace(task=DOCUMENT)] if FEWEST <= len(turn.answer) <= MOST else []


def _forced_answer(task: str, index: int) -> str | None:
    """Answers that are dealt in turn, so that no answer is worth guessing."""
    if task == "count":
        return str(1 + index % 6)
    return ("yes", "no")[index % 2] if task in ("exist", "relation") else None


def _inside(boxes: tuple[Box, ...], picture: Picture, region: str | None) -> bool:
    if region == "upper":
        return all(box.bottom <= picture.height / 2 for box in boxes)
    if region == "lower":
        return all(box.top >= picture.height / 2 for box in boxes)
    return True


def training_sample(
    key: str, difficulty: float, size: tuple[int, int] = (SIDE, SIDE), max_turns: int = 9
) -> tuple[Picture, list[Turn]]:
    """A picture with many turns, in asking order: 45 % scenes, 24 % forms, 31 % pages; large ones are mostly sheets.

    Args:
        key: names the sample; any text that is not used twice.
        difficulty: 0 (few large things, short text) to 1 (what `items` draws).
    """
    rng = random.Random(f"train/{key}")
    area = size[0] * size[1]
    if area >= SHEET_AREA and rng.random() < (0.9 if area >= 2 * SHEET_AREA else 0.5):
        return _sheet_sample(rng, difficulty, size)
    kind = rng.random()
    if kind < 0.45:
        scene = draw_scene(rng, difficulty, size)
        pools = {task: ask(rng, scene) for task, ask in QUESTIONS.items()} | {"locate": locate(scene)}
        pools = {task: rng.sample(turns, len(turns)) for task, turns in pools.items() if turns}
        turns: list[Turn] = []
        while pools and len(turns) < max_turns:
            task = rng.choices(list(pools), [MIX.get(name, 1.0) for name in pools])[0]
            turns.append(pools[task].pop())
            if not pools[task]:
                del pools[task]
        return scene.picture, turns
    form = kind < 0.69
    document = draw_form(rng, difficulty, size) if form else draw_page(rng, difficulty, size)
    turns = document.field_turns() + document.line_turns()
    rng.shuffle(turns)
    if rng.random() < (0.4 if form else 0.85):
        turns.insert(0, document.page())
    elif not form:
        turns.insert(min(1, len(turns)), document.page())
    return document.picture, turns


def _sheet_sample(rng: random.Random, difficulty: float, size: tuple[int, int]) -> tuple[Picture, list[Turn]]:
    """Mostly the whole text first, then lines and fields."""
    sheet = draw_sheet(rng, difficulty, size)
    turns = sheet.field_turns() + sheet.line_turns()
    rng.shuffle(turns)
    turns.insert(0 if rng.random() < 0.85 else min(2, len(turns)), sheet.page())
    return sheet.picture, turns
