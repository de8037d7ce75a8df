"""Where visual tokens lie on the picture they were made of: what each family's processor does to it, without the pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from vlprune.context import Grid
from vlprune.errors import SpecError

Span = tuple[float, float]
Size = tuple[int, int]  # width, height
WHOLE = "whole picture"
LARGEST = 4096  # pixels on a side, of Idefics3's processor


@dataclass(frozen=True)
class Area:
    """Tokens in rows and columns over a part of a picture.

    The token in row r and column c is number ``first + r * stride + c`` of its run. It shows columns[c] x rows[r], in
    pixels of the picture; what lies outside the picture is padding.
    """

    columns: tuple[Span, ...]
    rows: tuple[Span, ...]
    run: int
    first: int
    stride: int


@dataclass(frozen=True)
class View:
    """Areas beside each other: one look at a picture, or at one frame of a video."""

    name: str
    areas: tuple[Area, ...]
    frame: int = 0  # of the video, the first of those that share these tokens


@dataclass(frozen=True)
class Canvas:
    """A picture on its way through a processor: pixel (x, y) shows ``(left + x * dx, top + y * dy)`` of the original."""

    width: int
    height: int
    left: float = 0.0
    top: float = 0.0
    dx: float = 1.0
    dy: float = 1.0

    def resized(self, width: int, height: int) -> Canvas:
        return replace(
            self, width=width, height=height, dx=self.dx * self.width / width, dy=self.dy * self.height / height
        )

    def cut(self, left: int, top: int, width: int, height: int) -> Canvas:
        """A rectangle of it, which may reach beyond its edges."""
        return replace(self, width=width, height=height, left=self.left + left * self.dx, top=self.top + top * self.dy)

    def centred(self, width: int, height: int) -> Canvas:
        return self.cut((self.width - width) // 2, (self.height - height) // 2, width, height)

    def squared(self) -> Canvas:
        """Padded to a square, the picture in its middle."""
        side = max(self.width, self.height)
        return self.cut(-((side - self.width) // 2), -((side - self.height) // 2), side, side)

    def columns(self, edges: Sequence[Span]) -> tuple[Span, ...]:
        return tuple((self.left + a * self.dx, self.left + b * self.dx) for a, b in edges)

    def rows(self, edges: Sequence[Span]) -> tuple[Span, ...]:
        return tuple((self.top + a * self.dy, self.top + b * self.dy) for a, b in edges)

    def area(self, grid: Grid, run: int = 0, first: int = 0, unseen: float = 0.0) -> Area:
        """Evenly divided; `unseen` is the share of each side, at its end, that no patch covers."""
        columns = self.columns(evenly(grid.width, self.width * (1 - unseen)))
        rows = self.rows(evenly(grid.height, self.height * (1 - unseen)))
        return Area(columns, rows, run, first, grid.width)


def evenly(count: int, length: float) -> list[Span]:
    return [(i * length / count, (i + 1) * length / count) for i in range(count)]


@dataclass(frozen=True)
class Lens:
    """How a family's processor lays tokens over a picture. This one stretches the picture over a single grid.

    A run is what the engine counts as one item: N tokens in a row, of one picture, one tile, or one frame.

    pixels, patch: sides of the tower's picture and patches, where they are fixed: 14 does not divide 384, so the last
        six pixels are seen by no token.
    """

    pixels: int = 0
    patch: int = 1

    @property
    def unseen(self) -> float:
        return self.pixels % self.patch / self.pixels if self.pixels else 0.0

    def read(self, processor: Any) -> Lens:
        """The same with the settings of a processor, or of its image processor."""
        return self

    def count(self, size: Size) -> int:
        """Runs of one picture, where the processor cuts pictures at all."""
        return 1

    def share(self, sizes: Sequence[Size], runs: int) -> list[int]:
        """How many of a prompt's runs each of its pictures has.

        Raises:
            SpecError: pictures of these sizes do not make so many.
        """
        for counts in ([self.count(size) for size in sizes], [1] * len(sizes)):
            if sum(counts) == runs:
                return counts
        raise SpecError(
            f"{len(sizes)} pictures of the sizes {', '.join(f'{w} x {h}' for w, h in sizes)} do not make the {runs} runs of "
            "visual tokens in this row; pass all its pictures in the prompt's order, and processor= if it is not the "
            "family's usual one"
        )

    def views(self, size: Size, runs: Sequence[tuple[Grid, ...]]) -> tuple[View, ...]:
        """Where the tokens of one picture lie. runs: the grids of each of its runs."""
        first, grid = shown(runs[0])
        return (View(WHOLE, (self.canvas(size).area(grid, 0, first, self.unseen),)),)

    def canvas(self, size: Size) -> Canvas:
        """What a grid that shows the whole picture lies on."""
        return Canvas(*size)

    def film(self, size: Size, frames: int, runs: Sequence[tuple[Grid, ...]]) -> tuple[View, ...]:
        """Where the tokens of a video lie, a view for each frame of its grid. frames: how many pictures it has."""
        first, grid = shown(runs[0])
        one, canvas = Grid(1, grid.height, grid.width), Canvas(*size)
        if len(runs) > 1:
            places = [(run, first) for run in range(len(runs))]
        else:
            places = [(0, first + t * one.tokens) for t in range(grid.frames)]
        return tuple(
            View(f"frame {t * frames // len(places)}", (canvas.area(one, run, at, self.unseen),), t * frames // len(places))
            for t, (run, at) in enumerate(places)
        )  # fmt: skip


def shown(grids: Sequence[Grid]) -> tuple[int, Grid]:
    """The first grid of more than one token, and its first token."""
    before = 0
    for grid in grids:
        if grid.tokens > 1 or grid == grids[-1]:
            return before, grid
        before += grid.tokens
    raise SpecError("a run of visual tokens has no grid")


# ---- processors as they are


def image_part(processor: Any) -> Any:
    return getattr(processor, "image_processor", processor)


def edge(size: Any, name: str) -> int | None:
    """One entry of a processor's size, a dict in some releases and an object in others."""
    value = size.get(name) if isinstance(size, dict) else getattr(size, name, None)
    return int(value) if value else None


