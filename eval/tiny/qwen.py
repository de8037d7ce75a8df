"""The training twin of a small Qwen2_5_VLForConditionalGeneration: pictures of any size, windows, three position axes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .drawing import PATCH
from .net import (
    Llama,
    NetConfig,
    RmsNorm,
    TinyNet,
    fused,
    heads_apart,
    heads_together,
    normalised,
    rotate,
    thin,
)
from .synth import SIDE

MERGE = 2  # a visual token is 2 x 2 patches
VISION_EPS = 1e-6  # not configurable in transformers
VISION_THETA = 10000.0


@dataclass(frozen=True)
class QwenConfig(NetConfig):
    """Sizes; the defaults are those of tiny-qwen2.5-vl, 11.6 M parameters."""

    family: ClassVar[str] = "qwen"
    bias: ClassVar[bool] = True

    vision_mlp: int = 640
    kv_heads: int = 2
    eps: float = 1e-6
    window: int = 8  # patches along one side
    full_layers: tuple[int, ...] = (2, 5)  # vision layers whose patches see the whole picture
    sections: tuple[int, ...] = (4, 6, 6)  # rotary frequencies that follow time, row and column

    @property
    def tokens(self) -> int:
        return (SIDE // PATCH // MERGE) ** 2


class Places(NamedTuple):
    """Where patches lie, for one picture size."""

    order: Tensor  # [P] patches row by row -> window by window, inside one merged group by merged group
    back: Tensor  # [N] merged groups window by window -> row by row
    cos: Tensor  # [P, d], window by window
    sin: Tensor


@cache
def places(height: int, width: int, window: int, head_width: int, device: torch.device) -> Places:
    """For a picture of height x width patches, both multiples of `window`."""
    half = window // MERGE
    grid = torch.arange(height * width).view(height // window, half, MERGE, width // window, half, MERGE)
    order = grid.permute(0, 3, 1, 4, 2, 5).flatten()
    groups = torch.arange(height * width // MERGE**2).view(height // window, half, width // window, half)
    back = groups.permute(0, 2, 1, 3).flatten().argsort()
    frequencies = VISION_THETA ** -(torch.arange(0, head_width // 2, 2).float() / (head_width // 2))
    angles = torch.cat([(order // width)[:, None] * frequencies, (order % width)[:, None] * frequencies], -1)
    angles = torch.cat([angles, angles], -1)
    return Places(*(t.to(device) for t in (order, back, angles.cos(), angles.sin())))


class GatedMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden)
        self.up_proj = nn.Linear(dim, hidden)
        self.down_proj = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = fused(x, self.gate_proj, self.up_proj).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class TowerAttention(nn.Module):
    def __init__(self, c: QwenConfig, windowed: bool) -> None:
        super().__init__()
        self.heads, self.window = c.vision_heads, c.window**2 if windowed else 0
        self.qkv = nn.Linear(c.vision_dim, 3 * c.vision_dim)
        self.proj = nn.Linear(c.vision_dim, c.vision_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (heads_apart(z, self.heads) for z in self.qkv(x).chunk(3, -1))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if not self.window:
            return self.proj(heads_together(F.scaled_dot_product_attention(q, k, v)))
        q, k, v = (z.unflatten(2, (-1, self.window)).transpose(1, 2).flatten(0, 1) for z in (q, k, v))
        out = heads_together(F.scaled_dot_product_attention(q, k, v))  # [B * windows, window, D]
        return self.proj(out.view(x.shape))


class TowerBlock(nn.Module):
    def __init__(self, c: QwenConfig, windowed: bool) -> None:
        super().__init__()
        self.norm1 = RmsNorm(c.vision_dim, VISION_EPS)
        self.norm2 = RmsNorm(c.vision_dim, VISION_EPS)
        self.attn = TowerAttention(c, windowed)
        self.mlp = GatedMlp(c.vision_dim, c.vision_mlp)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    def __init__(self, c: QwenConfig) -> None:
        super().__init__()
        wide = MERGE**2 * c.vision_dim
        self.ln_q = RmsNorm(c.vision_dim, VISION_EPS)
        self.mlp = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, c.dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, P, D] window by window -> [B, N, dim]"""
        return self.mlp(self.ln_q(x).unflatten(1, (-1, MERGE**2)).flatten(2))


