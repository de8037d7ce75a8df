"""Gemma 3: patches averaged to 256 tokens, bidirectional pictures, layers of a sliding window between full ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlprune.adapters.base import FixedGrid, square
from vlprune.context import Grid
from vlprune.geometry import Lens, PanAndScan


class Pooled(nn.Module):
    """What the projector does to averaged patches: [*, N, Dv] -> [*, N, D]."""

    def __init__(self, projector: Any) -> None:
        super().__init__()
        self.norm, self.weight = projector.mm_soft_emb_norm, projector.mm_input_projection_weight

    def forward(self, rows: Tensor) -> Tensor:
        return (self.norm(rows) @ self.weight).type_as(rows)


class Gemma3(FixedGrid):
    """`Gemma3ForConditionalGeneration`. Crops of a picture (pan and scan) are pictures of their own."""

    family = "gemma3"
    architectures = ("Gemma3ForConditionalGeneration",)
    notes = (
        "its sliding layers keep all survivors of a prompt, and a static cache stops with an error",
        "positions='compact' would change what its sliding windows reach",
    )

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        projector = self.core.multi_modal_projector
        self.grid = Grid(1, projector.tokens_per_side, projector.tokens_per_side)
        self.factor = projector.kernel_size
        self.project = Pooled(projector)

    def lens(self) -> Lens:
        return PanAndScan()

    def find_projector(self) -> Any:
        return self.core.multi_modal_projector.mm_soft_emb_norm  # the first thing behind the averaging

    def why_not_in_tower(self) -> str | None:
        return "behind the tower patches are averaged by their place in a full square; take a pruner that chooses once"

    def pool(self, call: dict[str, Any], patches: Tensor) -> Tensor:
        return square(patches, self.factor)
