"""smol-llava in training: tiny-llava's tower made deeper, a projector, and SmolLM2 frozen behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from vlprune.eval.tiny.net import (
    ClipTower,
    NetConfig,
    Projector,
    compile_each,
    heads_apart,
    heads_together,
    rotate,
)
from vlprune.models import embedded

TOWER, PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."  # as transformers names them
APART = 20  # nats between a word's embedding and another one at the usual distance
CONFIG = NetConfig(dim=576, vision_layers=8)  # tiny-llava's tower with two layers more, projected to SmolLM2's width


class Layer(NamedTuple):
    """Weights of one decoder layer, projections of the same input side by side."""

    attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def block(x: Tensor, cos: Tensor, sin: Tensor, layer: Layer, heads: int, kv_heads: int, eps: float) -> Tensor:
    """[B, T, D] -> [B, T, D]: one decoder layer. A function of its weights, so that one compiled form serves all layers."""
    y = F.linear(normed(x, layer.attention_norm, eps), layer.qkv)
    q, k, v = heads_apart(y, heads + 2 * kv_heads).split([heads, kv_heads, kv_heads], 1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    k, v = (z.repeat_interleave(heads // kv_heads, 1) for z in (k, v))
    x = x + F.linear(heads_together(F.scaled_dot_product_attention(q, k, v, is_causal=True)), layer.out)
    gate, up = F.linear(normed(x, layer.mlp_norm, eps), layer.gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, layer.down)


class Decoder:
    """A Llama whose weights stay as they are; gradients pass through it to its input."""

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        """model: a LlamaForCausalLM with tied embeddings."""
        c = model.config
        self.heads, self.kv_heads, self.eps = c.num_attention_heads, c.num_key_value_heads, c.rms_norm_eps
        width = c.hidden_size // c.num_attention_heads
        exponents = torch.arange(0, width, 2, device=device).float() / width
        self.frequencies = c.rope_parameters["rope_theta"] ** -exponents
        self.embeddings = model.get_input_embeddings().weight.data.to(device, dtype)
        table = self.embeddings.float()
        self.half_squares = table.square().sum(1) / 2  # [V]
        self.sharpness = APART / (table - table.mean(0)).square().sum(1).mean()
        self.norm = model.model.norm.weight.data.to(device, dtype)
        self.layers = []
        for layer in model.model.layers:
            a, m = layer.self_attn, layer.mlp
            parts = (
                layer.input_layernorm.weight,
                torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]),
                a.o_proj.weight,
                layer.post_attention_layernorm.weight,
                torch.cat([m.gate_proj.weight, m.up_proj.weight]),
                m.down_proj.weight,
            )
            self.layers.append(Layer(*(p.data.to(device, dtype) for p in parts)))
        self._block: Callable[..., Tensor] = block

    def compile(self) -> None:
        self._block = torch.compile(block, dynamic=False)

    def hidden(self, x: Tensor) -> Tensor:
        """[B, T, D] embeddings -> [B, T, D], normed."""
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.frequencies
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)  # [T, d]
        for layer in self.layers:
            x = self._block(x, cos, sin, layer, self.heads, self.kv_heads, self.eps)
        return normed(x, self.norm, self.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embeddings)


class Core(nn.Module):
    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.vision_tower = ClipTower(c)
        self.multi_modal_projector = Projector(c)


class Eyes(nn.Module):
    """What is trained and shipped; parameters are named as in LlavaForConditionalGeneration."""

    def __init__(self, c: NetConfig = CONFIG) -> None:
        super().__init__()
        self.config = c
        self.model = Core(c)

    def states(self, pixels: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> [B, 1 + N, D], CLS first."""
        return self.model.vision_tower(pixels)

    def visual(self, states: Tensor) -> Tensor:
        """-> [B, N, dim], what the language model gets."""
        return self.model.multi_modal_projector(states[:, 1:])

    def matrices(self) -> list[nn.Parameter]:
        """Those inside the tower and of the projector; the rest are embeddings and vectors."""
        return [p for name, p in self.named_parameters() if p.ndim == 2 and ("layers" in name or "projector" in name)]

    def compile_layers(self) -> None:
        tower = self.model.vision_tower
        compile_each([tower.embeddings, *tower.encoder.layers[:-1]])


def warm(eyes: Eyes) -> None:
    """Start from tiny-llava's trained tower, which reads capital letters and tells shapes and colours apart.

    The layers it lacks come before its last, which serves CLS alone. They are copies of the one before them that write
    nothing yet, so the states are tiny-llava's.
    """
    stored = load_file(embedded("tiny-llava") / "model.safetensors")
    own = {name: value.float() for name, value in stored.items() if "vision_tower." in name}
    own = {TOWER + name.partition("vision_tower.")[2].removeprefix("vision_model."): v for name, v in own.items()}
    theirs, ours = NetConfig().vision_layers, eyes.config.vision_layers
    last = {name: own.pop(name) for name in list(own) if f"layers.{theirs - 1}." in name}
    own |= {name.replace(f"layers.{theirs - 1}.", f"layers.{ours - 1}."): value for name, value in last.items()}
    for name in [name for name in own if f"layers.{theirs - 2}." in name]:
        for number in range(theirs - 1, ours - 1):
            value = torch.zeros_like(own[name]) if "out_proj." in name or "fc2." in name else own[name]
            own[name.replace(f"layers.{theirs - 2}.", f"layers.{number}.")] = value
    eyes.load_state_dict(own | {k: v for k, v in eyes.state_dict().items() if k.startswith(PROJECTOR)})


def fit_scale(eyes: Eyes, decoder: Decoder, pixels: Tensor) -> None:
    """Scale the projector so that visual tokens are as long as the embeddings of words, on the root mean square."""
    # with gradients, so that it runs in the form that was compiled for training
    size = eyes.visual(eyes.states(pixels)).detach().float().pow(2).mean().sqrt()
    factor = decoder.embeddings.float().pow(2).mean().sqrt() / size
    last = eyes.model.multi_modal_projector.linear_2
    with torch.no_grad():
        last.weight.mul_(factor)
        last.bias.mul_(factor)
