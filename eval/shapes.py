"""Models to time: checkpoints, or random weights of a published shape; and random inputs of any size for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from vlprune.errors import SpecError, UnsupportedModel, nearest
from vlprune.eval.checkpoints import load_model

CLIP_L_336: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip
VICUNA_7B: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
QWEN_7B: dict[str, Any] = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip
QWEN_VISION: dict[str, Any] = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
    "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def llava_15_7b() -> tf.PretrainedConfig:
    return tf.LlavaConfig(vision_config=CLIP_L_336, text_config=VICUNA_7B, image_token_id=32000, image_seq_length=576)


def llava_next_7b() -> tf.PretrainedConfig:
    return tf.LlavaNextConfig(
        vision_config=CLIP_L_336, text_config=VICUNA_7B, image_token_id=32000, image_grid_pinpoints=PINPOINTS
    )


def qwen25_vl_7b() -> tf.PretrainedConfig:
    return tf.Qwen2_5_VLConfig(
        vision_config=QWEN_VISION, text_config=QWEN_7B, image_token_id=151655, video_token_id=151656,
        vision_start_token_id=151652, vision_end_token_id=151653, tie_word_embeddings=False,
    )  # fmt: skip


def tiny() -> tf.PretrainedConfig:
    vision = {**CLIP_L_336, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
              "num_attention_heads": 4, "image_size": 112}  # fmt: skip
    text = {**VICUNA_7B, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
            "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    return tf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=500, image_seq_length=64)


SHAPES: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "llava-1.5-7b": llava_15_7b,
    "llava-next-7b": llava_next_7b,
    "qwen2.5-vl-7b": qwen25_vl_7b,
    "tiny": tiny,
}


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model ready to be timed; `weights` says whether they mean anything."""

    name: str
    model: Any
    weights: str


def load(name: str, dtype: torch.dtype, attention: str, device: torch.device, seed: int = 0) -> Loaded:
    """A model by the name of a shape (random weights), or a checkpoint as in `vlprune.eval.checkpoints`.

    Random weights are drawn on the device itself, in `dtype`: a 7B model is there within seconds.

    Raises:
        SpecError: neither a shape nor a complete checkpoint.
    """
    if name in SHAPES:
        config = SHAPES[name]()
        torch.manual_seed(seed)
        with torch.device(device):
            model = tf.AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
        return Loaded(name, model.eval(), "random")
    try:
        model = load_model(name, dtype, attention, device)
    except SpecError as error:
        if "/" in name:
            raise
        raise SpecError(f"{error}{nearest(name, SHAPES)}; shapes with random weights: {', '.join(SHAPES)}") from error
    return Loaded(Path(name).name, model, "checkpoint")


@dataclass(frozen=True, eq=False)
class Prompt:
    """Model inputs of equal rows, with the numbers behind them."""

    inputs: dict[str, Tensor]
    batch: int
    visual: int  # visual tokens a row
    text: int  # text tokens a row
    pictures: list[tuple[int, int]]  # (width, height) of each picture of a row


def random_prompt(model: Any, batch: int, visual: int, text: int, seed: int = 0) -> Prompt:
    """`batch` prompts with about `visual` visual and exactly `text` text tokens: noise pictures and random words.

    Fixed-size towers get several pictures a prompt, the others one picture whose size comes nearest to the number asked
    for. Rows differ in their noise.

    Raises:
        UnsupportedModel: a family whose inputs are not known here.
    """
    config = model.config
    build = BUILDERS.get(config.model_type)
    if build is None:
        known = ", ".join(BUILDERS)
        raise UnsupportedModel(f"bench does not know the inputs of {config.model_type!r}; it knows {known}")
    generator = torch.Generator().manual_seed(seed)
    pictures, lengths, pixels = build(config, batch, visual, generator)
    special = [t for t in (config.image_token_id, getattr(config, "video_token_id", None)) if t is not None]
    highest = min([config.get_text_config().vocab_size, *special])
    before = min(text // 4, 16)
    rows = []
    for _ in range(batch):
        words = torch.randint(3, highest, (text,), generator=generator)
        pads = torch.full((sum(lengths),), config.image_token_id)
        rows.append(torch.cat([words[:before], pads, words[before:]]))
    ids = torch.stack(rows)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if "image_grid_thw" in pixels:
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
    device = model.device
    inputs = {k: v.to(device, model.dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}
    return Prompt(inputs, batch, sum(lengths), text, pictures)


# sizes and lengths of the pictures in one row, and the pixels of all rows
Pictures = tuple[list[tuple[int, int]], list[int], dict[str, Tensor]]


def _llava(config: Any, batch: int, visual: int, generator: torch.Generator) -> Pictures:
    side = config.vision_config.image_size
    each = (side // config.vision_config.patch_size) ** 2
    n = max(1, round(visual / each))
    pixels = torch.randn(batch * n, 3, side, side, generator=generator)
    return [(side, side)] * n, [each] * n, {"pixel_values": pixels}


def _llava_next(config: Any, batch: int, visual: int, generator: torch.Generator) -> Pictures:
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    side = config.vision_config.image_size
    grid = side // config.vision_config.patch_size
    largest = max(max(p) for p in config.image_grid_pinpoints)

    def length(size: tuple[int, int]) -> int:
        """Base tile, the tiles without their padding, and one newline a row."""
        down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)
        height, width = unpad_image(torch.empty(1, down * grid, across * grid), size).shape[1:]
        return int(grid * grid + height * (width + 1))

    sides = range(side // 2, largest + 1, side // 12)
    sizes = list(itertools.product(sides, sides))
    n = max(1, round(visual / max(map(length, sizes))))
    height, width = min(sizes, key=lambda s: (abs(length(s) * n - visual), -s[0] * s[1]))
    down, across = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, side)
    pixels = torch.randn(batch * n, 1 + down * across, 3, side, side, generator=generator)
    extra = {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]] * (batch * n))}
    return [(width, height)] * n, [length((height, width))] * n, extra


def _qwen(config: Any, batch: int, visual: int, generator: torch.Generator) -> Pictures:
    vision = config.vision_config
    merge, patch = vision.spatial_merge_size, vision.patch_size
    height = max(1, math.isqrt(visual))
    width = max(1, round(visual / height))
    down, across = height * merge, width * merge
    values = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * patch * patch
    pixels = torch.randn(batch * down * across, values, generator=generator)
    extra = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, down, across]] * batch)}
    return [(across * patch, down * patch)], [height * width], extra


BUILDERS: dict[str, Callable[[Any, int, int, torch.Generator], Pictures]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
}
