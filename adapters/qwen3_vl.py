"""Qwen3-VL: inner blocks of the tower add their features behind the first decoder layers; video frames stand apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlprune.adapters.qwen2_vl import Qwen2VL
from vlprune.context import Grid


@dataclass(eq=False)
class Deepstack:
    """Stands in the instance's `_deepstack_process`: adds to the visual tokens that are still there."""

    engine: Any
    text: nn.Module

    def __call__(self, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
        run = self.engine.runs.now
        layout = None if run is None else run.shortened
        if layout is None:
            process: Any = type(self.text)._deepstack_process  # type: ignore[attr-defined]
            return process(self.text, hidden_states, visual_pos_masks, visual_embeds)  # type: ignore[no-any-return]

        def place() -> tuple[Tensor, Tensor]:
            """[B, P] the number of each slot's token among all visual tokens, and whether it is one."""
            masks = visual_pos_masks.to(layout.index.device)
            rank = (masks.flatten().cumsum(0) - 1).view_as(masks).clamp(min=0)
            at = layout.index.clamp(min=0)
            return rank.gather(1, at), masks.gather(1, at) & (layout.index >= 0)

        rank, visual = run.once(("deepstack", layout.stage), place)
        added = visual_embeds.to(hidden_states)[rank.to(hidden_states.device)]
        return hidden_states + added * visual.to(hidden_states.device)[..., None]


class Qwen3VL(Qwen2VL):
    """`Qwen3VLForConditionalGeneration`, dense or of experts. Between the frames of a video stand their times, so each frame is an item."""

    family = "qwen3_vl"
    architectures = ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration")

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.side_projectors = tuple(self.tower.deepstack_merger_list)

    def runs(self, modality: str, grid: Grid) -> list[tuple[Grid, int]]:
        one = Grid(1, grid.height, grid.width)
        return [(one, i * one.tokens) for i in range(grid.frames)]

    def attach(self, engine: Any) -> None:
        object.__setattr__(self.text, "_deepstack_process", Deepstack(engine, self.text))

    def detach(self) -> None:
        self.text.__dict__.pop("_deepstack_process", None)
