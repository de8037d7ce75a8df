"""Qwen2.5-VL: Qwen2-VL with a tower that attends within windows and keeps its patches in their order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlprune.adapters.qwen2_vl import Qwen2VL
from vlprune.context import Grid


class Qwen2_5VL(Qwen2VL):  # noqa: N801  (the model's own name)
    """`Qwen2_5_VLForConditionalGeneration`."""

    family = "qwen2_5_vl"
    architectures = ("Qwen2_5_VLForConditionalGeneration",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.window = self.tower.window_size // self.tower.patch_size // self.side  # tokens on a side

    def order(self, grid: Grid) -> Tensor:
        frame, row, column = (x.flatten() for x in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
        down, across = -(-grid.height // self.window), -(-grid.width // self.window)
        window = (frame * down + row // self.window) * across + column // self.window
        return window.argsort(stable=True).argsort()  # reading order inside a window
