"""Drawing: what is clear, faded, coloured and written where; sheets; the way of a focus. Geometry has its own file."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image, ImageChops

import vlprune
from vlprune import Grid
from vlprune.draw import Fate, compare, gif, overlay, pieces, style
from vlprune.draw.focus import frames, spelled, words
from vlprune.draw.overlay import cells, levels, ranks
from vlprune.draw.sheet import Panel, contact, sheet
from vlprune.errors import PruningError, SpecError
from vlprune.geometry import Fitted, Lens, NearestShape
from vlprune.trace import ItemTrace, Look, StageTrace, Trace

SIZE = (120, 80)
GRID = Grid(1, 4, 6)  # cells of 20 x 20
(VIEW,) = Lens().views(SIZE, [(GRID,)])
BOXES = {cell.token: cell.box for cell in cells(VIEW, SIZE)}


@pytest.fixture
def picture() -> Image.Image:
    """Every pixel another colour than its neighbours', none of them grey."""
    image = Image.new("RGB", SIZE)
    image.putdata([(40 + x % 7 * 30, 30 + y % 5 * 40, 200 - (x + y) % 11 * 15) for y in range(SIZE[1]) for x in range(SIZE[0])])  # fmt: skip
    return image


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and ImageChops.difference(a, b).getbbox() is None


def inner(box: tuple[int, int, int, int], by: int = 2) -> tuple[int, int, int, int]:
    """Without the line around kept tokens."""
    return box[0] + by, box[1] + by, box[2] - by, box[3] - by


def colours(image: Image.Image) -> set[Any]:
    return {colour for _, colour in image.getcolors(1 << 16) or []}


def luminance(image: Image.Image) -> float:
    """Mean, 0 to 255."""
    small: Any = image.convert("L").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    return float(small)


# ---- one picture


def test_kept_pixels_are_the_pictures_own_and_dropped_ones_fade(picture: Image.Image) -> None:
    kept = frozenset({0, 1, 8, 23})
    out = overlay(picture, VIEW, [Fate(kept)])
    assert out.size == picture.size
    for token, box in BOXES.items():
        own = same(out.crop(box), picture.crop(box))
        assert own == (token in kept)
        if token not in kept:
            faded = colours(out.crop(inner(box)))
            assert all(max(c) - min(c) <= 4 for c in faded)  # grey
            assert len(faded) > 1  # and still something to recognise
    left, top, _, _ = BOXES[8]
    assert out.getpixel((left - 1, top + 5)) == style.KEPT  # the line lies on the dropped side
    assert out.getpixel((BOXES[0][2] - 1, 5)) == picture.getpixel((BOXES[0][2] - 1, 5))  # and not between kept ones


def test_extremes_and_modes(picture: Image.Image) -> None:
    assert same(overlay(picture, VIEW, [Fate(frozenset(range(24)))]), picture)
    assert style.KEPT not in colours(overlay(picture, VIEW, [Fate(frozenset())]))
    for mode in ("L", "RGBA", "P"):
        assert overlay(picture.convert(mode), VIEW, [Fate(frozenset({3}))]).mode == "RGB"


def test_what_no_token_shows_is_hatched_and_no_cell_leaves_the_picture(picture: Image.Image) -> None:
    (view,) = Fitted(40, 10, shortest=40, crop=(40, 40)).views(SIZE, [(Grid(1, 4, 4),)])
    assert [cell.box for cell in cells(view, SIZE)][:5] == [
        (20, 0, 40, 20), (40, 0, 60, 20), (60, 0, 80, 20), (80, 0, 100, 20), (20, 20, 40, 40)]  # fmt: skip
    out = overlay(picture, view, [Fate(frozenset(range(16)))])
    assert same(out.crop((20, 0, 100, 80)), picture.crop((20, 0, 100, 80)))
    assert style.RULE in colours(out.crop((102, 0, 120, 80)))
    (padded,) = Fitted(square=True).views(SIZE, [(Grid(1, 6, 6),)])
    seen = [cell for cell in cells(padded, SIZE) if cell.seen]
    assert [cell.token for cell in seen] == list(range(6, 30))
    assert all(0 <= c.box[0] < c.box[2] <= 120 and 0 <= c.box[1] < c.box[3] <= 80 for c in seen)


