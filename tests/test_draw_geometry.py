"""A token's cell lies on the pixels it saw: painted pictures through the real processors and the models' own towers."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import tiny
import torch
import transformers as tf
from PIL import Image
from torch import Tensor

from vlprune.adapters.base import find
from vlprune.context import Grid
from vlprune.draw.overlay import cells
from vlprune.errors import SpecError
from vlprune.geometry import AnyResolution, Canvas, Fitted, Lens, LongestEdge, NearestShape, PanAndScan, View

RAW: dict[str, Any] = {"do_rescale": False, "do_normalize": False, "resample": Image.Resampling.NEAREST}
PINPOINTS = tiny.PINPOINTS
PAINT = 7  # blue of what is painted


def anyres(side: int) -> dict[str, Any]:
    return {"image_grid_pinpoints": [[a * side // 32, b * side // 32] for a, b in PINPOINTS],
            "size": {"height": side, "width": side}, "crop_size": {"height": side, "width": side}}  # fmt: skip


def odd_onevision() -> Any:
    """A tower whose patches leave four pixels of each side out, as SigLIP's 14 leave 6 of 384."""
    config = tf.LlavaOnevisionConfig(
        vision_config=tiny.siglip(image=36), text_config=dict(tiny.TEXT, model_type="qwen2"), image_token_id=tiny.IMG,
        video_token_id=tiny.VID, image_grid_pinpoints=anyres(36)["image_grid_pinpoints"], vision_feature_layer=-1,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    return tiny.build(tf.LlavaOnevisionForConditionalGeneration, config, "eager")


def odd_llava() -> Any:
    config = tf.LlavaConfig(
        vision_config=tiny.siglip(image=36), text_config=dict(tiny.TEXT, model_type="llama"), image_token_id=tiny.IMG,
        image_seq_length=16, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return tiny.build(tf.LlavaForConditionalGeneration, config, "eager")


def of(family: str, **options: Any) -> Callable[[], Any]:
    return lambda: tiny.FAMILIES[family]("eager", **options)[0]


class Case(NamedTuple):
    model: Callable[[], Any]
    processor: str  # class name, without ImageProcessor
    settings: dict[str, Any]
    sizes: tuple[tuple[int, int], ...]  # (width, height), none smaller than what the tower sees: nothing is enlarged


CROP = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
QWEN = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 2048}}
TILES = {"size": {"height": 32, "width": 32}, "crop_to_patches": True, "max_patches": 6}
SPLIT = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}}
CASES = {
    "llava": Case(of("llava"), "CLIP", CROP, ((32, 32), (57, 32), (32, 90), (131, 77), (64, 203))),
    "llava-cls": Case(of("llava", strategy="full"), "CLIP", CROP, ((50, 33),)),
    "llava-padded": Case(of("llava"), "Llava", {**CROP, "do_pad": True}, ((32, 32), (57, 32), (33, 90), (131, 77))),
    "llava-siglip": Case(odd_llava, "Siglip", {"size": {"height": 36, "width": 36}}, ((36, 36), (101, 37))),
    "llava_next": Case(of("llava_next"), "LlavaNext", {**anyres(32), "size": {"shortest_edge": 32}},
                       ((64, 64), (64, 40), (65, 200), (150, 71), (97, 64))),
    "llava_onevision": Case(of("llava_onevision"), "LlavaOnevision", anyres(32), ((64, 64), (150, 71), (65, 200))),
    "llava_onevision-odd": Case(odd_onevision, "LlavaOnevision", anyres(36), ((72, 72), (150, 76), (80, 191))),
    "qwen2_vl": Case(of("qwen2_vl"), "Qwen2VL", QWEN, ((32, 32), (64, 24), (67, 101), (163, 94))),
    "qwen2_5_vl": Case(of("qwen2_5_vl"), "Qwen2VL", QWEN, ((72, 40), (67, 101))),
    "qwen3_vl": Case(of("qwen3_vl"), "Qwen2VL", QWEN, ((72, 40), (67, 101))),
    "internvl": Case(of("internvl"), "GotOcr2", TILES, ((32, 32), (96, 64), (131, 70), (70, 200))),
    "idefics3": Case(of("idefics3"), "Idefics3", SPLIT, ((96, 96), (192, 128), (100, 201), (96, 20))),
    "idefics3-whole": Case(of("idefics3"), "Idefics3", {**SPLIT, "do_image_splitting": False}, ((96, 50),)),
    "smolvlm": Case(of("smolvlm"), "SmolVLM", SPLIT, ((128, 192),)),
    "gemma3": Case(of("gemma3"), "Gemma3", {"size": {"height": 32, "width": 32}}, ((32, 32), (100, 41))),
    "gemma3-scan": Case(of("gemma3"), "Gemma3", {
        "size": {"height": 32, "width": 32}, "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 32,
        "pan_and_scan_max_num_crops": 4, "pan_and_scan_min_ratio_to_activate": 1.2}, ((132, 64), (40, 129), (101, 40))),
    "paligemma": Case(of("paligemma"), "Siglip", {"size": {"height": 32, "width": 32}}, ((32, 32), (77, 50))),
    "mistral3": Case(of("mistral3"), "Pixtral", {"patch_size": 8, "size": {"longest_edge": 64}}, ((64, 64), (130, 67))),
}  # fmt: skip


