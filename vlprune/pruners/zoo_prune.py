"""ZOO-Prune: tokens to which the projector reacts, kept apart from each other. No attention, no gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vlprune.context import Context
from vlprune.errors import PruningError, SpecError
from vlprune.kernels.dispatch import leading
from vlprune.ops import max_min
from vlprune.pruner import Pruner, Source, register
from vlprune.selection import Selection, top

CONSTANT = 1e-4  # rounding of float32 differences: a linear projector's S varies by 1e-5 of itself where x is near 1
CHUNK = 2**23  # numbers held at a time for one side of the differences: 32 MiB


@register("zoo_prune")
@dataclass(frozen=True)
class ZooPrune(Pruner):
    """Zeroth-order sensitivity of the projector M at its inputs x, then sensitivity times distance, greedily.

        S_i = (1/m) sum_j |M(x_i + h u_j) - M(x_i - h u_j)|_2 / (2 h),    u_j on the unit sphere, the same for all i
        w = (S - min S) / (max S - min S + 1e-8);    D_ij = 1 - cos(M(x_i), M(x_j))
        s_1 = argmax w;    s_{t+1} = argmax_{i not in S_t} w_i min_{j in S_t} D_ij

    directions, h: m and h. In float32 whatever the model's dtype: ``h u`` has entries of 3e-4 at a width of 1024, which
        half precision rounds away (rank correlation with the exact S about 0.5 in fp16, 0.1 in bf16).
    rank: of the weights of M's linear layers while S is measured; 0 leaves them whole. 128 for LLaVA-NeXT.
    seed: of the directions, drawn on the CPU. The authors draw without a seed, in half precision.
    crops: "each" gives every frame of every grid K / F tokens of its own, as the authors do for LLaVA-NeXT; the first
        crops take what does not divide, and what a crop cannot fill goes round the others. It waits for the device.
    newline: row separators are never scored and stay, beside the picked tokens, within K: all of them, or evenly
        spaced ones where they would take more than half of it. The authors keep them on top of K, but keep the tokens
        one base crop (the first frame) earlier in their place; "official" does the same within K.

    Differs as well: S counts as constant, w = 1, where it varies by no more than rounding, 1e-4 of itself.
    """

    directions: int = 64
    h: float = 0.01
    rank: int = 0
    seed: int = 0
    crops: Literal["together", "each"] = "together"
    newline: Literal["keep", "official"] = "keep"

    stage = "projector"
    batched = property(lambda self: self.crops == "together")
    source = Source(paper="arXiv:2509.24837", code="AIM-SKKU/ZOO-Prune@c735dc7", fidelity="exact")

    def __post_init__(self) -> None:
        if self.directions < 1 or self.h <= 0 or self.rank < 0:
            found = f"directions={self.directions}, h={self.h}, rank={self.rank}"
            raise SpecError(f"zoo_prune: {found}; directions is at least 1, h above 0, rank at least 0")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        crops = self.crops == "each" or self.newline == "official"
        fields = {"encoder_features", "features", "project", "generator", "newline"}
        return frozenset(fields | {"grids"} | {"index"} if crops else fields)

    def select(self, ctx: Context) -> Selection:
        score = self.sensitivity(ctx)
        newline = ctx.newline if ctx.newline is None else ctx.newline.to(score.device)
        if self.crops == "each":
            order = _greedy_each(ctx.features, score, newline, _crop(ctx, score.device), ctx.keep)
        else:
            order = _greedy(ctx.features, score, newline, ctx.keep)  # [N], the earlier a pick the higher
        if newline is None:
            return Selection(top(order, ctx.keep), scores=score)
        stays = newline
        if self.newline == "official":
            base = ctx.grids[0].height * ctx.grids[0].width
            stays = torch.zeros_like(newline)
            stays[: max(len(newline) - base, 0)] = newline[base:]
        return Selection(top(order.masked_fill(_thinned(stays, ctx.keep // 2), torch.inf), ctx.keep), scores=score)

    def sensitivity(self, ctx: Context) -> Tensor:
        """S, [N] float32."""
        if ctx.project is None or ctx.encoder_features is None:
            raise PruningError(
                "zoo_prune needs Context.project and Context.encoder_features, the projector and its inputs"
            )
        x, project = ctx.encoder_features, ctx.project
        drawn = self.draw(ctx, x.shape[-1])
        if x.is_cuda:
            drawn = drawn.pin_memory()  # from other memory the host would wait for the copy
        directions = drawn.to(x.device, non_blocking=True)
        return leading(lambda x: sensitivity(project, x, directions, self.h, self.rank), x)

    def draw(self, ctx: Context, width: int) -> Tensor:
        """The directions before normalisation, [m, width] float32 on the CPU."""
        if ctx.generator is None:
            raise PruningError("zoo_prune needs Context.generator")
        return torch.randn(self.directions, width, generator=ctx.generator.manual_seed(self.seed))


@torch.no_grad()
def sensitivity(
    project: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor, h: float, rank: int | Sequence[int] = 0
) -> Tensor:
    """Mean over directions of ``|M(x + h u) - M(x - h u)| / (2 h)``.

    Where M starts with a linear layer, ``W (x +- h u) + b = (W x + b) +- h W u`` takes that layer out of the loop and
    spares x the rounding; where it ends with one, that layer runs once, on the difference. Nothing of shape [m, N, D]
    is ever there.

    Args:
        project: M; an nn.Sequential, or a module of linear_1, act, linear_2, is taken apart, any other module runs with
            float32 parameters, and any other callable is handed float32 inputs.
        x: [*, N, Dv], any float dtype; everything runs in float32, or in float64 if x is.
        directions: [m, Dv], normalised here.
        rank: of the linear layers' weights, one number for all or one for each; 0 is full.
    Returns:
        [*, N].
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    u = directions.to(x)
    u = h * u / (u.norm(dim=-1, keepdim=True) + 1e-12)
    layers: list[Any] = _layers(project, x, rank)
    if isinstance(layers[0], _Linear):
        first = layers.pop(0)
        x, u = first(x), first.product(u)
    last = layers.pop() if layers and isinstance(layers[-1], _Linear) else None
    u = u.view(len(u), *[1] * (x.dim() - 1), -1)  # [directions, 1, D] for x [N, D]
    total = torch.zeros(x.shape[:-1], dtype=x.dtype, device=x.device)
    step = max(1, CHUNK // x.numel())
    for start in range(0, len(u), step):
        some = u[start : start + step]
        plus, minus = (x + some, x - some) if layers else (some, -some)  # [directions, N or 1, D]
        for layer in layers:
            plus, minus = layer(plus), layer(minus)
        difference = plus - minus if last is None else (plus - minus) @ last.down
        total += difference.norm(dim=-1).sum(dim=0)
    return total / (2 * h * len(u))


class _Linear(NamedTuple):
    """``x @ down @ up + bias``; the rows of `up` are orthonormal, so ``x @ down`` has the norm of ``x @ down @ up``."""

    down: Tensor
    up: Tensor | None
    bias: Tensor | None

    def product(self, x: Tensor) -> Tensor:
        return x @ self.down if self.up is None else x @ self.down @ self.up

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x) if self.bias is None else self.product(x) + self.bias


