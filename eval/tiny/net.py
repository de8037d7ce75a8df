"""Plain PyTorch twins of small transformers models, for training: what they share, and LlavaForConditionalGeneration.

Module and parameter names equal those of transformers, so a state dict moves over as it is. The twins are faster to
train: they fuse projections, skip all bookkeeping, and compile layer by layer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

from .drawing import PATCH
from .synth import SIDE

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


@dataclass(frozen=True)
class NetConfig:
    """Sizes; the defaults are those of tiny-llava, 11.4 M parameters."""

    family: ClassVar[str] = "llava"
    bias: ClassVar[bool] = False  # in the query, key and value projections of the language model

    vocabulary: int = 400
    vision_dim: int = 256
    vision_layers: int = 6
    vision_heads: int = 8
    vision_mlp: int = 1024
    dim: int = 256
    layers: int = 8
    heads: int = 8
    mlp: int = 640
    rope_theta: float = 10000.0
    eps: float = 1e-5

    @property
    def tokens(self) -> int:
        """Visual tokens of a picture of SIDE x SIDE pixels."""
        return (SIDE // PATCH) ** 2

    @property
    def kv_heads(self) -> int:
        return self.heads


def fused(x: Tensor, *linears: nn.Linear) -> Tensor:
    """Several linear layers of one input as one product, outputs side by side."""
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    return F.linear(x, weight, bias)


def heads_apart(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads * d] -> [B, heads, T, d]"""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def heads_together(x: Tensor) -> Tensor:
    """[B, heads, T, d] -> [B, T, heads * d]"""
    return x.transpose(1, 2).flatten(2)


def normalised(pixels: Tensor) -> Tensor:
    """uint8 pixels -> what the image processor makes of them, in autocast's dtype."""
    mean = torch.tensor(MEAN, device=pixels.device) * 255
    std = torch.tensor(STD, device=pixels.device) * 255
    device = pixels.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return ((pixels.float() - mean) / std).to(dtype)


class ClipAttention(nn.Module):
    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.heads = c.vision_heads
        self.k_proj = nn.Linear(c.vision_dim, c.vision_dim)
        self.v_proj = nn.Linear(c.vision_dim, c.vision_dim)
        self.q_proj = nn.Linear(c.vision_dim, c.vision_dim)
        self.out_proj = nn.Linear(c.vision_dim, c.vision_dim)

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """Attention of all tokens, or of a few query tokens, to all of x."""
        if queries is None:
            q, k, v = fused(x, self.q_proj, self.k_proj, self.v_proj).chunk(3, -1)
        else:
            q = self.q_proj(queries)
            k, v = fused(x, self.k_proj, self.v_proj).chunk(2, -1)
        q, k, v = (heads_apart(z, self.heads) for z in (q, k, v))
        return self.out_proj(heads_together(F.scaled_dot_product_attention(q, k, v)))


class ClipMlp(nn.Module):
    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(c.vision_dim, c.vision_mlp)
        self.fc2 = nn.Linear(c.vision_mlp, c.vision_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # quick GELU


class ClipLayer(nn.Module):
    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.self_attn = ClipAttention(c)
        self.layer_norm1 = nn.LayerNorm(c.vision_dim, eps=1e-5)
        self.mlp = ClipMlp(c)
        self.layer_norm2 = nn.LayerNorm(c.vision_dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))

    def cls(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, 1, D]: what forward gives for the first token, without the others."""
        y = self.layer_norm1(x)
        first = x[:, :1] + self.self_attn(y, queries=y[:, :1])
        return first + self.mlp(self.layer_norm2(first))


class ClipEmbeddings(nn.Module):
    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(c.vision_dim) * 0.02)
        self.patch_embedding = nn.Conv2d(3, c.vision_dim, PATCH, PATCH, bias=False)
        self.position_embedding = nn.Embedding(c.tokens + 1, c.vision_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, H, W, 3] normalised pixels -> [B, 1 + N, D]; the convolution as a product over cut-out patches."""
        b, h, w, _ = pixels.shape
        x = pixels.view(b, h // PATCH, PATCH, w // PATCH, PATCH, 3).permute(0, 1, 3, 5, 2, 4)
        x = F.linear(x.reshape(b, -1, 3 * PATCH * PATCH), self.patch_embedding.weight.flatten(1))
        cls = self.class_embedding.to(x.dtype).expand(b, 1, -1)
        return torch.cat([cls, x], 1) + self.position_embedding.weight


class ClipEncoder(nn.Module):
    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ClipLayer(c) for _ in range(c.vision_layers)])


