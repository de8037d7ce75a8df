"""Idefics3 and SmolVLM: tiles of one size, several patches shuffled into one token inside the connector."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vlprune.adapters.base import FixedGrid, square
from vlprune.context import Grid
from vlprune.geometry import Lens, LongestEdge


class Idefics3(FixedGrid):
    """`Idefics3ForConditionalGeneration`. Every tile, and every frame of a video, is a run of its own."""

    family = "idefics3"
    architectures: ClassVar[tuple[str, ...]] = ("Idefics3ForConditionalGeneration",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config: Any = self.core.config
        side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
        self.grid = Grid(1, side, side)
        self.pixels: int = config.vision_config.image_size
        self.factor = config.scale_factor

    def lens(self) -> Lens:
        return LongestEdge(self.pixels, longest=4 * self.pixels)

    def find_tower(self) -> Any:
        return self.core.vision_model

    def find_projector(self) -> Any:
        return self.core.connector.modality_projection

    def why_not_in_tower(self) -> str | None:
        return "behind the tower patches are shuffled by their place in a full square; take a pruner that chooses once"

    def pool(self, call: dict[str, Any], patches: Tensor) -> Tensor:
        return square(patches, self.factor)


class SmolVLM(Idefics3):
    """`SmolVLMForConditionalGeneration`."""

    family = "smolvlm"
    architectures = ("SmolVLMForConditionalGeneration",)
