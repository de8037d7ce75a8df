"""PaliGemma: one SigLIP grid per picture, one linear layer, a Gemma decoder that reads the prompt bidirectionally."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlprune.adapters.base import FixedGrid
from vlprune.context import Grid
from vlprune.geometry import Lens


class PaliGemma(FixedGrid):
    """`PaliGemmaForConditionalGeneration`, also of the second generation."""

    family = "paligemma"
    architectures = ("PaliGemmaForConditionalGeneration",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        vision: Any = self.core.config.vision_config
        side = vision.image_size // vision.patch_size
        self.pixels, self.patch = vision.image_size, vision.patch_size
        self.grid = Grid(1, side, side)

    def lens(self) -> Lens:
        return Lens(self.pixels, self.patch)