class ClipTower(nn.Module):
    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.embeddings = ClipEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.vision_dim, eps=1e-5)  # spelt as transformers spells it
        self.encoder = ClipEncoder(c)
        self.post_layernorm = nn.LayerNorm(c.vision_dim, eps=1e-5)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> [B, 1 + N, D], the output of the second-last layer, CLS first."""
        x = normalised(pixels)
        x = self.pre_layrnorm(self.embeddings(x)).to(x.dtype)
        for layer in self.encoder.layers[:-1]:
            x = layer(x)
        return x

    def pooled(self, states: Tensor) -> Tensor:
        """[B, 1 + N, D] of the second-last layer -> [B, D]: the CLS token after the last one."""
        last = self.encoder.layers[-1]
        assert isinstance(last, ClipLayer)
        return self.post_layernorm(last.cls(states))[:, 0]


class Projector(nn.Module):
    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(c.vision_dim, c.dim)
        self.linear_2 = nn.Linear(c.dim, c.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class RmsNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class LlamaAttention(nn.Module):
    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = c.heads, c.kv_heads
        width = c.dim // c.heads * c.kv_heads
        self.q_proj = nn.Linear(c.dim, c.dim, bias=c.bias)
        self.k_proj = nn.Linear(c.dim, width, bias=c.bias)
        self.v_proj = nn.Linear(c.dim, width, bias=c.bias)
        self.o_proj = nn.Linear(c.dim, c.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        together = heads_apart(fused(x, self.q_proj, self.k_proj, self.v_proj), self.heads + 2 * self.kv_heads)
        q, k, v = together.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.kv_heads < self.heads:
            k, v = (z.repeat_interleave(self.heads // self.kv_heads, 1) for z in (k, v))
        return self.o_proj(heads_together(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class LlamaMlp(nn.Module):
    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.dim, c.mlp, bias=False)
        self.up_proj = nn.Linear(c.dim, c.mlp, bias=False)
        self.down_proj = nn.Linear(c.mlp, c.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = fused(x, self.gate_proj, self.up_proj).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class LlamaLayer(nn.Module):
    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(c)
        self.mlp = LlamaMlp(c)
        self.input_layernorm = RmsNorm(c.dim, c.eps)
        self.post_attention_layernorm = RmsNorm(c.dim, c.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    frequencies: Tensor

    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocabulary, c.dim)
        self.layers = nn.ModuleList([LlamaLayer(c) for _ in range(c.layers)])
        self.norm = RmsNorm(c.dim, c.eps)
        width = c.dim // c.heads
        frequencies = c.rope_theta ** -(torch.arange(0, width, 2).float() / width)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """[B, T, D] embeddings at [T] or [B, T] positions -> [B, T, D], before the final norm."""
        angles = self.angles(positions)
        angles = torch.cat([angles, angles], -1)
        angles = angles[:, None] if angles.ndim == 3 else angles[None, None]  # [B or 1, 1, T, d]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x

    def angles(self, positions: Tensor) -> Tensor:
        """[..., T] -> [..., T, d / 2]"""
        return positions[..., None].float() * self.frequencies


class TinyNet(nn.Module, ABC):
    """What training asks of a twin. A picture of H x W pixels has P cells of 14 x 14 and N visual tokens."""

    one_size: ClassVar[bool]  # of all pictures; otherwise shapes change from batch to batch
    names_contents: ClassVar[bool]  # whether `pooled` sums up a picture
    depths: ClassVar[dict[str, str]]  # where a residual stream runs: part of a parameter's name -> field of the config
    model: Any  # tower and decoder, named as transformers names them

    def __init__(self, c: NetConfig, model: nn.Module) -> None:
        super().__init__()
        self.config, self.model = c, model
        self.lm_head = nn.Linear(c.dim, c.vocabulary, bias=False)
        initialise(self)

    @property
    def text(self) -> Llama:
        text: Llama = self.model.language_model
        return text

    @abstractmethod
    def tower(self, pixels: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> the tower's states."""

    @abstractmethod
    def cells(self, states: Tensor) -> Tensor:
        """-> [B, P, D], a state for every cell, in the order of `arranged`."""

    @abstractmethod
    def arranged(self, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, 5, P] labels of the cells of a (height, width) picture, row by row -> in the order of `cells`."""

    @abstractmethod
    def visual(self, states: Tensor, size: tuple[int, int]) -> Tensor:
        """-> [B, N, dim], what the language model gets, row by row."""

    @abstractmethod
    def positions(self, prefix: int, size: tuple[int, int], text: int) -> Tensor:
        """[..., prefix + N + text] positions of the whole sequence."""

    @abstractmethod
    def thinned(self, positions: Tensor, kept: Tensor, prefix: int, text: int, close_up: bool) -> Tensor:
        """[..., B, prefix + K + text] positions when only the visual tokens `kept` [B, K] are there.

        Where the family allows it, `close_up` moves tokens and text together.
        """

    @abstractmethod
    def compiled_parts(self) -> list[nn.Module]: ...

    def pooled(self, states: Tensor) -> Tensor:
        """[B, D] summary of a picture."""
        raise NotImplementedError

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices inside both stacks and between them; all other parameters are embeddings, heads and vectors."""
        inner = ("layers", "blocks", "projector", "merger")
        return [p for name, p in self.named_parameters() if p.ndim == 2 and any(part in name for part in inner)]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(self.text.norm(hidden))

    def compile_layers(self) -> None:
        compile_each(self.compiled_parts())


