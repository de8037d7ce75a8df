"""Scenes: coloured shapes, letters on shapes and a sign, and what can be asked about them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from .drawing import (
    BOLD_FONTS,
    CENTRE,
    COLOR,
    N_FONTS,
    N_TEXTURES,
    PATCH,
    SHAPE,
    Box,
    Ink,
    Picture,
    crop,
    shape_alpha,
    text_size,
    texture,
)
from .vocabulary import CODE_CHARACTERS, COLORS, EXTREMES, LETTERS, PLURALS, QUADRANTS, SHAPES, WORDS

GAP = 3  # pixels between two things
CLEAR = 12  # pixels by which the leftmost (topmost, ...) object must lead
APART = 18  # pixels by which two centres must differ before one is left of (above, ...) the other
DARK_COLORS = ("red", "green", "blue", "purple", "black")


class Turn(NamedTuple):
    """One question about a picture; `boxes` hold everything the answer depends on."""

    task: str
    question: str
    answer: str
    boxes: tuple[Box, ...] = ()


@dataclass
class Thing:
    shape: str
    color: str
    box: Box
    letter: str | None = None

    @property
    def x(self) -> float:
        return (self.box.left + self.box.right) / 2

    @property
    def y(self) -> float:
        return (self.box.top + self.box.bottom) / 2

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass
class Scene:
    """A picture under construction; everything is placed inside `area`."""

    picture: Picture
    area: Box
    things: list[Thing] = field(default_factory=list)
    taken: list[Box] = field(default_factory=list)
    sign: tuple[str, Box] | None = None

    def place(self, rng: random.Random, width: int, height: int) -> Box | None:
        """A free spot of that size, or None after 24 tries."""
        area = self.area
        if area.width <= width + 2 or area.height <= height + 2:
            return None
        for _ in range(24):
            top = rng.randrange(area.top + 1, area.bottom - height)
            left = rng.randrange(area.left + 1, area.right - width)
            box = Box(left, top, left + width, top + height)
            if all(_apart(box, other) for other in self.taken):
                self.taken.append(box)
                return box
        return None

    def by(self, attribute: str) -> dict[str, list[Thing]]:
        """Things grouped by `shape`, `color` or `name`, in drawing order."""
        groups: dict[str, list[Thing]] = {}
        for thing in self.things:
            groups.setdefault(getattr(thing, attribute), []).append(thing)
        return groups

    def unique(self) -> list[Thing]:
        """Things that colour and shape name without doubt."""
        return [group[0] for group in self.by("name").values() if len(group) == 1]


def _apart(a: Box, b: Box) -> bool:
    return a.bottom + GAP <= b.top or b.bottom + GAP <= a.top or a.right + GAP <= b.left or b.right + GAP <= a.left


def random_code(rng: random.Random, shortest: int, longest: int) -> str:
    return "".join(rng.choice(CODE_CHARACTERS) for _ in range(rng.randint(shortest, longest)))


def draw_scene(
    rng: random.Random,
    difficulty: float,
    size: tuple[int, int],
    padded: bool | None = None,
    region: str | None = None,
    want: str | None = None,
) -> Scene:
    """Draw 2 to 9 things, fewer and larger at low difficulty.

    `region` places all of them in one half; `want` makes a sign or letters likely enough to ask for them.
    """
    picture = Picture(crop(rng, texture(rng.randrange(N_TEXTURES)), size))
    picture.letterbox(rng, padded)
    scene = Scene(picture, picture.content_in(region))
    if want == "sign" or rng.random() < 0.4:
        _draw_sign(rng, scene)
    count = rng.randrange(2, 4 + int(6.99 * max(difficulty, 0.15)))
    colors = list(COLORS)
    same_shape = rng.choice(SHAPES) if rng.random() < 0.35 else None  # so that counting is more than one and two
    same_color = rng.choice(colors) if same_shape is None and rng.random() < 0.4 else None
    repeats = rng.randrange(2, 6)
    seen: set[tuple[str, str]] = set()
    for i in range(count):
        shape = same_shape if same_shape and i < repeats else rng.choice(SHAPES)
        color = same_color if same_color and i < repeats else rng.choice(colors)
        if (shape, color) in seen and rng.random() < 0.8:
            shape, color = rng.choice(SHAPES), rng.choice(colors)
        radius = rng.uniform(15 - 5 * difficulty, 17) if rng.random() < 0.6 else rng.uniform(17, 34)
        letter = None
        if shape in ("circle", "square", "diamond") and (rng.random() < 0.55 or (want == "letter" and i < 2)):
            letter = rng.choice(LETTERS)
            radius = max(radius, 20.0 if shape == "diamond" else 15.0)
        if _draw_thing(rng, scene, shape, color, radius, letter):
            seen.add((shape, color))
    return scene


def _draw_sign(rng: random.Random, scene: Scene) -> None:
    text = random_code(rng, 3, 6) if rng.random() < 0.6 else rng.choice(WORDS)[:7]
    font, size = rng.randrange(N_FONTS), rng.choice((14, 15, 16, 18, 20, 22, 24))
    width, height = text_size(text, font, size)
    plate = scene.place(rng, width + 10, height + 8)
    if plate is None:
        return
    dark = rng.random() < 0.5
    ground = [rng.randrange(20, 70) if dark else rng.randrange(200, 246) for _ in range(3)]
    scene.picture.pixels[plate.top : plate.bottom, plate.left : plate.right] = ground
    box = scene.picture.text(
        plate.left + 5, plate.top + 4, text, font, size, _ink(rng, (215, 250) if dark else (0, 45))
    )
    scene.sign = (text, box)


def _ink(rng: random.Random, span: tuple[int, int]) -> Ink:
    return rng.randrange(*span), rng.randrange(*span), rng.randrange(*span)


def _draw_thing(rng: random.Random, scene: Scene, shape: str, color: str, radius: float, letter: str | None) -> bool:
    picture = scene.picture
    alpha = shape_alpha(shape, radius, rng.uniform(-0.22, 0.22))
    box = scene.place(rng, alpha.shape[1], alpha.shape[0])
    if box is None:
        return False
    red, green, blue = (min(255, max(0, v + rng.randrange(-14, 15))) for v in COLORS[color])
    picture.blend(box.left, box.top, alpha, (red, green, blue))
    thing = Thing(shape, color, box, letter)
    scene.things.append(thing)
    half = max(0.0, radius * 0.72 - 3)
    rows = slice(int(thing.y - half) // PATCH, int(thing.y + half) // PATCH + 1)
    columns = slice(int(thing.x - half) // PATCH, int(thing.x + half) // PATCH + 1)
    picture.labels[SHAPE, rows, columns] = 1 + SHAPES.index(shape)
    picture.labels[COLOR, rows, columns] = 1 + list(COLORS).index(color)
    picture.labels[CENTRE, int(thing.y) // PATCH, int(thing.x) // PATCH] = 1
    if letter:
        size = 12 if radius < 16 else 14 if radius < 19 else 16 if radius < 24 else 20
        font = rng.choice(BOLD_FONTS)
        width, height = text_size(letter, font, size)
        ink = (245, 245, 245) if color in DARK_COLORS else (10, 10, 10)
        picture.text(int(thing.x - width / 2), int(thing.y - height / 2), letter, font, size, ink)
    return True


def _turn(task: str, question: str, answer: str, *things: Thing) -> Turn:
    return Turn(task, question, answer, tuple(thing.box for thing in things))


def _color(rng: random.Random, scene: Scene) -> list[Turn]:
    groups = scene.by("shape").items()
    return [_turn("color", f"what color is the {s}?", g[0].color, g[0]) for s, g in groups if len(g) == 1]


def _shape(rng: random.Random, scene: Scene) -> list[Turn]:
    groups = scene.by("color").items()
    return [_turn("shape", f"which shape is {c}?", g[0].shape, g[0]) for c, g in groups if len(g) == 1]


def _count(rng: random.Random, scene: Scene) -> list[Turn]:
    shapes, colors = scene.by("shape"), scene.by("color")
    groups = [(f"how many {PLURALS[shape]} are there?", shapes.get(shape, [])) for shape in SHAPES]
    groups += [(f"how many {color} objects are there?", colors.get(color, [])) for color in COLORS]
    pool = [("how many objects are there?", scene.things), *(g for g in groups if len(g[1]) > 1)]
    few = [g for g in groups if len(g[1]) < 2]  # nothing or one: enough of them with one question a scene
    pool += rng.sample(few, 1) if few else []
    return [_turn("count", question, str(len(things)), *things) for question, things in pool]


def _exist(rng: random.Random, scene: Scene) -> list[Turn]:
    """As many yes as no; most absent things share colour and shape with things that are there."""
    present, shapes, colors = scene.by("name"), scene.by("shape"), scene.by("color")
    yes = [_turn("exist", f"is there a {name}?", "yes", *things) for name, things in present.items()]
    absent = [(c, s) for c in COLORS for s in SHAPES if f"{c} {s}" not in present]
    hard = [(c, s) for c, s in absent if c in colors and s in shapes]
    easy = [(c, s) for c, s in absent if (c in colors) != (s in shapes)]
    no = []
    for _ in range(3):
        pool = hard if hard and rng.random() < 0.6 else easy or hard
        if pool:
            color, shape = rng.choice(pool)
            no.append(_turn("exist", f"is there a {color} {shape}?", "no"))
    n = min(len(yes), len(no))
    return rng.sample(yes, n) + no[:n]


def _quadrant(rng: random.Random, scene: Scene) -> list[Turn]:
    """Quadrants that hold exactly one thing, which is clear of the two middle lines."""
    middle_x, middle_y, margin, turns = scene.picture.width / 2, scene.picture.height / 2, 9, []
    for quadrant, (bottom, right) in QUADRANTS.items():
        near = [
            thing
            for thing in scene.things
            if (thing.y > middle_y - margin if bottom else thing.y < middle_y + margin)
            and (thing.x > middle_x - margin if right else thing.x < middle_x + margin)
        ]
        if len(near) == 1 and abs(near[0].y - middle_y) > margin and abs(near[0].x - middle_x) > margin:
            turns.append(_turn("quadrant", f"what is at the {quadrant}?", near[0].name, near[0]))
    return turns


def _extreme(rng: random.Random, scene: Scene) -> list[Turn]:
    turns: list[Turn] = []
    if len(scene.things) < 2:
        return turns
    for extreme in EXTREMES:
        axis = "x" if extreme in ("leftmost", "rightmost") else "y"
        order = sorted(
            scene.things, key=lambda t: float(getattr(t, axis)), reverse=extreme in ("rightmost", "bottommost")
        )
        if abs(getattr(order[0], axis) - getattr(order[1], axis)) > CLEAR:
            turns.append(_turn("extreme", f"which object is {extreme}?", order[0].name, order[0]))
    return turns


def _relation(rng: random.Random, scene: Scene) -> list[Turn]:
    unique, turns = scene.unique(), []
    for _ in range(4 if len(unique) > 1 else 0):
        a, b = rng.sample(unique, 2)
        dx, dy = b.x - a.x, b.y - a.y
        options = [("left of", dx > 0), ("right of", dx < 0)] if abs(dx) > APART else []
        options += [("above", dy > 0), ("below", dy < 0)] if abs(dy) > APART else []
        if options:
            relation, true = rng.choice(options)
            turns.append(_turn("relation", f"is the {a.name} {relation} the {b.name}?", "yes" if true else "no", a, b))
    return turns


def _letter(rng: random.Random, scene: Scene) -> list[Turn]:
    return [_turn("letter", f"what letter is on the {t.name}?", t.letter, t) for t in scene.unique() if t.letter]


def _sign(rng: random.Random, scene: Scene) -> list[Turn]:
    if scene.sign is None:
        return []
    text, box = scene.sign
    return [Turn("sign", "what does the sign say?", text, (box,))]


def locate(scene: Scene) -> list[Turn]:
    """Training only: column and row of a thing in tenths of the picture; teaches where things are."""
    width, height = scene.picture.width, scene.picture.height
    return [
        _turn("locate", f"locate the {t.name}.", f"{int(10 * t.x / width)}{int(10 * t.y / height)}", t)
        for t in scene.unique()
    ]


QUESTIONS: dict[str, Callable[[random.Random, Scene], list[Turn]]] = {
    "color": _color,
    "shape": _shape,
    "count": _count,
    "exist": _exist,
    "quadrant": _quadrant,
    "extreme": _extreme,
    "relation": _relation,
    "letter": _letter,
    "sign": _sign,
}
