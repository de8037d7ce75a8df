"""gather_cache: one launch for all layers whose tensors look alike; normally that is one for the whole cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels.dispatch import cdiv, on_device, opaque, power_of_two
from vlprune.kernels.gather_tokens.triton import words

TILE, WARPS = 4096, 4  # words a program copies, warps
AT_ONCE = 128  # pointers of one launch


@triton.jit
def copy_layers(
    sources, target, index, H, P, width, xb, xh, xs, xd, ib, ip,
    COUNT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """BLOCK_P rows of one head of one of the COUNT tensors; target is [COUNT, B, H, P, width]."""
    which = tl.program_id(2)
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    source = sources[0]
    for i in tl.static_range(1, COUNT):
        source = tl.where(which == i, sources[i], source)
    p = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    word = tl.arange(0, BLOCK_W)[None, :]
    row = tl.load(index + b * ib + p * ip, mask=p < P, other=-1)[:, None]
    x = tl.load(source + b * xb + h * xh + row * xs + word * xd, mask=(row >= 0) & (word < width), other=0)
    block = which.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(target + (block * P + p[:, None]) * width + word, x, mask=(p < P)[:, None] & (word < width))


def _fake(tensors: list[Tensor], index: Tensor) -> Tensor:
    b, h, _, d = tensors[0].shape
    return tensors[0].new_empty(len(tensors), b, h, index.shape[1], d)


@opaque("gather_cache", _fake)
def _launch(tensors: list[Tensor], index: Tensor) -> Tensor:
    out = _fake(tensors, index)
    if not out.numel():
        return out
    *sources, target = words(*tensors, out)
    width = target.shape[-1]
    block_w = power_of_two(width)
    block_p = max(1, TILE // block_w)
    _, b, h, p, _ = target.shape
    with on_device(index):
        for start in range(0, len(sources), AT_ONCE):
            some = sources[start : start + AT_ONCE]
            copy_layers[cdiv(p, block_p), b * h, len(some)](
                tuple(some), target[start], index, h, p, width, *some[0].stride(), *index.stride(),
                COUNT=len(some), BLOCK_P=block_p, BLOCK_W=block_w, num_warps=WARPS,
            )  # fmt: skip
    return out


def gather_cache(tensors: tuple[Tensor, ...], index: Tensor) -> tuple[Tensor, ...]:
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, t in enumerate(tensors):
        alike.setdefault((t.shape[1], t.shape[3], t.stride(), t.dtype), []).append(i)
    found: dict[int, Tensor] = {}
    for members in alike.values():
        found.update(zip(members, _launch([tensors[i] for i in members], index).unbind(0), strict=True))
    return tuple(found[i] for i in range(len(tensors)))
