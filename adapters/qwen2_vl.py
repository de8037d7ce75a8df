"""Qwen2-VL: pictures and videos of any size in one sequence of patches, merged two by two; three-dimensional positions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlprune.adapters.base import Adapter
from vlprune.context import Grid
from vlprune.engine.adapter import Item


class Merger(nn.Module):
    """The tower's merger on finished rows: [*, N, group Dv] -> [*, N, D]."""

    def __init__(self, merger: nn.Module, group: int) -> None:
        super().__init__()
        self.merger, self.group = merger, group

    def forward(self, rows: Tensor) -> Tensor:
        out = self.merger(rows.reshape(-1, rows.shape[-1] // self.group))
        return out.view(*rows.shape[:-1], -1)


class Qwen2VL(Adapter):
    """`Qwen2VLForConditionalGeneration`. Frames of a video follow each other without anything in between."""

    family = "qwen2_vl"
    architectures: ClassVar[tuple[str, ...]] = ("Qwen2VLForConditionalGeneration",)
    modalities = {
        "image": ("image_token_id", "get_image_features"),
        "video": ("video_token_id", "get_video_features"),
    }

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.mrope = True
        self.side = self.tower.spatial_merge_size
        self.group = self.side**2
        self.project = Merger(self.projector, self.group)

    def find_tower(self) -> Any:
        return self.core.visual

    def find_projector(self) -> Any:
        return self.tower.merger

    def items(self, modality: str, call: dict[str, Any], tokens: int) -> list[Item]:
        items, start = [], 0
        for frames, height, width in call[f"{modality}_grid_thw"].tolist():
            grid = Grid(frames, height // self.side, width // self.side)
            rows = start + self.order(grid)
            items += [Item((part,), rows[i : i + part.tokens]) for part, i in self.runs(modality, grid)]
            start += grid.tokens
        return items

    def order(self, grid: Grid) -> Tensor:
        """[N] the tower's row of each token, from 0."""
        return torch.arange(grid.tokens)

    def runs(self, modality: str, grid: Grid) -> list[tuple[Grid, int]]:
        """The runs of placeholders of one picture or video, and where each starts."""
        return [(grid, 0)]