@cache
def quieted(name: str) -> Any:
    """A case's adapter, with the tower's blocks put out: a token then depends on the patches it was made of alone."""
    adapter = find(CASES[name].model())
    for block in adapter.blocks:
        block.forward = lambda hidden_states, *_, **__: hidden_states
    return adapter


def tokens_of(adapter: Any, inputs: dict[str, Any]) -> Tensor:
    """[N, D] all visual tokens, as the language model gets them."""
    method = adapter.core.get_image_features
    takes = inspect.signature(method).parameters
    out = method(**{k: v for k, v in inputs.items() if k in takes}, return_dict=True).pooler_output
    parts = [out] if isinstance(out, Tensor) else out
    return torch.cat([part.flatten(0, -2) for part in parts])


def painted(view: View, size: tuple[int, int], starts: list[int]) -> Image.Image:
    """Every cell in a colour that says its token: number among all, plus one, in red and green."""
    image = Image.new("RGB", size)
    for cell in cells(view, size):
        if cell.seen:
            number = starts[cell.run] + cell.token + 1
            image.paste((number % 256, number // 256, PAINT), cell.box)
    return image


def patches_of(adapter: Any, inputs: dict[str, Any]) -> Tensor:
    """[N, pixels] bool, the pixels that each token was made of, by its gradient."""
    pixels = inputs["pixel_values"].float().requires_grad_()
    tokens = tokens_of(adapter, {**inputs, "pixel_values": pixels}).square().sum(1)
    (gradient,) = torch.autograd.grad(tokens, pixels, torch.eye(len(tokens)), is_grads_batched=True)
    return split(gradient, 1)[0].ne(0)


def split(pixels: Tensor, before: int = 0) -> tuple[Tensor, ...]:
    """Red, green and blue, each flattened behind the first `before` dimensions; Qwen has its patches in rows."""
    if pixels.dim() - before == 2:
        pixels = pixels.unflatten(-1, (3, -1, 1))
    return tuple(colour.flatten(before) for colour in pixels.unbind(-3))


def numbers_of(inputs: dict[str, Any]) -> Tensor:
    """[pixels] the numbers painted, 0 where nothing was: padding has colours too."""
    red, green, blue = split(inputs["pixel_values"].float())
    return (red + 256 * green).round().long() * (blue == PAINT)


def processor_of(case: Case) -> Any:
    cls = getattr(tf, f"{case.processor}ImageProcessorPil", None)
    if cls is None:
        pytest.skip(f"this transformers has no {case.processor}ImageProcessorPil")
    return cls(**case.settings, **RAW)


def laid_out(adapter: Any, processor: Any, size: tuple[int, int]) -> tuple[Lens, list[Any], list[int]]:
    """(lens, items, first token of each item) of a picture of this size."""
    inputs = processor(Image.new("RGB", size, "white"), return_tensors="pt")
    with torch.no_grad():
        total = len(tokens_of(adapter, inputs))
    items = adapter.items("image", dict(inputs), total)
    starts = [sum(i.length for i in items[:k]) for k in range(len(items))]
    return adapter.lens().read(processor), items, starts


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.effect_noise(size, 80).convert("RGB")


@pytest.mark.parametrize(("name", "size"), [(n, s) for n, c in CASES.items() for s in c.sizes])
def test_every_token_lies_on_the_pixels_it_saw(name: str, size: tuple[int, int]) -> None:
    """With nearest-neighbour scaling, pixel by pixel: a token's patches hold its own colour, padding, and no other."""
    case = CASES[name]
    adapter, processor = quieted(name), processor_of(case)
    lens, items, starts = laid_out(adapter, processor, size)
    assert lens.share([size], len(items)) == [len(items)]
    views = lens.views(size, [item.grids for item in items])
    patches = patches_of(adapter, dict(processor(noise(size), return_tensors="pt")))
    covered: list[int] = []
    for view in views:
        numbers = numbers_of(processor(painted(view, size, starts), return_tensors="pt"))
        for cell in cells(view, size):
            token = starts[cell.run] + cell.token
            covered.append(token)
            saw = set(numbers[patches[token]].tolist())
            assert patches[token].any()
            assert saw - {0} == ({token + 1} if cell.seen else set()), (view.name, cell)
    separators = [starts[k] + t for k, i in enumerate(items) if i.newline is not None for t in i.newline.nonzero()[:, 0].tolist()]  # fmt: skip
    lone = [starts[k] for k, i in enumerate(items) if i.grids[0].tokens == 1]  # a CLS token shows no place
    assert sorted(covered + separators + lone) == list(range(sum(i.length for i in items)))


@pytest.mark.parametrize(
    ("name", "size"),
    [("llava", (20, 15)), ("llava-padded", (15, 22)), ("llava_next", (33, 21)), ("qwen2_5_vl", (15, 9)),
     ("internvl", (40, 21)), ("idefics3", (131, 100)), ("paligemma", (9, 14)), ("mistral3", (61, 43))],
)  # fmt: skip
def test_enlarged_pictures_agree_within_the_rounding(name: str, size: tuple[int, int]) -> None:
    """Where a picture's pixel is spread over several, a patch may begin within one: no other token has more of it."""
    adapter, processor = quieted(name), processor_of(CASES[name])
    lens, items, starts = laid_out(adapter, processor, size)
    patches = patches_of(adapter, dict(processor(noise(size), return_tensors="pt")))
    for view in lens.views(size, [item.grids for item in items]):
        numbers = numbers_of(processor(painted(view, size, starts), return_tensors="pt"))
        for cell in cells(view, size):
            if (cell.box[2] - cell.box[0]) * (cell.box[3] - cell.box[1]) > 1:
                token = starts[cell.run] + cell.token
                saw = Counter(n for n in numbers[patches[token]].tolist() if n)
                assert saw[token + 1] == max(saw.values()), (view.name, cell, saw)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "internvl", "idefics3", "gemma3", "paligemma"])
