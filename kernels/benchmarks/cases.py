"""What is timed: one `Case` per op and size, with its check, its baselines and the target it is held to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from vlprune import ops

DTYPE = torch.bfloat16
CACHE = 120e6  # bytes of inputs that no cache holds

Met = Callable[[float, dict[str, float], float], bool]  # of our time, the baselines' times and the floor (0: none)


@dataclass(frozen=True)
class Case:
    op: str
    size: str
    inputs: tuple[tuple[Tensor, ...], ...]  # sets of the same shapes; each is timed
    run: Callable[..., Any]
    check: Callable[..., str]  # of a result and its inputs; an empty string means correct
    baselines: dict[str, Callable[..., Any]] = field(default_factory=dict)
    capture: bool = True  # whether a CUDA graph can hold the baselines
    moved: float | None = None  # bytes that must move
    target: str = ""
    met: Met | None = None


def sets(make: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], ...]:
    """As many fresh input sets as it takes to fill the cache, 1 to 8."""
    first = make()
    size = sum(t.numel() * t.element_size() for t in first)
    return (first, *(make() for _ in range(min(7, int(CACHE // size)))))


def randn(*size: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*size, device="cuda").to(dtype)


def index(b: int, t: int, p: int) -> Tensor:
    return torch.stack([torch.randperm(t, device="cuda")[:p].sort().values for _ in range(b)])


def close(limit: float) -> Callable[[Any, Any], str]:
    def compare(got: Any, expected: Any) -> str:
        got, expected = ((x,) if isinstance(x, Tensor) else tuple(x) for x in (got, expected))
        for a, b in zip(got, expected, strict=True):
            error = float((a.double() - b.double()).norm() / b.double().norm())
            if not error <= limit:  # NaN fails too
                return f"relative error {error:.1e} against float64, allowed {limit:.0e}"
        return ""

    return compare


def equal(got: Any, expected: Any) -> str:
    same = all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    return "" if same else "copied rows differ"


# ---- attention_rows


def torch_rows(query: Tensor, key: Tensor) -> Tensor:
    """Plain torch at its best: keys neither repeated nor copied, products in the inputs' dtype."""
    b, h, r, d = query.shape
    hkv = key.shape[1]
    logits = query.reshape(b, hkv, h // hkv * r, d) @ key.transpose(2, 3) * d**-0.5
    return logits.softmax(dim=-1, dtype=torch.float32).view(b, h, r, -1).mean(1)


def repeated_rows(query: Tensor, key: Tensor) -> Tensor:
    """Plain torch as attention modules write it: keys repeated for every query head."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
    return logits.softmax(dim=-1, dtype=torch.float32).mean(1)


def attention_inputs(b: int, h: int, hkv: int, rows: int, keys: int, d: int = 128) -> tuple[Tensor, Tensor]:
    return randn(b, h, rows, d), randn(b, hkv, keys, d)


def our_rows(query: Tensor, key: Tensor, backend: str = "triton") -> Tensor:
    return ops.attention_rows(query, key, scale=query.shape[3] ** -0.5, heads="mean", backend=backend)


def rows_met(tenfold: bool, time: float, other: dict[str, float], floor: float) -> bool:
    fast = time <= (1.3 * floor if floor > 20 else 15)
    return fast and (not tenfold or other["torch, keys repeated"] >= 10 * time)


def attention_rows_cases() -> Iterator[Case]:
    for b, h, hkv, s in (
        (1, 28, 4, 640), (1, 28, 4, 2944), (1, 32, 32, 2944), (8, 28, 4, 2944), (8, 32, 32, 2944), (8, 28, 4, 8192),
        (8, 28, 4, 32768),
    ):  # fmt: skip
        moved = 2.0 * b * hkv * s * 128
        tenfold = b * s == 8 * 32768
        target = "1.3 x reading the keys" if moved / 3e6 > 20 else "15 us"
        yield Case(
            op="attention_rows",
            size=f"B {b}, H {h}/{hkv}, 1 row, {s} keys",
            inputs=sets(partial(attention_inputs, b, h, hkv, 1, s)),
            run=our_rows,
            check=lambda got, q, k: close(1e-4)(got, our_rows(q.double(), k.double(), "reference")),
            baselines={"torch": torch_rows, "torch, keys repeated": repeated_rows},
            moved=moved,
            target=target + (", and 10 x plain torch" if tenfold else ""),
            met=partial(rows_met, tenfold),
        )


def our_received(query: Tensor, key: Tensor, backend: str = "triton") -> Tensor:
    return ops.received_attention(query, key, scale=query.shape[3] ** -0.5, backend=backend)


def whole_map(query: Tensor, key: Tensor) -> Tensor:
    logits = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
    return logits.softmax(dim=-1, dtype=torch.float32).mean((1, 2))


def fastest(time: float, other: dict[str, float], floor: float) -> bool:
    return time < min(other.values())


def received_cases() -> Iterator[Case]:
    for b, h, n, d in ((1, 16, 729, 72), (1, 32, 2944, 128), (8, 16, 729, 72)):
        yield Case(
            op="received_attention",
            size=f"B {b}, H {h}, {n} tokens, width {d}",
            inputs=sets(partial(attention_inputs, b, h, h, n, n, d)),
            run=our_received,
            check=lambda got, q, k: close(1e-4)(got, our_received(q.double(), k.double(), "reference")),
            baselines={"torch, whole map": whole_map},
            target="faster than torch",
            met=fastest,
        )


# ---- gathers


def plain_tokens(*x: Tensor) -> list[Tensor]:
    *tensors, wanted = x
    row = torch.arange(len(wanted), device=wanted.device)[:, None]
    return [t[row if t.shape[0] > 1 else 0, wanted] for t in tensors]


def our_merge(x: Tensor, wanted: Tensor, *merge: Tensor, backend: str = "triton") -> Tensor:
    return ops.gather_tokens(x, wanted, merge=(merge[0], merge[1], merge[2]), backend=backend)


def merge_inputs(b: int, pictures: int = 5, n: int = 576, keep: int = 32, sums: int = 5) -> tuple[Tensor, ...]:
    """64 text rows, then pictures of n tokens: keep - sums stay, the others are averaged into `sums` rows."""
    t, p = 64 + pictures * n, 64 + pictures * keep
    source, slot, weight = [], [], []
    for first in range(b * pictures):
        row, picture = divmod(first, pictures)
        order = torch.randperm(n, device="cuda")
        source.append(64 + picture * n + order)
        into = torch.arange(n, device="cuda")
        into[keep - sums :] = torch.randint(keep - sums, keep, (n - keep + sums,), device="cuda")
        slot.append(row * p + 64 + picture * keep + into)
        weight.append(torch.where(into < keep - sums, 1.0, sums / (n - keep)))
    return randn(b, t, 4096), index(b, t, p), torch.cat(source), torch.cat(slot), torch.cat(weight)


def our_cache(*x: Tensor) -> list[Tensor]:
    layers = len(x) // 2
    keys, values = ops.gather_cache(x[:layers], x[layers:-1], x[-1], backend="triton")
    return [*keys, *values]


def plain_cache(*x: Tensor) -> list[Tensor]:
    rows = x[-1][:, None, :, None]
    return [t.gather(2, rows.expand(-1, t.shape[1], -1, t.shape[3])) for t in x[:-1]]


def near_bandwidth(time: float, other: dict[str, float], floor: float) -> bool:
    return time <= floor / 0.8


def gather_cases() -> Iterator[Case]:
    for b, t, p in ((8, 2944, 384), (8, 2944, 1536), (1, 2944, 224)):
        tensors = (randn(b, t, 4096), randn(1, t, 128), randn(1, t, 128), torch.rand(b, t, device="cuda") > 0.5)
        small = 2 * b * p * 4096 < 16e6
        yield Case(
            op="gather_tokens",
            size=f"{b} x {p} of {t} rows: hidden 4096, cos and sin 128, mask",
            inputs=tuple((*tensors, index(b, t, p)) for _ in range(8)),
            run=lambda *x: ops.gather_tokens(x[:-1], x[-1], backend="triton"),
            check=lambda got, *x: equal(got, plain_tokens(*x)),
            baselines={"torch": plain_tokens},
            moved=2.0 * b * p * (2 * (4096 + 2 * 128) + 1),
            target="" if small else "80 % of copy bandwidth",
            met=None if small else near_bandwidth,
        )
    yield Case(
        op="gather_tokens",
        size="8 x 224 of 2944 rows of 4096, 2880 of them merged into 160",
        inputs=sets(partial(merge_inputs, 8)),
        run=our_merge,
        check=lambda got, x, *rest: close(3e-3)(got, our_merge(x.double(), *rest, backend="reference")),
        baselines={"torch": partial(our_merge, backend="reference")},
        target="faster than torch",
        met=fastest,
    )
    for b, hkv, layers in ((8, 4, 28), (1, 32, 32)):
        yield Case(
            op="gather_cache",
            size=f"B {b}, {layers} layers, {hkv} heads, 384 of 2944 rows",
            inputs=((*(randn(b, hkv, 2944, 128) for _ in range(2 * layers)), index(b, 2944, 384)),),
            run=our_cache,
            check=lambda got, *x: equal(got, plain_cache(*x)),
            baselines={"torch": plain_cache},
            moved=2.0 * b * hkv * 2 * layers * 384 * 256,
            target="80 % of copy bandwidth",
            met=near_bandwidth,
        )


# ---- greedy picks


def wrong_pick(picks: Tensor, gains: Callable[[int], Tensor], slack: float) -> str:
    """`gains(t)` are the float64 gains before pick t; every pick must be within `slack` of the best."""
    for t, pick in enumerate(picks.tolist()):
        gain = gains(t)
        if not gain[pick] >= gain.amax() - slack:
            return f"pick {t} gains {float(gain[pick]):.7f}, the best {float(gain.amax()):.7f}"
    return ""


def check_max_min(kept: Tensor, features: Tensor) -> str:
    picks = ops.max_min(features, len(kept), order=True, backend="triton")
    if not torch.equal(picks.sort().values, kept):
        return "the kept tokens are not the picks, sorted"
    unit = normalize(features.double(), dim=-1)
    cosine = unit @ unit.T
    nearest = 1 - (cosine - 2 * torch.eye(len(unit), device=unit.device, dtype=unit.dtype)).amax(1)
    distance = torch.full_like(nearest, torch.inf)

    def gains(t: int) -> Tensor:
        if t == 0:
            return nearest
        distance.copy_(torch.minimum(distance, 1 - cosine[picks[t - 1]]))
        distance[picks[t - 1]] = -torch.inf
        return distance

    return wrong_pick(picks, gains, 2e-6)


def check_dpp(kept: Tensor, features: Tensor, relevance: Tensor) -> str:
    picks = ops.greedy_dpp((features, relevance), len(kept), order=True, backend="triton")
    if not torch.equal(picks.sort().values, kept):
        return "the kept tokens are not the picks, sorted"
    unit = normalize(features.double(), dim=-1) * relevance.double()[:, None]
    kernel = unit @ unit.T
    left = kernel.diagonal().clone()
    factors: list[Tensor] = []

    def gains(t: int) -> Tensor:
        if t:
            pick = picks[t - 1]
            row = kernel[pick] - sum((f[pick] * f for f in factors), torch.zeros_like(left))
            factors.append(row / left[pick].sqrt())
            left.sub_(factors[-1].square())
            left[pick] = -torch.inf
        return left

    return wrong_pick(picks, gains, 1e-5)


def our_max_min(keep: int, x: Tensor, backend: str = "triton") -> Tensor:
    return ops.max_min(x, keep, backend=backend)


def our_dpp(keep: int, x: Tensor, relevance: Tensor, backend: str = "triton") -> Tensor:
    return ops.greedy_dpp((x, relevance), keep, backend=backend)


def within(limit: float, time: float, other: dict[str, float], floor: float) -> bool:
    return time <= limit


def features(*size: int, dtype: torch.dtype = DTYPE) -> tuple[Tensor]:
    return (randn(*size, dtype=dtype),)


def features_and_relevance(n: int) -> tuple[Tensor, Tensor]:
    return randn(n, 4096), torch.rand(n, device="cuda") + 0.1


def greedy_cases() -> Iterator[Case]:
    for n, keep, limit in ((576, 64, 150), (2880, 160, 500)):
        for dtype in (DTYPE, torch.float32):
            name = str(dtype).removeprefix("torch.")
            yield Case(
                op="max_min",
                size=f"{keep} of {n}, width 4096, {name}",
                inputs=sets(partial(features, n, 4096, dtype=dtype)),
                run=partial(our_max_min, keep),
                check=check_max_min,
                baselines={"torch": partial(our_max_min, keep, backend="reference")},
                target=f"{limit} us",
                met=partial(within, limit),
            )
    yield Case(
        op="max_min",
        size="32 x 64 of 576, width 4096, bfloat16",
        inputs=sets(partial(features, 32, 576, 4096)),
        run=partial(our_max_min, 64),
        check=lambda got, x: next(filter(None, map(check_max_min, got, x)), ""),
        baselines={"torch": partial(our_max_min, 64, backend="reference")},
    )
    for n, keep in ((576, 64), (2880, 160)):
        yield Case(
            op="greedy_dpp",
            size=f"{keep} of {n}, width 4096",
            inputs=sets(partial(features_and_relevance, n)),
            run=partial(our_dpp, keep),
            check=check_dpp,
            baselines={"torch": partial(our_dpp, keep, backend="reference")},
            target="faster than torch",
            met=fastest,
        )


# ---- top_k


def our_top(keep: int, scores: Tensor, backend: str = "triton") -> Tensor:
    return ops.top_k(scores, keep, backend=backend)


def any_top(keep: int, scores: Tensor) -> Tensor:
    """What torch.topk gives: in any order, of equal scores any."""
    return scores.topk(keep, sorted=False).indices


def check_top(keep: int, got: Tensor, scores: Tensor) -> str:
    return equal((got,), (our_top(keep, scores, "reference"),))


def top_cases() -> Iterator[Case]:
    for b, n, keep in ((1, 576, 64), (40, 576, 32), (8, 2880, 160), (1, 32768, 1638), (16, 32768, 1638)):
        yield Case(
            op="top_k",
            size=f"{b} x {keep} of {n}, float32",
            inputs=sets(partial(features, b, n, dtype=torch.float32)),
            run=partial(our_top, keep),
            check=partial(check_top, keep),
            baselines={"torch": partial(our_top, keep, backend="reference"), "torch.topk": partial(any_top, keep)},
            target="faster than torch",
            met=lambda time, other, floor: time < other["torch"],
        )


# ---- token_entropy


def our_entropy(x: Tensor, backend: str = "triton") -> Tensor:
    return ops.token_entropy(x, backend=backend)


def entropy_cases() -> Iterator[Case]:
    for h, n in ((32, 576), (28, 2880)):
        yield Case(
            op="token_entropy",
            size=f"{n} tokens, {h} heads of 128, float64",
            inputs=sets(partial(features, h, n, 128)),
            run=our_entropy,
            check=lambda got, x: close(1e-9)(got, our_entropy(x.cpu(), "reference").to(x.device)),
            baselines={"torch": partial(our_entropy, backend="reference")},
            capture=False,
            target="500 us" if n == 576 else "",
            met=partial(within, 500) if n == 576 else None,
        )


# ---- indexed_decode


def our_decode(query: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> Tensor:
    s = key.shape[2]
    return ops.indexed_decode(query, key, value, (0, 35), rows, (s - 64, s), scale=128**-0.5, backend="triton")[0]


def gathered_decode(query: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> Tensor:
    s = key.shape[2]
    ends = [torch.arange(*span, device=rows.device).expand(len(rows), -1) for span in ((0, 35), (s - 64, s))]
    wanted = torch.cat([ends[0], rows, ends[1]], dim=1)[:, None, :, None].expand(-1, key.shape[1], -1, 128)
    return scaled_dot_product_attention(query, key.gather(2, wanted), value.gather(2, wanted), enable_gqa=True)


def dense_decode(query: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, enable_gqa=True)


def decode_inputs(b: int, h: int, hkv: int, s: int, p: int) -> tuple[Tensor, ...]:
    return randn(b, h, 1, 128), randn(b, hkv, s, 128), randn(b, hkv, s, 128), index(b, s - 200, p) + 100


def decode_met(factor: float, time: float, other: dict[str, float], floor: float) -> bool:
    return other["dense SDPA"] >= factor * time and other["gather, SDPA"] > time


def decode_cases() -> Iterator[Case]:
    for b, h, hkv, s, p in ((8, 28, 4, 32768, 1638), (8, 28, 4, 2944, 160), (1, 28, 4, 32768, 1638)):
        held = s == 32768 and b == 8
        yield Case(
            op="indexed_decode",
            size=f"B {b}, H {h}/{hkv}, {p} of {s} rows and 99 text rows",
            inputs=sets(partial(decode_inputs, b, h, hkv, s, p)),
            run=our_decode,
            check=lambda got, q, k, v, i: close(1e-2)(got, gathered_decode(q.double(), k.double(), v.double(), i)),
            baselines={"dense SDPA": dense_decode, "gather, SDPA": gathered_decode},
            moved=2.0 * 2 * b * hkv * (p + 99) * 128,
            target="6 x dense SDPA, faster than gather" if held else "faster than both",
            met=partial(decode_met, 6 if held else 1),
        )


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "attention_rows": attention_rows_cases,
    "received_attention": received_cases,
    "gather": gather_cases,
    "greedy": greedy_cases,
    "top_k": top_cases,
    "token_entropy": entropy_cases,
    "indexed_decode": decode_cases,
}
