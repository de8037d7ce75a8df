"""Tiny randomly initialised vision-language models with matching inputs: seconds on a CPU, nothing downloaded."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

IMG, VID, PAD = 5, 6, 0
VISUAL = [IMG, VID]
PARTS = {"img": IMG, "vid": VID, "start": 7, "end": 8}  # start and end of a picture or video, where a family marks them
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "rms_norm_eps": 1e-6,
}
Inputs = dict[str, torch.Tensor]
Make = Callable[..., tuple[Any, Callable[..., Inputs]]]


def build(cls: Any, config: Any, attn: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = cls._from_config(config, attn_implementation=attn)
    g = torch.Generator().manual_seed(seed + 1)
    for p in model.parameters():  # larger than usual: logits must be sensitive to every token
        if p.dim() > 1:
            p.data.normal_(0, 0.25, generator=g)
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def clip(image: int = 32, patch: int = 8, layers: int = 5) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": image,
        "patch_size": patch,
        "projection_dim": 24,
    }


def siglip(image: int = 32, patch: int = 8, layers: int = 3) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": image,
        "patch_size": patch,
    }


def prompt(rows: list[list[Any]], g: torch.Generator) -> Inputs:
    """Left-padded prompts. A row is a list of numbers n (n random text tokens) and pairs (name in PARTS, n)."""
    out: list[list[int]] = []
    for row in rows:
        ids: list[int] = []
        for part in row:
            if isinstance(part, tuple):
                ids += [PARTS[part[0]]] * part[1]
            else:
                ids += torch.randint(10, 99, (part,), generator=g).tolist()
        out.append(ids)
    length = max(map(len, out))
    ids_t = torch.full((len(out), length), PAD)
    mask = torch.zeros(len(out), length, dtype=torch.long)
    for i, row_ids in enumerate(out):
        ids_t[i, length - len(row_ids) :] = torch.tensor(row_ids)
        mask[i, length - len(row_ids) :] = 1
    return {"input_ids": ids_t, "attention_mask": mask}


def llava(
    attn: str = "sdpa", text: str = "llama", strategy: str = "default", **extra: Any
) -> tuple[Any, Callable[..., Inputs]]:
    n_tokens = 16 if strategy == "default" else 17  # "full" hands over the CLS token too
    config = tf.LlavaConfig(
        vision_config=clip(),
        text_config=dict(TEXT, model_type=text, **extra),
        image_token_id=IMG,
        image_seq_length=n_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
    )
    model = build(tf.LlavaForConditionalGeneration, config, attn)

    def inputs(batch: int = 2, seed: int = 0) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        picture = ("img", n_tokens)
        rows = [[3, picture, 4], [2, picture, 3, picture, 6], [7, picture, 9]][:batch]
        n = sum(isinstance(part, tuple) for row in rows for part in row)
        return dict(prompt(rows, g), pixel_values=torch.randn(n, 3, 32, 32, generator=g))

    return model, inputs


def _crops(crops: list[int], seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    pixels = torch.zeros(len(crops), max(crops), 3, 32, 32)
    for i, n in enumerate(crops):
        pixels[i, :n] = torch.randn(n, 3, 32, 32, generator=g)
    return pixels


PINPOINTS = [[32, 64], [64, 32], [64, 64]]
SIZES = [(40, 64), (64, 30), (30, 64)]  # (height, width): cut into 2 x 2, 2 x 1 and 1 x 2 crops, with padding to remove


def llava_next(attn: str = "sdpa") -> tuple[Any, Callable[..., Inputs]]:
    config = tf.LlavaNextConfig(
        vision_config=clip(),
        text_config=dict(TEXT, model_type="llama"),
        image_token_id=IMG,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = build(tf.LlavaNextForConditionalGeneration, config, attn)
    pixels, sizes = _crops([5, 3, 3], seed=3), torch.tensor(SIZES)
    with torch.no_grad():
        n = [len(f) for f in model.model.get_image_features(pixels, sizes, return_dict=True).pooler_output]

    def inputs(batch: int = 2, seed: int = 0) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        rows = [[3, ("img", n[0]), 4], [2, ("img", n[1]), ("img", n[2]), 6]][:batch]
        images = 1 if batch == 1 else 3
        return dict(prompt(rows, g), pixel_values=pixels[:images], image_sizes=sizes[:images])

    return model, inputs


def llava_onevision(attn: str = "sdpa", aspect: str = "anyres_max_9") -> tuple[Any, Callable[..., Inputs]]:
    config = tf.LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config=dict(TEXT, model_type="qwen2"),
        image_token_id=IMG,
        video_token_id=VID,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=aspect,
    )
    model = build(tf.LlavaOnevisionForConditionalGeneration, config, attn)
    pixels, sizes = _crops([5, 3, 3], seed=3), torch.tensor(SIZES)
    with torch.no_grad():
        alone = model.model.get_image_features(pixels[:1], sizes[:1], return_dict=True).pooler_output[0]
    n = [len(alone), 17, 17]  # a prompt of several pictures cuts none of them: 4 x 4 and a separator each

    def inputs(batch: int = 2, seed: int = 0, video: bool = False) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        rows: list[list[Any]] = [[3, ("img", n[0]), 4], [2, ("img", n[1]), ("img", n[2]), 6]][:batch]
        images = 1 if batch == 1 else 3
        more: Inputs = {}
        if video:  # 3 frames of 2 x 2 tokens and a separator
            rows[0] += [("vid", 13), 2]
            rows[-1] += [("vid", 13), 3]
            more = {"pixel_values_videos": torch.randn(2, 3, 3, 32, 32, generator=g)}
        return dict(
            prompt(rows, g),
            pixel_values=pixels[:images],
            image_sizes=sizes[:images],
            batch_num_images=torch.tensor([1, 2][:batch]),
            **more,
        )

    return model, inputs


MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
QWEN_IDS: dict[str, Any] = {
    "image_token_id": IMG,
    "video_token_id": VID,
    "vision_start_token_id": PARTS["start"],
    "vision_end_token_id": PARTS["end"],
}
QWEN_VISION: dict[str, Any] = {
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "in_channels": 3,
}


def _qwen_inputs(frames_apart: bool = False) -> Callable[..., Inputs]:
    """Pictures of 4 x 6, 8 x 4 and 6 x 6 patches; a video is one run of placeholders or, `frames_apart`, one per frame."""
    grids, video_grid = [(1, 4, 6), (1, 8, 4), (1, 6, 6)], (2, 4, 8)

    def inputs(batch: int = 2, seed: int = 0, video: bool = False) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        n = [t * h * w // 4 for t, h, w in grids]
        start, end = ("start", 1), ("end", 1)
        rows: list[list[Any]] = [
            [3, start, ("img", n[0]), end, 4],
            [2, start, ("img", n[1]), end, start, ("img", n[2]), end, 5],
        ][:batch]
        used = grids[:1] if batch == 1 else grids
        more: Inputs = {}
        if video:
            frames = [("vid", 8), end, 2, start, ("vid", 8)] if frames_apart else [("vid", 16)]
            rows[0] += [start, *frames, end, 3]
            more = {
                "video_grid_thw": torch.tensor([video_grid]),
                "pixel_values_videos": torch.randn(64, 96, generator=g),
            }
        out = prompt(rows, g)
        kinds = (out["input_ids"] == IMG).int() + 2 * (out["input_ids"] == VID).int()
        pixels = torch.randn(sum(t * h * w for t, h, w in used), 96, generator=g)
        return dict(out, image_grid_thw=torch.tensor(used), pixel_values=pixels, mm_token_type_ids=kinds, **more)

    return inputs


def qwen2_vl(attn: str = "sdpa") -> tuple[Any, Callable[..., Inputs]]:
    vision = dict(QWEN_VISION, embed_dim=24, hidden_size=32, mlp_ratio=2)
    config = tf.Qwen2VLConfig(text_config=dict(TEXT, rope_parameters=MROPE), vision_config=vision, **QWEN_IDS)
    return build(tf.Qwen2VLForConditionalGeneration, config, attn), _qwen_inputs()


def qwen2_5_vl(attn: str = "sdpa") -> tuple[Any, Callable[..., Inputs]]:
    vision = dict(
        QWEN_VISION,
        hidden_size=24,
        intermediate_size=48,
        out_hidden_size=32,
        window_size=16,
        fullatt_block_indexes=[1],
        tokens_per_second=2,
    )
    config = tf.Qwen2_5_VLConfig(text_config=dict(TEXT, rope_parameters=MROPE), vision_config=vision, **QWEN_IDS)
    return build(tf.Qwen2_5_VLForConditionalGeneration, config, attn), _qwen_inputs()


def qwen3_vl(attn: str = "sdpa", moe: bool = False) -> tuple[Any, Callable[..., Inputs]]:
    vision = dict(
        QWEN_VISION,
        hidden_size=24,
        intermediate_size=48,
        out_hidden_size=32,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
    )
    text = dict(TEXT, head_dim=8, rope_parameters=dict(MROPE, mrope_interleaved=True))
    if moe:
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": []}
        config = tf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **QWEN_IDS)
        return build(tf.Qwen3VLMoeForConditionalGeneration, config, attn), _qwen_inputs(frames_apart=True)
    config = tf.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    return build(tf.Qwen3VLForConditionalGeneration, config, attn), _qwen_inputs(frames_apart=True)


def _tiled(tokens: int, stacked: bool = False, types: bool = False, sizes: bool = False) -> Callable[..., Inputs]:
    """Pictures of 32 x 32 pixels, `tokens` each. stacked: [prompt, picture, ...] where missing pictures are zero."""

    def inputs(batch: int = 2, seed: int = 0) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        rows = [[3, ("img", tokens), 4], [2, ("img", tokens), 3, ("img", tokens), 6]][:batch]
        n = 1 if batch == 1 else 3
        pixels = torch.randn(n, 3, 32, 32, generator=g)
        out = prompt(rows, g)
        if types:
            out["token_type_ids"] = (out["input_ids"] == IMG).long()
        if sizes:
            out["image_sizes"] = torch.tensor([[32, 32]] * n)
        if stacked:
            first = torch.cat([pixels[:1], torch.zeros(1, 3, 32, 32)])
            pixels = pixels[None] if batch == 1 else torch.stack([first, pixels[1:]])
        return dict(out, pixel_values=pixels)

    return inputs


def internvl(attn: str = "sdpa") -> tuple[Any, Callable[..., Inputs]]:
    vision = {
        "model_type": "internvl_vision",
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": [32, 32],
        "patch_size": [4, 4],
    }
    config = tf.InternVLConfig(
        vision_config=vision,
        text_config=dict(TEXT, model_type="qwen2"),
        image_token_id=IMG,
        image_seq_length=16,
        downsample_ratio=0.5,
    )
    return build(tf.InternVLForConditionalGeneration, config, attn), _tiled(16)


def idefics3(attn: str = "sdpa", smol: bool = False) -> tuple[Any, Callable[..., Inputs]]:
    config_class, model_class = (
        (tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration)
        if smol
        else (tf.Idefics3Config, tf.Idefics3ForConditionalGeneration)
    )
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 4,
    }
    config = config_class(
        vision_config=vision,
        text_config=dict(TEXT, model_type="llama"),
        image_token_id=IMG,
        scale_factor=2,
        pad_token_id=PAD,
    )
    return build(model_class, config, attn), _tiled(16, stacked=True)


def smolvlm(attn: str = "sdpa") -> tuple[Any, Callable[..., Inputs]]:
    return idefics3(attn, smol=True)


def gemma3(attn: str = "sdpa") -> tuple[Any, Callable[..., Inputs]]:
    text = dict(TEXT, head_dim=8, sliding_window=12, layer_types=["sliding_attention", "full_attention"] * 2)
    config = tf.Gemma3Config(
        vision_config=siglip(patch=4),
        text_config=text,
        mm_tokens_per_image=16,
        image_token_index=IMG,
        image_token_id=IMG,
        boi_token_index=7,
        eoi_token_index=8,
    )
    return build(tf.Gemma3ForConditionalGeneration, config, attn), _tiled(16, types=True)


def paligemma(attn: str = "sdpa") -> tuple[Any, Callable[..., Inputs]]:
    config = tf.PaliGemmaConfig(
        vision_config=dict(siglip(), projection_dim=32, num_image_tokens=16),
        image_token_id=IMG,
        image_token_index=IMG,
        text_config=dict(TEXT, model_type="gemma", head_dim=8, num_image_tokens=16),
        projection_dim=32,
        hidden_size=32,
    )
    tiled = _tiled(16)

    def inputs(batch: int = 2, seed: int = 0) -> Inputs:
        out = tiled(batch, seed)
        return dict(out, token_type_ids=torch.zeros_like(out["input_ids"]))

    return build(tf.PaliGemmaForConditionalGeneration, config, attn), inputs


def mistral3(attn: str = "sdpa") -> tuple[Any, Callable[..., Inputs]]:
    vision = {
        "model_type": "pixtral",
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "head_dim": 12,
        "image_size": 64,
        "patch_size": 4,
    }
    config = tf.Mistral3Config(
        vision_config=vision,
        text_config=dict(TEXT, model_type="mistral", sliding_window=None),
        image_token_id=IMG,
        image_token_index=IMG,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return build(tf.Mistral3ForConditionalGeneration, config, attn), _tiled(16, sizes=True)


FAMILIES: dict[str, Make] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "mistral3": mistral3,
}
