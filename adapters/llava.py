"""LLaVA-1.5: one CLIP grid per picture, two linear layers, a Llama, Qwen2 or Mistral decoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprune.adapters.base import FixedGrid
from vlprune.context import Grid
from vlprune.engine.adapter import Item
from vlprune.errors import UnsupportedModel
from vlprune.geometry import Fitted, Lens
from vlprune.plan import Stage


class ClipTower(FixedGrid):
    """Towers of fixed size whose output is read at `config.vision_feature_layer`, with or without the CLS token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config: Any = model.config
        vision = config.vision_config
        side = vision.image_size // vision.patch_size
        self.pixels, self.patch = vision.image_size, vision.patch_size
        self.grid = Grid(1, side, side)
        has_cls = hasattr(
            getattr(getattr(self.tower, "vision_model", self.tower), "embeddings", None), "class_embedding"
        )
        self.cropped = config.vision_feature_select_strategy == "default"
        self.cls_tokens = 1 if has_cls else 0
        self.layer = config.vision_feature_layer
        if isinstance(self.layer, int):  # hidden_states[i] is the output of block i - 1, hidden_states[-2] of block -2
            self.feature_block = self.layer - 1 if self.layer > 0 else len(self.blocks) + self.layer

    def lens(self) -> Lens:
        """CLIP's processor crops, SigLIP's stretches."""
        side = (self.pixels, self.pixels)
        if not self.cls_tokens:
            return Fitted(self.pixels, self.patch, exact=side)
        return Fitted(self.pixels, self.patch, shortest=self.pixels, crop=side)

    def why_not(self, stage: Stage) -> str | None:
        if stage.name == "encoder" and not isinstance(self.layer, int):
            return f"this {self.family} joins several vision layers, so no tokens can leave the tower; use stage 'projector'"
        if stage.name == "encoder" and bool(self.cls_tokens) != self.cropped:
            return (f"this {self.family} hands the CLS token to the language model, so the tower's grid is not the decoder's; "
                    "use stage 'projector'")  # fmt: skip
        return super().why_not(stage)


class Llava(ClipTower):
    """`LlavaForConditionalGeneration` with a tower of fixed size."""

    family = "llava"
    architectures = ("LlavaForConditionalGeneration",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if not hasattr(getattr(self.tower, "vision_model", self.tower), "embeddings"):
            raise UnsupportedModel(f"this llava has a {type(self.tower).__name__}, which takes pictures of any size; vlprune "
                                   "serves it with towers of one size, such as CLIP and SigLIP")  # fmt: skip

    def items(self, modality: str, call: dict[str, Any], tokens: int) -> list[Item]:
        if self.cropped or not self.cls_tokens:
            return super().items(modality, call, tokens)
        n = self.grid.tokens + 1
        return [Item((Grid(1, 1, 1), self.grid), torch.arange(i, i + n)) for i in range(0, tokens, n)]

    def pool(self, call: dict[str, Any], patches: Tensor) -> Tensor:
        if self.cls_tokens and not self.cropped:  # the CLS token becomes a token too, one without a score
            patches = F.pad(patches, (0, 0, 1, 0), value=torch.nan)
        return super().pool(call, patches)
