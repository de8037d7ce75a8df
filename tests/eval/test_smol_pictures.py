"""Pictures for smol-llava: what is asked is what is drawn, boxes are exact, sources are split once."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from smol_toys import LINES, color_of, open_toy_bank

from vlprune.errors import SpecError, VlpruneError
from vlprune.eval.smol import pictures, sources
from vlprune.eval.smol.pictures import LABEL_CLASSES, TASKS, THINGS, Written, items, mixed, training_sample
from vlprune.eval.smol.sources import KINDS, PLURALS, PRINTABLE, Bank, collect
from vlprune.eval.suites import SUITES, find
from vlprune.eval.tiny import Item
from vlprune.eval.tiny.drawing import CENTRE, CHARACTER, PAD_COLOR, PATCH, SHAPE, Box, Picture
from vlprune.eval.tiny.scenes import Turn


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return open_toy_bank(tmp_path_factory.mktemp("bank"))


def extent(item: Item, kind: str) -> list[Box]:
    """Bounding boxes of the pixels that have a kind's colour, up to brightness; one for each connected thing."""
    pixels = np.asarray(item.image).astype(float)
    red, green, blue = color_of(kind)
    mask = pixels[..., 0] > 150
    for channel, value in ((1, green), (2, blue)):
        mask &= abs(pixels[..., channel] / np.maximum(pixels[..., 0], 1) - value / red) < 0.02
    found: list[Box] = []
    while mask.any():
        y, x = np.argwhere(mask)[0]
        bottom = y + int(np.argmin(np.append(mask[y:, x], False)))
        right = x + int(np.argmin(np.append(mask[y, x:], False)))
        found.append(Box(int(x), int(y), int(right), int(bottom)))
        mask[y:bottom, x:right] = False
    return found


@pytest.mark.parametrize("task", TASKS)
def test_an_item_depends_on_seed_and_number_only(bank: Bank, task: str) -> None:
    few, more, other = items(task, 2, 3, bank), items(task, 3, 3, bank), items(task, 2, 4, bank)
    for a, b in zip(few, more, strict=False):
        assert (a.question, a.answer, a.boxes) == (b.question, b.answer, b.boxes)
        assert a.image.tobytes() == b.image.tobytes()
    assert [i.image.tobytes() for i in few] != [i.image.tobytes() for i in other]


@pytest.mark.parametrize("task", ["what", "count"])
def test_boxes_are_the_extent_of_what_is_named(bank: Bank, task: str) -> None:
    plural = {name: kind for kind, name in PLURALS.items()}
    for item in items(task, 8, 1, bank):
        kind = item.answer if task == "what" else plural[item.question.split()[2]]
        drawn = extent(item, kind)
        assert set(item.boxes) <= set(drawn)
        if task == "count":
            assert len(drawn) == int(item.answer) == len(item.boxes)


def test_answers_name_the_place(bank: Bank) -> None:
    for item in items("where", 8, 2, bank) + items("what", 8, 2, bank):
        box = item.boxes[0]
        below, right = box.top + box.bottom > 336, box.left + box.right > 336
        place = f"{'bottom' if below else 'top'} {'right' if right else 'left'}"
        assert place in (item.answer, item.question.removeprefix("what is at the ").removesuffix("?"))


def test_answers_are_balanced(bank: Bank) -> None:
    assert [i.answer for i in items("exist", 6, 0, bank)] == ["yes", "no"] * 3
    assert [i.answer for i in items("count", 7, 0, bank)] == ["1", "2", "3", "4", "5", "1", "2"]
    for item in items("exist", 6, 0, bank):
        assert bool(item.boxes) == (item.answer == "yes")
        kind = item.question.split()[-1].removesuffix("?")
        assert bool(extent(item, kind)) == (item.answer == "yes")