# ---- families


@dataclass(frozen=True)
class Fitted(Lens):
    """One grid over a picture that is padded to a square, scaled, and cropped in its middle, in this order.

    Without a processor's word: the shorter side to `pixels` and the middle square of it.
    """

    square: bool = False
    shortest: int | None = None
    exact: Size | None = None  # scaled to this size whatever its shape
    crop: Size | None = None

    def read(self, processor: Any) -> Fitted:
        p = image_part(processor)
        size = getattr(p, "size", None) if getattr(p, "do_resize", False) else None
        crop = getattr(p, "crop_size", None) if getattr(p, "do_center_crop", False) else None
        width, height = edge(size, "width"), edge(size, "height")
        across, down = edge(crop, "width"), edge(crop, "height")
        return replace(
            self,
            square=bool(getattr(p, "do_pad", False)) and hasattr(p, "pad_to_square"),
            shortest=edge(size, "shortest_edge"),
            exact=(width, height) if width and height else None,
            crop=(across, down) if across and down else None,
        )

    def canvas(self, size: Size) -> Canvas:
        out = Canvas(*size)
        if self.square:
            out = out.squared()
        if self.shortest:
            short, long = sorted((out.width, out.height))
            sides = self.shortest, int(self.shortest * long / short)
            out = out.resized(*(sides if out.width <= out.height else sides[::-1]))
        elif self.exact:
            out = out.resized(*self.exact)
        return out.centred(*self.crop) if self.crop else out


