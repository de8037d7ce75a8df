"""gather_cache: one launch for all layers whose tensors look alike; normally that is one for the whole cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels.dispatch import cdiv, opaque, power_of_two
from vlprune.kernels.gather_tokens.triton import WORDS, in_words, word_size
from vlprune.kernels.plan import Buffer, Launch, Plan, Slot, planned

TILE, WARPS = 4096, 4  # words a program copies, warps
AT_ONCE = 128  # pointers of one launch


@triton.jit
def copy_layers(
    sources, target, index, first, H, P, width, xb, xh, xs, xd, ib, ip,
    COUNT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """BLOCK_P rows of one head of one of COUNT tensors, numbered from `first` in target [all, B, H, P, width]."""
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
    block = (first + which).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(target + (block * P + p[:, None]) * width + word, x, mask=(p < P)[:, None] & (word < width))


@planned
def _plan(inputs) -> Plan:
    index, *tensors = inputs
    b, h, _, d = tensors[0].shape
    p = index.shape[1]
    out = Buffer((len(tensors), b, h, p, d), tensors[0].dtype)
    if not b * h * p * d:
        return Plan((out,), ())
    unit = word_size(*tensors)
    width = in_words(d, tensors[0], unit)
    block_w = power_of_two(width)
    block_p = max(1, TILE // block_w)
    *steps, last = tensors[0].stride()
    steps = [in_words(step, tensors[0], unit) for step in steps]
    last = last if unit == tensors[0].element_size() else 1
    target = Slot(len(inputs), WORDS[unit])
    launches = []
    for start in range(0, len(tensors), AT_ONCE):
        some = tuple(Slot(1 + i, WORDS[unit]) for i in range(start, min(start + AT_ONCE, len(tensors))))
        launches.append(Launch(
            copy_layers, (cdiv(p, block_p), b * h, len(some)), some, target, Slot(0), start, h, p, width, *steps, last,
            *index.stride(), COUNT=len(some), BLOCK_P=block_p, BLOCK_W=block_w, num_warps=WARPS,
        ))  # fmt: skip
    return Plan((out,), tuple(launches))


def _fake(tensors: list[Tensor], index: Tensor) -> Tensor:
    b, h, _, d = tensors[0].shape
    return tensors[0].new_empty(len(tensors), b, h, index.shape[1], d)


@opaque("gather_cache", _fake)
def _launch(tensors: list[Tensor], index: Tensor) -> Tensor:
    return _plan((index, *tensors))[0]


def gather_cache(tensors: tuple[Tensor, ...], index: Tensor) -> tuple[Tensor, ...]:
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, t in enumerate(tensors):
        alike.setdefault((t.shape[1], t.shape[3], t.stride(), t.dtype), []).append(i)
    found: dict[int, Tensor] = {}
    for members in alike.values():
        found.update(zip(members, _launch([tensors[i] for i in members], index).unbind(0), strict=True))
    return tuple(found[i] for i in range(len(tensors)))
