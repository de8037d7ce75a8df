"""What the synthetic pictures may show and what may be asked about them."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"  # written by build_assets, except for the word list

TASKS = ("color", "shape", "count", "exist", "quadrant", "extreme", "relation", "letter", "sign", "kv", "line", "page")
SCENE_TASKS = TASKS[:9]
DOCUMENT = "document"  # whole sheets of 1,100 visual tokens and more; no task of the small pictures

COLORS = {
    "red": (214, 40, 40),
    "green": (34, 150, 60),
    "blue": (45, 80, 215),
    "yellow": (240, 218, 50),
    "purple": (140, 50, 180),
    "orange": (245, 135, 25),
    "white": (248, 248, 248),
    "black": (18, 18, 18),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "moon")
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
QUADRANTS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}  # row, column
EXTREMES = ("leftmost", "rightmost", "topmost", "bottommost")
RELATIONS = ("left of", "right of", "above", "below")

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:-/#$%+&!"  # the glyph atlas holds these, in this order
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # no I and O: hard to tell from 1 and 0
CODE_CHARACTERS = LETTERS + "0123456789"
MAX_LINES = 7  # lines one may ask for by number

# fmt: off
KEYS = (
    "total", "date", "name", "code", "price", "tax", "city", "phone", "room", "gate", "seat", "order", "weight",
    "size", "time", "model", "level", "unit", "batch", "route", "score", "rate", "item", "cash",
)
# fmt: on
WORDS = tuple((ASSETS / "words.txt").read_text().split())


def all_questions() -> list[str]:
    """Every question the generator can ask; the tokenizer is built from these."""
    things = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    questions = [f"what color is the {shape}?" for shape in SHAPES]
    questions += [f"which shape is {color}?" for color in COLORS]
    questions += [f"how many {PLURALS[shape]} are there?" for shape in SHAPES]
    questions += [f"how many {color} objects are there?" for color in COLORS]
    questions += ["how many objects are there?", "what does the sign say?", "read the text."]
    questions += [f"what is at the {quadrant}?" for quadrant in QUADRANTS]
    questions += [f"which object is {extreme}?" for extreme in EXTREMES]
    questions += [f"is the {thing} {relation} the {thing}?" for thing in things for relation in RELATIONS]
    questions += [f"is there a {thing}?" for thing in things]
    questions += [f"what letter is on the {thing}?" for thing in things]
    questions += [f"locate the {thing}." for thing in things]
    questions += [f"what is the {key}?" for key in KEYS]
    questions += [f"read line {number}." for number in range(1, MAX_LINES + 1)]
    return questions