def _layers(
    project: Callable[[Tensor], Tensor], like: Tensor, rank: int | Sequence[int]
) -> list[_Linear | Callable[[Tensor], Tensor]]:
    """M, or the layers it is known to be made of, for tensors `like` this one."""
    if isinstance(project, nn.Module) and any(p.is_meta for p in project.parameters()):
        raise PruningError("zoo_prune reads the projector's weights, which device_map left on disk or in main memory; give the "
                           "projector a device of its own")  # fmt: skip
    modules: list[Any]
    if isinstance(project, nn.Sequential) and len(project):
        modules = list(project)
    elif isinstance(project, nn.Module) and [n for n, _ in project.named_children()] == ["linear_1", "act", "linear_2"]:
        modules = list(project.children())
    else:
        modules = [project]
    linear = [m for m in modules if type(m) is nn.Linear]  # a subclass may store its weight in a form of its own
    if rank and not linear:
        raise PruningError(f"zoo_prune: rank={rank} needs a projector of linear layers, got {type(project).__name__}")
    ranks = dict(zip(linear, [rank] * len(linear) if isinstance(rank, int) else rank, strict=True))
    return [_linear(m, ranks[m], like) if m in ranks else _cast(m, like.dtype) for m in modules]


def _cast(module: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    if not isinstance(module, nn.Module):
        return module
    state = {k: v.to(dtype) for k, v in module.state_dict().items() if v.is_floating_point()}
    return lambda x: functional_call(module, state, (x,)).to(x.device)  # with device_map it may lie elsewhere


_truncated: WeakKeyDictionary[nn.Linear, tuple[object, Tensor, Tensor]] = WeakKeyDictionary()


def _linear(layer: nn.Linear, rank: int, like: Tensor) -> _Linear:
    """The layer, its weight cut to its `rank` largest singular values."""
    weight, bias = layer.weight, None if layer.bias is None else layer.bias.to(like)
    if not rank or rank >= min(weight.shape):
        return _Linear(weight.to(like).T, None, bias)
    version = None if weight.is_inference() else weight._version
    key = (rank, like.dtype, like.device, weight.device, weight.data_ptr(), version)
    if layer not in _truncated or _truncated[layer][0] != key:  # kept: it takes seconds at a width of 4096
        left, values, right = torch.linalg.svd(weight.to(like), full_matrices=False)
        _truncated[layer] = (key, (values[:rank, None] * right[:rank]).T.contiguous(), left[:, :rank].T.contiguous())
    return _Linear(*_truncated[layer][1:], bias)


def _crop(ctx: Context, device: torch.device) -> Tensor:
    """[N] int64: which frame of which grid a token lies in."""
    ends = torch.tensor([g.height * g.width for g in ctx.grids for _ in range(g.frames)]).cumsum(0)
    cells = torch.arange(ctx.tokens, device=device) if ctx.index is None else ctx.index.to(device)
    return torch.bucketize(cells, ends.to(device), right=True)


def _weights(score: Tensor) -> Tensor:
    """w from S, [N]; ones where S is constant."""
    low, high = score.aminmax()
    return torch.where(high - low <= CONSTANT * high, 1.0, (score - low) / (high - low + 1e-8))


def _greedy(features: Tensor, score: Tensor, newline: Tensor | None, keep: int) -> Tensor:
    """[N]: K for the first pick, then less and less, 0 for what was not picked."""
    if newline is None:
        weights = _weights(score)
    else:  # separators weigh nothing and leave the range of S alone
        highest = score.masked_fill(newline, -torch.inf).amax()
        weights = _weights(torch.where(newline, highest, score)).masked_fill(newline, 0.0)
    picks = max_min(features, keep, weights=weights, first="weight", order=True)
    falling = torch.arange(keep, 0, -1, dtype=torch.float32, device=score.device)
    return torch.zeros(len(score), device=score.device).scatter(0, picks, falling)


def _greedy_each(features: Tensor, score: Tensor, newline: Tensor | None, crop: Tensor, keep: int) -> Tensor:
    """Like `_greedy`, every crop for itself; the t-th picks of all crops stand before any (t + 1)-th."""
    inside = torch.arange(int(crop.max()) + 1, device=crop.device)[:, None] == crop  # [F, N]
    if newline is not None:
        inside = inside & ~newline
    members = [tokens for tokens in (row.nonzero().squeeze(1) for row in inside) if len(tokens)]
    rounds = 1
    while sum(min(len(tokens), rounds) for tokens in members) < keep and rounds < len(crop):
        rounds += 1
    order = torch.zeros(len(score), device=score.device)
    for number, tokens in enumerate(members):
        count = min(rounds, len(tokens))
        picks = max_min(features[tokens], count, weights=_weights(score[tokens]), first="weight", order=True)
        order[tokens[picks]] = rounds - torch.arange(count, device=order.device) - number / len(members)
    return order


def _thinned(mask: Tensor, most: int) -> Tensor:
    """At most `most` of the tokens in `mask`, evenly spaced; all if they are not more."""
    place, total = mask.cumsum(0), mask.sum()
    room = total.clamp(max=most)
    return mask & (place * room // total.clamp(min=1) > (place - 1) * room // total.clamp(min=1))
