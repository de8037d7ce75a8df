"""Weights as a GGUF file has them, four or eight bits each, under the names of transformers: read without the package gguf.

    Q4_1: 20 bytes are 32 weights    w = d q + m,  d and m float16, q of 4 bits, those of weights 0 to 15 in the low halves
    Q8_0: 34 bytes are 32 weights    w = d q,      d float16, q int8

The blocks are kept as they are, so nothing is lost; of the rows of query and key projections the order alone changes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

BLOCK = 32  # weights
Q4_1, Q8_0 = "q4_1", "q8_0"  # at the end of a stored tensor's name; others are stored as they are
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "embed_tokens", "output_norm": "norm"}


def read(path: Path, heads: int, kv_heads: int) -> dict[str, Tensor]:
    """Blocks and vectors of a Llama's GGUF file; needs gguf."""
    from gguf import GGUFReader

    found = {}
    for tensor in GGUFReader(path).tensors:
        kind = tensor.tensor_type.name.lower()
        values = torch.from_numpy(tensor.data.copy())
        *place, part, _ = tensor.name.split(".")  # blk.3.attn_q.weight
        if part in ("attn_q", "attn_k"):
            values = halves_together(values, heads if part == "attn_q" else kv_heads)
        name = f"model.layers.{place[1]}.{LAYER[part]}.weight" if place else f"model.{OUTSIDE[part]}.weight"
        found[f"{name}.{kind}" if kind in (Q4_1, Q8_0) else name] = values
    return found


def halves_together(rows: Tensor, heads: int) -> Tensor:
    """[heads * d, ...]: GGUF interleaves the two halves of a head that rotate together, transformers does not."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def weights(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `read` gave -> a state dict in float32."""
    opened = {Q4_1: four_bits, Q8_0: eight_bits}
    found = {}
    for name, values in stored.items():
        stem, _, kind = name.rpartition(".")
        found[stem if kind in opened else name] = opened[kind](values) if kind in opened else values.float()
    return found


def four_bits(blocks: Tensor) -> Tensor:
    """uint8 [rows, n * 20] -> [rows, n * 32]"""
    parts = blocks.unflatten(1, (-1, 4 + BLOCK // 2))
    scale, least = parts[..., :4].contiguous().view(torch.float16).float().split(1, -1)
    bits = parts[..., 4:]
    return (scale * torch.cat([bits & 15, bits >> 4], -1) + least).flatten(1)


def eight_bits(blocks: Tensor) -> Tensor:
    """uint8 [rows, n * 34] -> [rows, n * 32]"""
    parts = blocks.unflatten(1, (-1, 2 + BLOCK))
    scale = parts[..., :2].contiguous().view(torch.float16).float()
    return (scale * parts[..., 2:].contiguous().view(torch.int8)).flatten(1)