def test_the_usual_settings_need_no_processor(name: str) -> None:
    case = CASES[name]
    adapter, processor = quieted(name), processor_of(case)
    for size in case.sizes:
        lens, items, _ = laid_out(adapter, processor, size)
        runs = [item.grids for item in items]
        usual = adapter.lens()
        if name == "internvl":
            usual = NearestShape(32, most=6)  # the tiny one has fewer tiles than the family's usual twelve
        if name == "idefics3":
            usual = LongestEdge(32, longest=96)
        assert usual.views(size, runs) == lens.views(size, runs)


def test_tokens_blended_from_patches_lie_over_them() -> None:
    """OneVision shrinks large pictures between the tokens, and pools videos: centres agree within half a token."""
    model = tiny.llava_onevision("eager", aspect="anyres_max_1")[0]
    adapter, size = find(model), (128, 120)
    processor = processor_of(CASES["llava_onevision"])
    lens, (item,), _ = laid_out(adapter, processor, size)
    _, tiles = lens.views(size, [item.grids])
    assert item.rows is None  # blended
    assert (len(tiles.areas[0].rows), len(tiles.areas[0].columns)) == (item.grids[1].height, item.grids[1].width - 1)
    whole = Canvas(*size)
    base = whole.area(Grid(1, 4, 4))
    (fine,) = lens.views(size, [(item.grids[0], Grid(1, 8, 9))])[1].areas  # before shrinking
    crops = torch.zeros(5, 16, 2)  # (x, y) of every patch's middle
    for k, area in enumerate([base] + [fine] * 4):
        r0, c0 = (0, 0) if k == 0 else ((k - 1) // 2 * 4, (k - 1) % 2 * 4)
        for p in range(16):
            x, y = area.columns[c0 + p % 4], area.rows[r0 + p // 4]
            crops[k, p] = torch.tensor([sum(x) / 2, sum(y) / 2])
    (packed,) = adapter.pack({"image_sizes": torch.tensor([size[::-1]])}, [crops])
    area = tiles.areas[0]
    for r, row in enumerate(area.rows):
        for c, column in enumerate(area.columns):
            x, y = packed[area.first + r * area.stride + c].tolist()
            assert abs(x - sum(column) / 2) <= 0.5 * (column[1] - column[0])
            assert abs(y - sum(row) / 2) <= 0.5 * (row[1] - row[0])
    assert area.columns[0][0] == pytest.approx(0, abs=1e-9)
    assert area.columns[-1][1] == pytest.approx(size[0])


def test_several_pictures_and_mixed_counts() -> None:
    tiles = NearestShape(32, most=6)
    sizes = [(96, 64), (32, 32), (64, 64)]
    assert [tiles.count(s) for s in sizes] == [7, 1, 5]
    assert tiles.share(sizes, 13) == [7, 1, 5]
    assert tiles.share(sizes, 3) == [1, 1, 1]  # pictures that the processor was told not to cut
    with pytest.raises(SpecError, match="do not make the 9 runs"):
        tiles.share(sizes, 9)
    padded = AnyResolution(32, 8, ((32, 64),)).views((64, 32), [(Grid(1, 4, 4), Grid(1, 1, 1))])  # OneVision, several
    assert [v.name for v in padded] == ["whole picture"]
    assert padded[0].areas[0].rows == ((-16, 0), (0, 16), (16, 32), (32, 48))


@pytest.mark.parametrize("frames", [4, 5, 7])
def test_frames_of_a_video(frames: int) -> None:
    together = Lens().film((64, 32), frames, [(Grid(2, 2, 4),)])  # Qwen2-VL
    apart = Lens().film((64, 32), frames, [(Grid(1, 2, 4),)] * 2)  # Qwen3-VL
    assert [v.frame for v in together] == [v.frame for v in apart] == [0, frames // 2]
    assert [v.areas[0].first for v in together] == [0, 8]
    assert [(v.areas[0].run, v.areas[0].first) for v in apart] == [(0, 0), (1, 0)]
    assert [c.box for c in cells(together[1], (64, 32))][5] == (16, 16, 32, 32)


def test_a_processor_is_read_whatever_form_its_sizes_have() -> None:
    class Old:
        do_resize, do_center_crop = True, True
        size, crop_size = {"shortest_edge": 40}, {"height": 32, "width": 32}

    class Whole:
        image_processor = Old()

    lens = Fitted(32, 8).read(Whole())
    assert (lens.shortest, lens.crop, lens.square) == (40, (32, 32), False)
    assert lens.canvas((80, 40)) == Canvas(32, 32, 24.0, 4.0, 1.0, 1.0)
    Old.do_center_crop = False
    assert Fitted(32, 8).read(Old()).crop is None
    assert PanAndScan().read(Old()) == PanAndScan()
