"""LLaVA-1.5: one CLIP grid per picture, two linear layers, a Llama, Qwen2 or Mistral decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlprune.adapters.base import Adapter
from vlprune.context import Grid
from vlprune.engine.adapter import Item
from vlprune.plan import Stage


class Llava(Adapter):
    """`LlavaForConditionalGeneration` with a tower of fixed size."""

    family = "llava"
    architectures = ("LlavaForConditionalGeneration",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config: Any = model.config
        vision = config.vision_config
        side = vision.image_size // vision.patch_size
        self.grid = Grid(1, side, side)
        has_cls = hasattr(getattr(getattr(self.tower, "vision_model", self.tower), "embeddings", None), "class_embedding")
        self.cropped = config.vision_feature_select_strategy == "default"
        self.cls_tokens = 1 if has_cls else 0
        self.layer = config.vision_feature_layer
        if isinstance(self.layer, int):  # hidden_states[i] is the output of block i - 1, hidden_states[-2] of block -2
            self.feature_block = self.layer - 1 if self.layer > 0 else len(self.blocks) + self.layer

    def why_not(self, stage: Stage) -> str | None:
        if stage.name == "encoder" and not isinstance(self.layer, int):
            return "this LLaVA joins several vision layers, so no tokens can leave the tower; use stage 'projector'"
        if stage.name == "encoder" and bool(self.cls_tokens) != self.cropped:
            return "this LLaVA hands the CLS token to the language model, so the tower's grid is not the decoder's; use 'projector'"
        return super().why_not(stage)

    def items(self, modality: str, call: dict[str, Any], features: list[Tensor]) -> list[Item]:
        return [self.bare_item(f.shape[0]) for f in features]

    def bare_item(self, length: int) -> Item:
        if self.cls_tokens and not self.cropped:
            return Item(self.grid, tokens=self.grid.tokens + 1)
        return Item(self.grid)