def compile_each(modules: Iterable[nn.Module]) -> None:
    """Compile in place, one by one, so that names stay."""
    torch._dynamo.config.recompile_limit = 64  # each layer counts as another form of the same code
    for module in modules:
        module.compile(dynamic=False)


def thin(z: Tensor, kept: Tensor, prefix: int, text: int) -> Tensor:
    """[T] over prefix, N visual tokens and text -> [B, prefix + K + text] with the kept ones [B, K] alone."""
    before, after = z[:prefix].expand(len(kept), -1), z[len(z) - text :].expand(len(kept), -1)
    return torch.cat([before, z[prefix + kept], after], 1)


class Core(nn.Module):
    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.vision_tower = ClipTower(c)
        self.multi_modal_projector = Projector(c)
        self.language_model = Llama(c)


class TinyLlava(TinyNet):
    one_size = True
    names_contents = True
    depths = {"vision_tower": "vision_layers", "language_model": "layers"}

    def __init__(self, c: NetConfig) -> None:
        super().__init__(c, Core(c))

    def tower(self, pixels: Tensor) -> Tensor:
        states: Tensor = self.model.vision_tower(pixels)
        return states

    def cells(self, states: Tensor) -> Tensor:
        return states[:, 1:]

    def arranged(self, labels: Tensor, size: tuple[int, int]) -> Tensor:
        return labels

    def visual(self, states: Tensor, size: tuple[int, int]) -> Tensor:
        return self.model.multi_modal_projector(states[:, 1:])

    def positions(self, prefix: int, size: tuple[int, int], text: int) -> Tensor:
        return torch.arange(prefix + self.config.tokens + text, device=self.lm_head.weight.device)

    def thinned(self, positions: Tensor, kept: Tensor, prefix: int, text: int, close_up: bool) -> Tensor:
        b, k = kept.shape
        return positions[: prefix + k + text].expand(b, -1) if close_up else thin(positions, kept, prefix, text)

    def pooled(self, states: Tensor) -> Tensor:
        return self.model.vision_tower.pooled(states)

    def compiled_parts(self) -> list[nn.Module]:
        tower = self.model.vision_tower
        return [tower.embeddings, *tower.encoder.layers[:-1], *self.text.layers]


RESIDUAL = ("out_proj.weight", "o_proj.weight", "attn.proj.weight", "down_proj.weight", "fc2.weight")


def initialise(net: TinyNet) -> None:
    """Normal weights of standard deviation 0.7 / sqrt(inputs), smaller where a layer writes to a residual stream."""
    for name, parameter in net.named_parameters():
        if "embed_tokens" in name or "lm_head" in name:
            nn.init.normal_(parameter, std=0.02)
        elif "position_embedding" in name:
            nn.init.normal_(parameter, std=0.05)
        elif parameter.ndim >= 2:
            std = 0.7 / math.sqrt(parameter[0].numel())
            if name.endswith(RESIDUAL):
                depth = next(getattr(net.config, field) for part, field in net.depths.items() if part in name)
                std /= math.sqrt(2 * depth)
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