class PatchEmbed(nn.Module):
    def __init__(self, c: QwenConfig) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, c.vision_dim, (2, PATCH, PATCH), (2, PATCH, PATCH), bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, P, 3 * 14 * 14] -> [B, P, D]; a still picture fills both frames of the convolution."""
        return F.linear(patches, self.proj.weight.sum(2).flatten(1))


class Tower(nn.Module):
    def __init__(self, c: QwenConfig) -> None:
        super().__init__()
        self.window, self.head_width = c.window, c.vision_dim // c.vision_heads
        self.patch_embed = PatchEmbed(c)
        self.blocks = nn.ModuleList([TowerBlock(c, i not in c.full_layers) for i in range(c.vision_layers)])
        self.merger = Merger(c)

    def places(self, height: int, width: int) -> Places:
        """Of a picture of height x width pixels."""
        device = self.patch_embed.proj.weight.device
        return places(height // PATCH, width // PATCH, self.window, self.head_width, device)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> [B, P, D], window by window."""
        b, h, w, _ = pixels.shape
        where = self.places(h, w)
        x = normalised(pixels).view(b, h // PATCH, PATCH, w // PATCH, PATCH, 3).permute(0, 1, 3, 5, 2, 4)
        x = self.patch_embed(x.reshape(b, -1, 3 * PATCH * PATCH)[:, where.order])
        cos, sin = where.cos.to(x.dtype), where.sin.to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return x


class QwenText(Llama):
    def __init__(self, c: QwenConfig) -> None:
        super().__init__(c)
        self.sections = list(c.sections)

    def angles(self, positions: Tensor) -> Tensor:
        """[3, ..., T] -> [..., T, d / 2]: each section of the frequencies follows its own axis."""
        parts = super().angles(positions).split(self.sections, -1)
        return torch.cat([part[axis] for axis, part in enumerate(parts)], -1)


class QwenCore(nn.Module):
    def __init__(self, c: QwenConfig) -> None:
        super().__init__()
        self.visual = Tower(c)
        self.language_model = QwenText(c)


class TinyQwen(TinyNet):
    one_size = False
    names_contents = False
    depths = {"visual": "vision_layers", "language_model": "layers"}

    def __init__(self, c: QwenConfig) -> None:
        super().__init__(c, QwenCore(c))

    def tower(self, pixels: Tensor) -> Tensor:
        states: Tensor = self.model.visual(pixels)
        return states

    def cells(self, states: Tensor) -> Tensor:
        return states

    def arranged(self, labels: Tensor, size: tuple[int, int]) -> Tensor:
        return labels[..., self.model.visual.places(*size).order]

    def visual(self, states: Tensor, size: tuple[int, int]) -> Tensor:
        return self.model.visual.merger(states)[:, self.model.visual.places(*size).back]

    def positions(self, prefix: int, size: tuple[int, int], text: int) -> Tensor:
        """[3, T]: time, row and column. Text goes on behind the longer side of the picture."""
        height, width = size[0] // PATCH // MERGE, size[1] // PATCH // MERGE
        device = self.lm_head.weight.device
        i = torch.arange(height * width, device=device)
        picture = prefix + torch.stack([torch.zeros_like(i), i // width, i % width])
        before = torch.arange(prefix, device=device).expand(3, -1)
        after = (prefix + max(height, width) + torch.arange(text, device=device)).expand(3, -1)
        return torch.cat([before, picture, after], 1)

    def thinned(self, positions: Tensor, kept: Tensor, prefix: int, text: int, close_up: bool) -> Tensor:
        """Positions say where on the picture a token is, so nothing moves."""
        return torch.stack([thin(axis, kept, prefix, text) for axis in positions])

    def compiled_parts(self) -> list[nn.Module]:
        tower = self.model.visual
        return [tower.patch_embed, *tower.blocks, tower.merger, *self.text.layers]