def test_scores_get_lighter_as_they_rise_and_ranks_in_steps(picture: Image.Image) -> None:
    flat = Image.new("RGB", SIZE, (128, 128, 128))
    scores = {token: float(token) ** 3 for token in range(23)}  # token 23 has none
    for show in ("score", "rank"):
        out = overlay(flat, VIEW, [Fate(frozenset({5}), scores)], show)
        light = [luminance(out.crop(inner(BOXES[token]))) for token in range(23)]
        if show == "rank":  # the numbers printed in the cells are no part of the colour
            light = [
                luminance(out.crop((BOXES[t][0] + 2, BOXES[t][3] - 4, BOXES[t][2] - 2, BOXES[t][3] - 2)))
                for t in range(23)
            ]
            assert all(b > a for a, b in itertools.pairwise(light))
        assert all(b >= a for a, b in itertools.pairwise(light))
        assert light[-1] - light[0] > 60
        assert style.PAPER in colours(out)  # the line around token 5
    assert levels([0.0] * 97 + [7.0, 8.0, 1000.0]) == (0.0, 7.0)
    assert ranks([Fate(frozenset(), {0: 1.0, 1: 5.0, 2: 5.0, 3: float("nan")})]) == {(0, 1): 1, (0, 2): 2, (0, 0): 3, (0, 3): 4}  # fmt: skip


def test_the_scale_is_told_apart_by_lightness_alone() -> None:
    light = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in (style.shade(i / 50) for i in range(51))]
    assert all(b > a for a, b in itertools.pairwise(light))
    assert style.shade(-1) == style.SCALE[0]
    assert style.shade(2) == style.SCALE[-1]
    assert [style.legible(style.shade(v)) for v in (0, 1)] == [style.PAPER, style.INK]


def test_merged_tokens_take_the_colour_of_their_target(picture: Image.Image) -> None:
    out = overlay(picture, VIEW, [Fate(frozenset({0, 20}), merged={1: 0, 2: 0, 21: 20})], "merge")
    rims = [out.getpixel(BOXES[token][:2]) for token in (0, 20)]
    assert set(rims) <= set(style.GROUPS)
    assert rims[0] != rims[1]
    assert same(out.crop(inner(BOXES[20], 3)).crop((0, 0, 4, 4)), picture.crop(inner(BOXES[20], 3)).crop((0, 0, 4, 4)))
    flat = overlay(
        Image.new("RGB", SIZE, "white"), VIEW, [Fate(frozenset({0, 20}), merged={1: 0, 2: 0, 21: 20})], "merge"
    )
    at = {token: flat.getpixel((BOXES[token][0] + 4, BOXES[token][1] + 4)) for token in (2, 21, 10)}
    for token, rim in ((2, rims[0]), (21, rims[1])):
        half = style.blend(style.PAPER, rim, 0.5)  # type: ignore[arg-type]
        assert max(abs(a - b) for a, b in zip(at[token], half, strict=True)) <= 1  # type: ignore[arg-type]  # PIL rounds down
    assert len(set(at.values())) == 3  # token 10 is faded only


def test_what_cannot_be_drawn_is_said(picture: Image.Image) -> None:
    with pytest.raises(SpecError, match="no drawing called 'scores'; did you mean score"):
        overlay(picture, VIEW, [Fate(frozenset({0}))], "scores")
    for show, why in (("score", "have no scores"), ("rank", "have no scores"), ("merge", "nothing was merged")):
        with pytest.raises(SpecError, match=why):
            overlay(picture, VIEW, [Fate(frozenset({0}))], show)


# ---- sheets


def found(sheet_: Image.Image, part: Image.Image) -> list[tuple[int, int]]:
    """Upper left corners at which a picture lies on a sheet."""
    first = part.getpixel((0, 0))
    places = [(x, y) for y in range(sheet_.height - part.height + 1) for x in range(sheet_.width - part.width + 1)
              if sheet_.getpixel((x, y)) == first]  # fmt: skip
    return [p for p in places if same(sheet_.crop((*p, p[0] + part.width, p[1] + part.height)), part)]


