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
TEXT: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=99,
    max_position_embeddings=512, pad_token_id=PAD, bos_token_id=1, eos_token_id=None, rms_norm_eps=1e-6,
)  # fmt: skip
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
    return dict(model_type="clip_vision_model", hidden_size=24, intermediate_size=48, num_hidden_layers=layers,
                num_attention_heads=4, image_size=image, patch_size=patch, projection_dim=24)  # fmt: skip


def siglip(image: int = 32, patch: int = 8, layers: int = 3) -> dict[str, Any]:
    return dict(model_type="siglip_vision_model", hidden_size=24, intermediate_size=48, num_hidden_layers=layers,
                num_attention_heads=4, image_size=image, patch_size=patch)  # fmt: skip


def prompt(rows: list[list[Any]], g: torch.Generator) -> Inputs:
    """Left-padded prompts. A row is a list of numbers n (n random text tokens) and pairs ("img" | "vid", n)."""
    out: list[list[int]] = []
    for row in rows:
        ids: list[int] = []
        for part in row:
            if isinstance(part, tuple):
                ids += [IMG if part[0] == "img" else VID] * part[1]
            else:
                ids += torch.randint(10, 99, (part,), generator=g).tolist()
        out.append(ids)
    length = max(map(len, out))
    ids_t = torch.full((len(out), length), PAD)
    mask = torch.zeros(len(out), length, dtype=torch.long)
    for i, row_ids in enumerate(out):
        ids_t[i, length - len(row_ids) :] = torch.tensor(row_ids)
        mask[i, length - len(row_ids) :] = 1
    return dict(input_ids=ids_t, attention_mask=mask)


def llava(attn: str = "sdpa", text: str = "llama", **extra: Any) -> tuple[Any, Callable[..., Inputs]]:
    config = tf.LlavaConfig(
        vision_config=clip(), text_config=dict(TEXT, model_type=text, **extra), image_token_id=IMG, image_seq_length=16,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = build(tf.LlavaForConditionalGeneration, config, attn)

    def inputs(batch: int = 2, seed: int = 0) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        rows = [[3, ("img", 16), 4], [2, ("img", 16), 3, ("img", 16), 6], [7, ("img", 16), 9]][:batch]
        n = sum(isinstance(part, tuple) for row in rows for part in row)
        return dict(prompt(rows, g), pixel_values=torch.randn(n, 3, 32, 32, generator=g))

    return model, inputs


FAMILIES: dict[str, Make] = {"llava": llava}