@dataclass(frozen=True)
class AnyResolution(Lens):
    """LLaVA-NeXT and LLaVA-OneVision: the picture as a whole, then in tiles whose padding the model takes out again.

    A run is the whole grid, then the rows of the tiles, each closed by a separator. Prompts of several pictures (OneVision)
    cut none: they are padded to a square.
    """

    pinpoints: tuple[Size, ...] = ()  # (height, width) a picture may be scaled to

    def read(self, processor: Any) -> AnyResolution:
        pinpoints = getattr(image_part(processor), "image_grid_pinpoints", None)
        return replace(self, pinpoints=tuple((h, w) for h, w in pinpoints)) if pinpoints else self

    def views(self, size: Size, runs: Sequence[tuple[Grid, ...]]) -> tuple[View, ...]:
        whole, *tiles = runs[0]
        canvas = Canvas(*size)
        if not tiles or tiles[0].tokens == 1:
            return (View(WHOLE, (canvas.squared().area(whole, unseen=self.unseen),)),)
        height, width = best(size, self.pinpoints)
        down, across = height / size[1], width / size[0]
        if across < down:
            scaled = width, min(math.ceil(size[1] * across), height)
        else:
            scaled = min(math.ceil(size[0] * down), width), height
        padded = canvas.resized(*scaled).cut(-((width - scaled[0]) // 2), -((height - scaled[1]) // 2), width, height)
        rows, columns = self.patches(height), self.patches(width)
        if size[0] / size[1] > len(columns) / len(rows):
            rows = trim(rows, size[1] * (len(columns) / size[0]))
        else:
            columns = trim(columns, size[0] * (len(rows) / size[1]))
        grid = tiles[0]
        rows, columns = merged(rows, grid.height), merged(columns, grid.width - 1)
        area = Area(padded.columns(columns), padded.rows(rows), 0, whole.tokens, grid.width)
        return View(WHOLE, (canvas.area(whole, unseen=self.unseen),)), View("tiles", (area,))

    def patches(self, length: int) -> list[Span]:
        """Patches along a side of several tiles."""
        starts = range(0, self.pixels // self.patch * self.patch, self.patch)
        return [(t + s, t + s + self.patch) for t in range(0, length, self.pixels) for s in starts]


def best(size: Size, pinpoints: Sequence[Size]) -> Size:
    """(height, width): the most pixels of the picture at its own shape, then the least padding, then the first."""

    def worth(target: Size) -> tuple[int, int]:
        scale = min(target[1] / size[0], target[0] / size[1])
        used = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return used, used - target[0] * target[1]

    return max(pinpoints, key=worth)


def trim(patches: list[Span], own: float) -> list[Span]:
    """Without the same number of patches at both ends; `own` of them show the picture."""
    padding = (len(patches) - int(round(own, 7))) // 2
    return patches[padding : len(patches) - padding]


def merged(patches: list[Span], count: int) -> list[Span]:
    """`count` tokens that blend a longer row of patches evenly."""
    if count == len(patches):
        return patches

    def at(place: float) -> float:
        whole = min(int(place), len(patches) - 1)
        start, stop = patches[whole]
        return start + (place - whole) * (stop - start)

    step = len(patches) / count
    return [(at(i * step), at((i + 1) * step)) for i in range(count)]


@dataclass(frozen=True)
class Tiles(Lens):
    """Families that stretch a picture over rows x columns of tiles, each a run of its own, and add the whole picture."""

    def layout(self, size: Size) -> tuple[int, int]:
        """(rows, columns) of tiles."""
        raise NotImplementedError

    def count(self, size: Size) -> int:
        rows, columns = self.layout(size)
        return rows * columns + (rows * columns > 1)

    def views(self, size: Size, runs: Sequence[tuple[Grid, ...]]) -> tuple[View, ...]:
        if len(runs) == 1:
            return super().views(size, runs)
        rows, columns = self.layout(size)
        canvas = Canvas(*size).resized(columns * self.pixels, rows * self.pixels)
        side = self.pixels
        areas = [
            canvas.cut(c * side, r * side, side, side).area(shown(runs[r * columns + c])[1], r * columns + c)
            for r, c in product(range(rows), range(columns))
        ]
        whole = Canvas(*size).area(shown(runs[-1])[1], len(runs) - 1)
        return View("tiles", tuple(areas)), View(WHOLE, (whole,))


@dataclass(frozen=True)
class NearestShape(Tiles):
    """InternVL: the numbers of rows and columns whose ratio is nearest to the picture's, `least` to `most` tiles.

    Of equally near ones a larger layout replaces a smaller where the picture fills more than half of it.
    """

    least: int = 1
    most: int = 12

    def read(self, processor: Any) -> NearestShape:
        p = image_part(processor)
        side = edge(getattr(p, "size", None), "height") or self.pixels
        least, most = getattr(p, "min_patches", self.least), getattr(p, "max_patches", self.most)
        return replace(self, pixels=side, least=least, most=most)

    def layout(self, size: Size) -> tuple[int, int]:
        width, height = size
        fit = [(r, c) for c, r in product(range(1, self.most + 1), repeat=2) if self.least <= r * c <= self.most]
        chosen, nearest = (1, 1), math.inf
        for rows, columns in sorted(fit, key=lambda shape: shape[0] * shape[1]):
            distance = abs(width / height - columns / rows)
            if distance == nearest and width * height > 0.5 * self.pixels**2 * rows * columns:
                chosen = rows, columns
            elif distance < nearest:
                chosen, nearest = (rows, columns), distance
        return chosen


@dataclass(frozen=True)
class LongestEdge(Tiles):
    """Idefics3 and SmolVLM: the longer side scaled to `longest` pixels, both then up to multiples of a tile."""

    longest: int = 0

    def read(self, processor: Any) -> LongestEdge:
        p = image_part(processor)
        side = edge(getattr(p, "max_image_size", None), "longest_edge") or self.pixels
        longest = edge(getattr(p, "size", None), "longest_edge") if getattr(p, "do_resize", True) else None
        return replace(self, pixels=side, longest=longest or 0)

    def layout(self, size: Size) -> tuple[int, int]:
        width, height = size
        if self.longest:
            width, height = self.scaled(width, height)
        flat = width >= height
        long, short = (width, height) if flat else (height, width)
        long = -(-long // self.pixels)
        across = int(long * self.pixels / (width / height)) if flat else int(long * self.pixels * (width / height))
        short = -(-across // self.pixels)
        return (short, long) if flat else (long, short)

    def scaled(self, width: int, height: int) -> Size:
        """The longer side at `longest`, the other rounded down, then up to an even number."""
        ratio, longest = width / height, min(self.longest, LARGEST)
        if width >= height:
            short = int(longest / ratio)
            return longest, short + short % 2
        short = int(longest * ratio)
        return short + short % 2, longest


@dataclass(frozen=True)
class PanAndScan(Lens):
    """Gemma 3: the whole picture, and where pan and scan is on and the picture long, crops along its longer side."""

    smallest: int = 256
    most: int = 4
    ratio: float = 1.2

    def read(self, processor: Any) -> PanAndScan:
        p = image_part(processor)

        def setting(name: str, default: Any) -> Any:
            return getattr(p, f"pan_and_scan_{name}", None) or default

        smallest, most = setting("min_crop_size", self.smallest), setting("max_num_crops", self.most)
        return replace(self, smallest=smallest, most=most, ratio=setting("min_ratio_to_activate", self.ratio))

    def boxes(self, size: Size) -> list[tuple[int, int, int, int]]:
        """(left, top, width, height) of every crop."""
        short, long = sorted(size)
        if long / short < self.ratio:
            return []
        crops = min(self.most, max(2, min(long // self.smallest, math.floor(long / short + 0.5))))
        length = -(-long // crops)
        if min(length, short) < self.smallest:
            return []
        spans = [(i * length, min(length, long - i * length)) for i in range(crops)]
        wide = size[0] >= size[1]
        return [(at, 0, n, short) if wide else (0, at, short, n) for at, n in spans]

    def count(self, size: Size) -> int:
        return 1 + len(self.boxes(size))

    def views(self, size: Size, runs: Sequence[tuple[Grid, ...]]) -> tuple[View, ...]:
        (whole,) = super().views(size, runs)
        boxes = self.boxes(size) if len(runs) > 1 else []
        crops = [
            Canvas(*size).cut(*box).area(shown(grids)[1], k)
            for k, (box, grids) in enumerate(zip(boxes, runs[1:], strict=True), 1)
        ]
        return (whole, View("crops", tuple(crops))) if crops else (whole,)