def test_compare_has_a_row_a_method_and_a_column_a_budget() -> None:
    tones = {f"{name}:keep={keep}": Image.new("RGB", (90, 60), (10 + 50 * i, 120, 10 + 70 * k))
             for i, name in enumerate(("holov:alpha=0.25", "fastv@2")) for k, keep in enumerate((0.333, 64))}  # fmt: skip
    out = compare(tones)
    places = {plan: found(out, image) for plan, image in tones.items()}
    assert all(len(p) == 1 for p in places.values())
    at = {plan: p[0] for plan, p in places.items()}
    a, b, c, d = at.values()
    assert a[1] == b[1] < c[1] == d[1]
    assert a[0] == c[0] < b[0] == d[0]
    assert style.INK in colours(out.crop((0, 0, a[0], out.height)))  # names
    assert style.INK in colours(out.crop((a[0], 0, out.width, a[1])))  # budgets
    pairs = compare({("one", "left"): tones["fastv@2:keep=64"], ("two", "right"): tones["fastv@2:keep=0.333"]})
    assert len(found(pairs, tones["fastv@2:keep=64"])) == 1  # two places stay empty
    with pytest.raises(SpecError, match="names no single budget"):
        compare({"divprune:keep=0.5+fastv@8:keep=0.2": Image.new("RGB", (4, 4))})
    with pytest.raises(SpecError, match="needs pictures by plan"):
        compare({})


def test_long_titles_are_cut_to_their_column() -> None:
    narrow = sheet([[Panel(Image.new("RGB", (60, 40), "black"), "a title much too long for a column of sixty pixels")]])
    wide = sheet([[Panel(Image.new("RGB", (60, 40), "black"), "short")]])
    assert narrow.size == wide.size
    assert style.fitted("word " * 40, 20, 100)[0].endswith("...")
    text, size = style.fitted("word", 20, 100)
    assert (text, size) == ("word", 20)


def test_contact_sheets_shrink_and_fill_rows() -> None:
    out = contact([Panel(Image.new("RGB", (1000, 500), (i, 0, 0)), f"frame {i}") for i in range(6)], widest=200)
    assert 2 * 200 < out.width < 3 * 200  # two to a row, about as wide as high by three to two
    assert out.height < out.width
    with pytest.raises(SpecError, match="no picture to lay out"):
        sheet([[None]])
    with pytest.raises(SpecError, match="no picture to lay out"):
        words(Image.new("RGB", SIZE), VIEW, gazes(), ["", " "])  # nothing was written


# ---- a trace


@pytest.fixture
def run() -> Callable[..., Trace]:
    made: dict[str, Any] = {}

    def go(family: str, plan: str, **options: Any) -> Trace:
        if family not in made:
            made[family] = tiny.FAMILIES[family]()
        model, inputs = made[family]
        with vlprune.pruning(model, plan), torch.no_grad():
            model(**inputs(**options))
            return vlprune.trace(model)

    return go


