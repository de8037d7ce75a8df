"""Mistral 3.1: pictures of any size in one masked sequence of patches, merged two by two by a learned layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlprune.adapters.base import Adapter
from vlprune.context import Grid
from vlprune.engine.adapter import Item


class Merged(nn.Module):
    """What the projector does to merged patches: [*, N, group Dv] -> [*, N, D]."""

    def __init__(self, projector: Any) -> None:
        super().__init__()
        self.merge, self.linear_1 = projector.patch_merger.merging_layer, projector.linear_1
        self.act, self.linear_2 = projector.act, projector.linear_2

    def forward(self, rows: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(self.merge(rows))))  # type: ignore[no-any-return]


class Mistral3(Adapter):
    """`Mistral3ForConditionalGeneration`."""

    family = "mistral3"
    architectures = ("Mistral3ForConditionalGeneration",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config: Any = self.core.config
        self.patch, self.side = config.vision_config.patch_size, config.spatial_merge_size
        self.project = Merged(self.core.multi_modal_projector)
        layer = config.vision_feature_layer
        self.feature_block = layer - 1 if layer > 0 else len(self.blocks) + layer

    def find_projector(self) -> Any:
        return self.core.multi_modal_projector.patch_merger.merging_layer

    def why_not_in_tower(self) -> str | None:
        return "behind the tower patches are merged by their place in a full picture; take a pruner that chooses once"

    def grids(self, call: dict[str, Any]) -> list[tuple[int, int]]:
        """(height, width) of every picture in patches."""
        sizes = call["image_sizes"]
        sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
        return [(height // self.patch, width // self.patch) for height, width in sizes]

    def items(self, modality: str, call: dict[str, Any], tokens: int) -> list[Item]:
        items, start = [], 0
        for height, width in self.grids(call):
            grid = Grid(1, height // self.side, width // self.side)
            items.append(Item((grid,), torch.arange(start, start + grid.tokens)))
            start += grid.tokens
        return items

    def segments(self, call: dict[str, Any]) -> list[int] | None:
        return [height * width for height, width in self.grids(call)]

    def pool(self, call: dict[str, Any], patches: Tensor) -> Tensor:
        out = []
        for picture, (height, width) in zip(patches[0].split(self.segments(call)), self.grids(call), strict=True):
            cells = picture.unflatten(0, (height // self.side, self.side, width // self.side, self.side))
            out.append(cells.float().mean(dim=(1, 3)).flatten(0, 1))
        return torch.cat(out)
