"""LLaVA-OneVision: pictures packed as in LLaVA-NeXT and shrunk where they are large; videos of pooled frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlprune.adapters.llava_next import Crops
from vlprune.context import Grid
from vlprune.engine.adapter import Item

UNBOUNDED = "anyres_max_1000000"


class LlavaOnevision(Crops):
    """`LlavaOnevisionForConditionalGeneration`.

    A prompt of several pictures cuts none of them. Pictures above the limit of `vision_aspect_ratio` and all videos are
    resampled behind the projector: their tokens blend several patches, and all their patches go through the projector.
    """

    family = "llava_onevision"
    architectures = ("LlavaOnevisionForConditionalGeneration",)
    notes = (
        "at stage encoder, pruners that merge tokens stop with an error at videos and at pictures above the limit",
    )
    modalities = {
        "image": ("image_token_id", "get_image_features"),
        "video": ("video_token_id", "get_video_features"),
    }

    def crops(self, call: dict[str, Any]) -> list[int]:
        crops = super().crops(call)
        pictures = call.get("batch_num_images")
        if pictures is None:
            return crops
        pictures = pictures.tolist() if isinstance(pictures, Tensor) else pictures
        alone = [n == 1 for n in pictures for _ in range(n)]
        return [n if cut else 1 for n, cut in zip(crops, alone, strict=False)]

    def pack(self, call: dict[str, Any], crops: Any, aspect: str | None = None) -> list[Tensor]:
        newline = torch.full(crops[0].shape[-1:], torch.nan, dtype=crops[0].dtype, device=crops[0].device)
        aspect = aspect or call.get("vision_aspect_ratio") or self.core.config.vision_aspect_ratio
        packed, _ = self.core.pack_image_features(
            crops, self.sizes(call), image_newline=newline, vision_aspect_ratio=aspect
        )
        return packed  # type: ignore[no-any-return]

    def items(self, modality: str, call: dict[str, Any], tokens: int) -> list[Item]:
        crops, n = self.crops(call) if modality == "image" else [], self.grid.tokens
        if modality == "video":
            pixels: Any = call.get("pixel_values_videos", call.get("pixel_values"))  # its name in older releases
            videos, frames = pixels.shape[:2]
            grid = Grid(frames, -(-self.grid.height // 2), -(-self.grid.width // 2))
            return [Item((grid, Grid(1, 1, 1)), None, torch.arange(grid.tokens + 1) == grid.tokens)] * videos
        rows = torch.arange(sum(crops) * n, dtype=torch.float64).view(-1, n, 1)
        whole = [self.item(p[:, 0]) for p in self.pack(call, rows.split(crops), UNBOUNDED)]
        packed = [self.item(p[:, 0]) for p in self.pack(call, rows.split(crops))]
        return [
            Item(p.grids, p.rows if p.grids == w.grids else None, p.newline) for p, w in zip(packed, whole, strict=True)
        ]

    def tokens(self, call: dict[str, Any], items: list[Item], rows: Tensor) -> list[Tensor]:
        if all(item.rows is not None for item in items):
            return super().tokens(call, items, rows)
        patches = rows.view(-1, self.grid.tokens, rows.shape[-1])
        if "image_sizes" in call:
            return self.pack(call, patches.split(self.crops(call)))
        frames = self.core.apply_pooling(patches).reshape(len(items), -1, rows.shape[-1])
        return [torch.cat([video, video.new_full((1, video.shape[-1]), torch.nan)]) for video in frames]