def test_a_trace_draws_its_pictures(run: Callable[..., Trace]) -> None:
    trace = run("llava", "uniform:keep=0.5+fastv@2:keep=0.25")
    image = Image.effect_noise((64, 32), 60).convert("RGB")
    out = trace.draw(image)  # the middle square of 4 x 4 tokens
    boxes = [(16 + 8 * (t % 4), 8 * (t // 4), 24 + 8 * (t % 4), 8 + 8 * (t // 4)) for t in range(16)]
    own = [t for t, box in enumerate(boxes) if same(out.crop(box), image.crop(box))]
    assert own == trace.cells(0, 0)
    assert len(own) == 4
    first = trace.draw(image, stage="projector")
    assert [t for t, box in enumerate(boxes) if same(first.crop(box), image.crop(box))] == trace.cells(
        stage="projector"
    )
    stages = trace.draw(image, stage="all")
    assert found(stages, out)
    assert found(stages, first)
    both = trace.draw([image, image.rotate(180)], row=1)  # two pictures in the second row
    assert found(both, trace.draw(image, row=1))
    assert found(both, trace.draw(image.rotate(180), row=1, picture=1))
    assert trace.draw(image, "score").size == image.size  # of the last stage that has scores
    assert trace.draw(image, "score", labels=True).height > image.height
    for wrong, why in (
        (dict(images=image, stage="7"), "nothing ran at stage '7'"),
        (dict(images=[image] * 3), "do not make the 1 runs"),
        (dict(images=image, picture=4), "has 1 runs"),
        (dict(images=image, row=9), "has 0 runs"),
        (dict(images=image, show="merge"), "nothing was merged"),
    ):
        with pytest.raises(SpecError, match=why):
            trace.draw(**wrong)  # type: ignore[arg-type]


def test_stages_that_merge_say_what_into(run: Callable[..., Trace]) -> None:
    trace = run("llava", "visionzip:keep=4:contextual=0.5")
    fates = trace.fates(trace.stages[0])
    kept, merged = fates[0].kept, fates[0].merged
    assert len(kept) == 4
    assert merged
    assert set(merged.values()) <= kept
    assert not set(merged) & kept
    assert trace.draw(Image.new("RGB", (32, 32)), "merge").size == (32, 32)


def test_tiles_and_videos_become_sheets(run: Callable[..., Trace]) -> None:
    trace = run("llava_next", "uniform:keep=0.5")
    image = Image.effect_noise((64, 40), 60).convert("RGB")
    out = trace.draw(image)
    assert out.width > 2 * image.width  # the whole picture and the tiles
    trace = run("qwen2_5_vl", "uniform:keep=0.5", batch=1, video=True)
    film = [Image.new("RGB", (64, 32), (60 * i, 90, 200)) for i in range(4)]
    still = Image.new("RGB", (48, 32), (200, 30, 90))
    mixed = trace.draw([still, film])
    kept = colours(mixed)
    assert (200, 30, 90) in kept
    assert {(0, 90, 200), (120, 90, 200)} <= kept  # frames 0 and 2 stand for two each
    assert (60, 90, 200) not in kept
    only = Trace("uniform:keep=0.5", "qwen2_vl")
    only.pictures = [ItemTrace(0, 0, Grid(2, 2, 4), 16, 16, grids=(Grid(2, 2, 4),), video=True)]
    sheet_ = only.draw(film)  # a flat list, where a video is all there is
    assert {(0, 90, 200), (120, 90, 200)} <= colours(sheet_)


# ---- the way of a focus


TOKENS = ["The", " cat", "\n", "s", "at", ""]


def gazes() -> dict[int, list[Fate]]:
    """A focus that moves one cell to the right with every token."""
    return {n: [Fate(frozenset({n, n + 6}), {t: float(t == n) for t in range(24)})] for n in range(6)}


def test_frames_follow_the_focus(picture: Image.Image) -> None:
    film = frames(picture, VIEW, gazes(), TOKENS)
    assert len(film) == 6
    assert len({frame.size for frame in film}) == 1
    for n, frame in enumerate(film):
        below = (BOXES[n + 6][0] + 2, BOXES[n + 6][1] + 12, BOXES[n + 6][2], BOXES[n + 6][3])  # away from the ring
        assert same(frame.crop(below), picture.crop(below))
        text = frame.crop((0, SIZE[1], *frame.size))
        assert (style.FOCUS in colours(text)) == bool(TOKENS[n].strip())
        assert style.FOCUS in colours(frame.crop((0, 0, *SIZE)))
    assert len(frames(picture, VIEW, gazes(), TOKENS[:2])) == 2


def test_words_gather_their_tokens(picture: Image.Image) -> None:
    assert spelled(TOKENS) == [("The", [0]), ("cat", [1]), ("sat", [3, 4])]
    assert spelled(["a ", "b", "", "c"]) == [("a", [0]), ("bc", [1, 3])]
    out = words(picture, VIEW, gazes(), TOKENS)
    assert out.width > 2 * SIZE[0]
    one = words(picture, VIEW, gazes(), ["", "", "", "s", "at"])
    light = found(one, overlay(picture, VIEW, [Fate(frozenset({3, 4, 9, 10}), {t: 0.5 * (t in (3, 4)) for t in range(24)})], "score"))  # fmt: skip
    assert len(light) == 1


def test_gifs_move(picture: Image.Image, tmp_path: Path) -> None:
    path = gif(frames(picture, VIEW, gazes(), TOKENS), tmp_path / "focus.gif", seconds=0.1)
    film: Any = Image.open(path)
    assert film.n_frames == 6
    assert film.info["loop"] == 0
    seen = []
    for n in range(6):
        film.seek(n)
        seen.append((film.info["duration"], film.convert("RGB").tobytes()))
    assert [duration for duration, _ in seen] == [100] * 5 + [1100]
    assert len({pixels for _, pixels in seen}) == 6
    with pytest.raises(SpecError, match="no frames"):
        gif([], tmp_path / "none.gif")


def test_pieces_are_what_each_token_adds() -> None:
    class Processor:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return " ".join("abc"[i] for i in ids if i < 3)  # a tokenizer that joins with spaces

    assert pieces(Processor(), torch.tensor([0, 1, 9, 2])) == ["a", " b", "", " c"]


def test_choices_are_recorded_only_where_asked() -> None:
    model, inputs = tiny.FAMILIES["llava"]()
    given = inputs(batch=2)
    vlprune.wrap(model, "fastocr:keep=0.25:least=0:focal_layers=1/2")
    options: dict[str, Any] = dict(max_new_tokens=4, do_sample=False)
    plain = model.generate(**given, **options)
    with pytest.raises(PruningError, match=r"inside `with vlprune\.recording\(model\):`"):
        vlprune.trace(model).gazes()
    with vlprune.recording(model):
        assert torch.equal(model.generate(**given, **options), plain)
    trace = vlprune.trace(model)
    assert trace.looks is not None
    assert {(look.step, look.layer) for look in trace.looks} == {(0, 2), *((s, k) for s in (1, 2, 3) for k in (1, 2))}
    assert {(look.row, look.picture) for look in trace.looks} == {(0, -1), (1, -2), (1, -1)}
    for picture, row in ((0, 0), (0, 1), (1, 1)):
        way = trace.gazes(picture, row)
        assert list(way) == [0, 1, 2, 3]
        for fate in way.values():
            assert len(fate.kept) == 4
            assert sorted(fate.scores) == list(range(16))
            worst = min(fate.scores[t] for t in fate.kept)
            assert all(s <= worst for t, s in fate.scores.items() if t not in fate.kept)
    image = Image.effect_noise((48, 32), 60).convert("RGB")
    film = trace.focus(image, list("abcd"), row=1, picture=1)
    assert len(film) == 4
    assert trace.words(image, ["a", "b", " c", "d"]).width > image.width


def test_a_page_in_tiles_is_followed_over_all_of_them() -> None:
    """Four runs of 2 x 2 tokens and one of the whole page: the focus is drawn on the tiles."""
    trace = Trace("fastocr@decode:keep=0.25", "internvl", lens=NearestShape(40, most=4))
    runs = [(Grid(1, 2, 2),)] * 5
    trace.pictures = [ItemTrace(0, k, grids[0], 4, 4, grids=grids) for k, grids in enumerate(runs)]
    trace.looks = [Look(n, 3, 0, k - 5, torch.tensor([n]), torch.eye(4)[n] * (1 + (k == n)), None) for n in range(3) for k in range(5)]  # fmt: skip
    image = Image.effect_noise((80, 80), 60).convert("RGB")
    film = trace.focus(image, ["a", "b", "c"])
    assert len(film) == 3
    for n, frame in enumerate(film):  # the n-th token of every tile stays clear, the ring is in the n-th tile
        for k in range(4):
            left, top = 40 * (k % 2) + 20 * (n % 2), 40 * (k // 2) + 20 * (n // 2)
            box = (left + 2, top + 2, left + 18, top + 18)
            ring = style.FOCUS in colours(frame.crop(box))
            assert ring == (k == n)
            assert ring or n or same(frame.crop(box), image.crop(box))  # later frames have lines over other cells
    assert trace.words(image, ["a", "b", "c"]).width > image.width


def test_a_pruned_page_keeps_its_cells_in_the_way() -> None:
    """After a prefill stage the choice is among survivors: cells are numbers in the whole picture."""
    look = Look(1, 2, 0, 0, torch.tensor([0, 2]), torch.tensor([0.5, 0.1, 0.9]), torch.tensor([4, 7, 11]))
    fate = look.fate()
    assert (fate.kept, {t: round(s, 3) for t, s in fate.scores.items()}) == ({4, 11}, {4: 0.5, 7: 0.1, 11: 0.9})
    item = ItemTrace(
        0, 0, GRID, 3, 2, torch.tensor([0, 2]), torch.tensor([0.5, 0.1, 0.9]), torch.tensor([24, 27, 31]), 20
    )
    assert (item.fate().kept, sorted(item.fate().scores)) == ({4, 11}, [4, 7, 11])
    assert StageTrace("2", "fastv@2").title == "fastv, before layer 2"