def test_things_are_labelled_where_they_are(bank: Bank) -> None:
    scene = pictures.draw_things(random.Random(3), bank, repeats=3)
    labels = scene.picture.labels
    assert scene.things and labels[CENTRE].sum() == len(scene.things)
    covered = np.zeros_like(labels[SHAPE])
    for thing in scene.things:
        box = thing.box
        rows = slice(-(-box.top // PATCH), box.bottom // PATCH)
        columns = slice(-(-box.left // PATCH), box.right // PATCH)
        assert (labels[SHAPE, rows, columns] == 1 + THINGS.index(thing.name)).all()  # patches wholly inside
        covered[box.top // PATCH : -(-box.bottom // PATCH), box.left // PATCH : -(-box.right // PATCH)] = 1
    assert not labels[SHAPE][covered == 0].any()


def test_a_receipts_boxes_hold_its_ink(bank: Bank) -> None:
    """Rows of keys and values: every asked value is written inside its box, and no two boxes share a pixel."""
    for number in range(6):
        picture, turns, written = pictures.draw_receipt(random.Random(number), bank)
        boxes = [box for turn in turns for box in turn.boxes]
        assert turns and len({turn.question for turn in turns}) == len(turns)
        seen = np.zeros(picture.pixels.shape[:2], int)
        for box in boxes:
            patch = picture.pixels[box.top : box.bottom, box.left : box.right].astype(int)
            assert patch.max() - patch.min() > 90  # ink on paper
            seen[box.top : box.bottom, box.left : box.right] += 1
        assert seen.max() == 1
        answers = [c for turn in turns for c in turn.answer if c != " "]
        labelled = Counter(picture.labels[CHARACTER].flatten().tolist())
        assert any(labelled[1 + PRINTABLE.index(c)] for c in answers)
        assert {turn.answer for turn in turns} <= {line.text for line in written}


def test_lines_of_a_manual_are_what_stands_there(bank: Bank) -> None:
    for item in items("line", 10, 5, bank):
        line = next(line for line in LINES if line.startswith(item.answer))
        assert len(item.boxes) == len(item.answer.split()) <= len(line.split())
        assert [b.left for b in item.boxes] == sorted(b.left for b in item.boxes)
        pixels = np.asarray(item.image.convert("L")).astype(int)
        content = pixels[item.content.top : item.content.bottom]
        ground = np.median(content)
        for box in item.boxes:
            assert (pixels[box.top : box.bottom, box.left : box.right] < ground - 100).any()


def test_what_stands_beside_a_line_is_painted_over(bank: Bank) -> None:
    """The toy page has a word to the right of its lines that belongs to none of them."""
    assert int(bank.pages[0].pixels[52:80, 500:560].min()) < 10
    drawn = 0
    for number in range(10):
        picture, turns, written = pictures.draw_manual(random.Random(number), bank)
        content = picture.content
        outside = np.zeros((336, 336), bool)
        outside[content.top : content.bottom] = True
        for turn in turns:
            for box in turn.boxes:
                outside[max(0, box.top - 2) : box.bottom + 2, max(0, box.left - 2) : box.right + 2] = False
        grey = picture.pixels.min(-1).astype(int)
        if turns:
            drawn += 1
            assert int(np.ptp(grey[outside])) < 20
            assert {turn.answer for turn in turns} <= set(lines_of(written))
    assert drawn > 5


def lines_of(written: list[Written]) -> list[str]:
    """Words put together to lines: those inside a line begin with their space."""
    lines: list[str] = []
    for text, _, _ in written:
        if text.startswith(" "):
            lines[-1] += text
        else:
            lines.append(text)
    return lines


def test_notes_are_read_line_by_line(bank: Bank) -> None:
    for number in range(6):
        picture, turns, written = pictures.draw_note(random.Random(number), bank)
        texts = [line.text for line in written]
        assert turns and all(turn.answer == texts[int(turn.question.split()[-1].rstrip(".")) - 1] for turn in turns)
        for line in written:
            rows = picture.labels[:, line.row, list(line.columns)]
            characters = [1 + PRINTABLE.index(c) if c != " " else 0 for c in line.text]
            assert all(
                c == 0 or c in rows[:2, i] or rows[1, i] for i, c in enumerate(characters)
            )  # a third has no slot


def test_a_varied_stamp_is_another_picture_of_the_same_thing(bank: Bank) -> None:
    stamp = bank.stamps["bird"][0]
    one, again, other = (pictures.varied_stamp(stamp, number) for number in (1, 1, 2))
    assert np.array_equal(one.pixels, again.pixels) and one.pixels.shape != other.pixels.shape
    assert one.kind == "bird" and (one.pixels[..., 3] > 20).any(1).all() and (one.pixels[..., 3] > 20).any(0).all()


def test_a_picture_is_letterboxed_with_the_mean_colour(bank: Bank) -> None:
    for item in items("line", 4, 9, bank):
        corner = item.image.getpixel((0, 0))
        assert item.content.height < 336
        assert corner == PAD_COLOR or min(corner) > 150 or item.content.top == 0  # type: ignore[arg-type,type-var]


def test_labels_stay_below_their_classes(bank: Bank) -> None:
    for number in range(24):
        picture, turns, _ = training_sample(str(number), bank, number / 24)
        assert 0 < len(turns) <= pictures.MOST_TURNS
        assert picture.pixels.shape == (336, 336, 3)
        assert all(int(row.max()) < most for row, most in zip(picture.labels, LABEL_CLASSES, strict=True))


def test_no_kind_of_question_crowds_out_the_others() -> None:
    turns = [Turn("exist", f"{i}?", "no") for i in range(50)] + [Turn("what", "what?", "a")]
    counts = Counter(turn.task for n in range(40) for turn in mixed(random.Random(n), turns))
    assert counts["what"] == 40  # ten draws at 2 : 1 leave it out once in 59,049 times
    assert counts["exist"] == 360


def test_suites_draw_from_the_bank_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_toy_bank(tmp_path / "bank")
    monkeypatch.setenv(sources.BANK_VARIABLE, str(tmp_path / "bank"))
    assert {name for name in SUITES if name.startswith("smol_")} == {f"smol_{task}" for task in TASKS}
    drawn = find("smol_what").draw(1, 0)[0]
    assert drawn.answer in KINDS
    monkeypatch.setenv(sources.BANK_VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(VlpruneError, match=r"python -m vlprune\.eval\.smol\.sources"):
        find("smol_what").draw(1, 0)


def test_unknown_tasks_name_the_nearest(bank: Bank) -> None:
    with pytest.raises(SpecError, match="did you mean where"):
        items("wher", 1, 0, bank)


def test_stamps_are_split_by_file_and_left_out_by_caption(tmp_path: Path) -> None:
    folder = tmp_path / "animals/birds"
    folder.mkdir(parents=True)
    for number in range(20):
        Image.new("RGBA", (4, 4)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("Tux playing\n" if number < 2 else f"A bird, {number}.\nde=Ein Vogel\n")
    Image.new("RGBA", (4, 4)).save(folder / "nameless.png")
    found = list(sources._stamps(tmp_path))
    assert found == list(sources._stamps(tmp_path))
    assert len(found) == 18 and {kind for kind, *_ in found} == {"bird"}
    assert sum(split == "held-out" for _, _, split, _ in found) == round(18 * sources.HELD_OUT)
    assert len({path for _, path, _, _ in found}) == 18
    assert all(caption.startswith("A bird") and "Vogel" not in caption for *_, caption in found)


def test_a_stamp_is_cut_to_what_is_covered(tmp_path: Path) -> None:
    pixels = np.zeros((300, 400, 4), np.uint8)
    pixels[50:250, 100:140] = 255
    Image.fromarray(pixels).save(tmp_path / "stamp.png")
    (tmp_path / "stamp.webp").write_bytes(sources._stamp(tmp_path / "stamp.png"))
    with Image.open(tmp_path / "stamp.webp") as image:
        assert image.size == (26, 128)


def test_missing_sources_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(VlpruneError, match=r"sources are missing: .*animals/birds.*Lato.*policy\.pdf") as caught:
        collect(tmp_path / "out", root=tmp_path)
    assert not (tmp_path / "out").exists() and "--help" in str(caught.value)


def test_words_of_a_page_become_pixels() -> None:
    text = (
        '<!DOCTYPE html><html xmlns="http://www.w3.org/1999/xhtml"><body><doc><page><flow><block><line>'
        '<word xMin="72.0" yMin="36.0" xMax="90.0" yMax="46.0">a\x02&amp;b</word></line></block></flow></page></doc></body></html>'
    )
    (page,) = sources._parse(text).iter("page")
    assert sources._blocks(page) == [[[sources.Word("a&b", Box(110, 55, 138, 71))]]]


def test_a_picture_holds_no_label_without_a_thing() -> None:
    picture = Picture(np.zeros((336, 336, 3), np.uint8))
    assert pictures.label(picture, "Ab", Box(14, 14, 42, 28), [0, 14, 28]) == Written("Ab", 1, (1, 2))
    assert picture.labels[CHARACTER, 1, 1] == 1 + PRINTABLE.index("A")
    assert picture.labels[CHARACTER, 1, 2] == 1 + PRINTABLE.index("b")
    assert picture.labels.astype(bool).sum() == 2
