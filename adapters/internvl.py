"""InternVL: tiles of one size, four patches shuffled into one token before the projector."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlprune.adapters.base import FixedGrid, square
from vlprune.context import Grid
from vlprune.geometry import Lens, NearestShape


class InternVL(FixedGrid):
    """`InternVLForConditionalGeneration`. Every tile, and every frame of a video, is a run of its own."""

    family = "internvl"
    architectures = ("InternVLForConditionalGeneration",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config: Any = self.core.config
        vision = config.vision_config
        self.factor = round(1 / config.downsample_ratio)
        self.pixels = vision.image_size[0]
        height, width = (i // p // self.factor for i, p in zip(vision.image_size, vision.patch_size, strict=True))
        self.grid = Grid(1, height, width)
        self.cls_tokens = 1 if config.vision_feature_select_strategy == "default" else 0
        layer = config.vision_feature_layer
        self.feature_block = layer - 1 if layer > 0 else len(self.blocks) + layer

    def lens(self) -> Lens:
        return NearestShape(self.pixels)

    def why_not_in_tower(self) -> str | None:
        return "behind the tower patches are shuffled by their place in a full square; take a pruner that chooses once"

    def pool(self, call: dict[str, Any], patches: Tensor) -> Tensor:
        return square(patches, self.factor)
