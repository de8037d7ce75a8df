"""LLaVA-NeXT: a picture and its crops, laid out as one grid without its padding, every row closed by a separator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlprune.adapters.llava import ClipTower
from vlprune.context import Grid
from vlprune.engine.adapter import Item

ONE_ROW = "the crops of a picture share one budget, which the tower, where every crop is a picture of its own, cannot divide; "


class LlavaNext(ClipTower):
    """`LlavaNextForConditionalGeneration`: the picture as a whole first, then its crops."""

    family = "llava_next"
    architectures = ("LlavaNextForConditionalGeneration",)

    def why_not_in_tower(self) -> str | None:
        return ONE_ROW + "use a pruner that chooses once, such as visionzip"

    def items(self, modality: str, call: dict[str, Any], tokens: int) -> list[Item]:
        crops = [self.crops(size) for size in call["image_sizes"]]
        n = self.grid.tokens
        rows = torch.arange(sum(crops) * n, dtype=torch.float64).view(-1, n, 1)
        return [self.item(packed[:, 0]) for packed in self.pack(call, rows.split(crops))]

    def item(self, packed: Tensor) -> Item:
        """packed: [N] row behind each token, NaN a separator."""
        newline = packed.isnan()
        rest = len(packed) - self.grid.tokens
        height = int(newline.sum())
        grids = (self.grid, Grid(1, height, rest // height)) if rest else (self.grid,)
        return Item(grids, packed.nan_to_num(nan=-1.0).long(), newline if rest else None)

    def crops(self, size: Any) -> int:
        """The pictures the tower is given for one of this (height, width), the whole included."""
        height, width = self.best_resolution(size)
        side = self.config.vision_config.image_size
        return -(-height // side) * -(-width // side) + 1
