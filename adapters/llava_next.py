"""LLaVA-NeXT: the picture as a whole, then its crops laid out as one grid without padding, each row closed by a separator."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from vlprune.adapters.llava import ClipTower
from vlprune.context import Grid
from vlprune.engine.adapter import Item
from vlprune.geometry import AnyResolution, Lens
from vlprune.plan import Stage


class Crops(ClipTower):
    """Families that hand the tower several crops of a picture and pack what comes back (`pack_image_features`)."""

    def lens(self) -> Lens:
        pinpoints = tuple((height, width) for height, width in self.core.config.image_grid_pinpoints)
        return AnyResolution(self.pixels, self.patch, pinpoints)

    def why_not_in_tower(self) -> str | None:
        return (
            "inside the tower every crop is a picture of its own, while all crops of a picture share one budget; "
            "take a pruner that chooses once, such as visionzip"
        )

    def offers(self, stage: Stage) -> frozenset[str]:
        return super().offers(stage) - {"cls_value"}  # one for every crop

    def crops(self, call: dict[str, Any]) -> list[int]:
        """How many rows of the tower each picture has, the whole picture included."""
        count = sys.modules[type(self.core).__module__].image_size_to_num_patches
        config: Any = self.core.config
        return [count(size, config.image_grid_pinpoints, config.vision_config.image_size) for size in self.sizes(call)]

    @staticmethod
    def sizes(call: dict[str, Any]) -> list[list[int]]:
        sizes = call["image_sizes"]
        return sizes.tolist() if isinstance(sizes, Tensor) else [list(s) for s in sizes]

    def pack(self, call: dict[str, Any], crops: Any) -> list[Tensor]:
        """A value per patch, for every picture [crops, P, C] -> a value per token [N, C], by the model's own packing.

        Separators come out as NaN.
        """
        newline = torch.full(crops[0].shape[-1:], torch.nan, dtype=crops[0].dtype, device=crops[0].device)
        strategy = self.core.config.vision_feature_select_strategy
        packed, _ = self.core.pack_image_features(crops, self.sizes(call), strategy, image_newline=newline)
        return packed  # type: ignore[no-any-return]

    def items(self, modality: str, call: dict[str, Any], tokens: int) -> list[Item]:
        crops, n = self.crops(call), self.grid.tokens
        rows = torch.arange(sum(crops) * n, dtype=torch.float64).view(-1, n, 1)
        return [self.item(packed[:, 0]) for packed in self.pack(call, rows.split(crops))]

    def item(self, packed: Tensor) -> Item:
        """packed: [N] the row behind each token, NaN for separators."""
        newline = packed.isnan()
        rest = len(packed) - self.grid.tokens
        if not rest:
            return Item((self.grid,), packed.long())
        height = int(newline.sum())
        return Item((self.grid, Grid(1, height, rest // height)), packed.nan_to_num(nan=-1.0).long(), newline)


class LlavaNext(Crops):
    """`LlavaNextForConditionalGeneration`."""

    family = "llava_next"
    architectures = ("LlavaNextForConditionalGeneration",)
