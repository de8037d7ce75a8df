"""Kept tokens on top of the picture they came from. PIL alone."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image

from vlprune.context import Grid


def overlay(image: Image.Image, grid: Grid, kept: Iterable[int], dim: float = 0.75,
            box: tuple[float, float, float, float] | None = None) -> Image.Image:  # fmt: skip
    """Kept cells as they are, the others dimmed towards white.

    Args:
        image: the picture, any size; a video's frame for grids of one frame.
        grid: token grid; cells are numbered row by row.
        kept: cells that survived.
        dim: 0 leaves dropped cells alone, 1 paints them white.
        box: the part of the image the grid covers, in pixels (left, top, right, bottom); default: the whole image,
            or its centred square when the grid is square, as centre-cropping processors do.
    Returns:
        a new RGB image of the same size. What the model never saw, outside `box`, is dimmed fully.
    """
    image = image.convert("RGB")
    if box is None:
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        square = grid.height == grid.width
        box = (left, top, left + side, top + side) if square else (0, 0, image.width, image.height)
    mask = Image.new("L", image.size, round(255 * (1 - dim) / 2))
    width, height = (box[2] - box[0]) / grid.width, (box[3] - box[1]) / grid.height
    alive = set(kept)
    for cell in range(grid.height * grid.width):
        row, column = divmod(cell, grid.width)
        corner = [round(box[0] + column * width), round(box[1] + row * height),
                  round(box[0] + (column + 1) * width), round(box[1] + (row + 1) * height)]  # fmt: skip
        mask.paste(255 if cell in alive else round(255 * (1 - dim)), (corner[0], corner[1], corner[2], corner[3]))
    return Image.composite(image, Image.new("RGB", image.size, "white"), mask)
