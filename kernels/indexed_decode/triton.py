"""indexed_decode: the rows of one key head are split over programs, then the parts are joined by their log-sum-exp."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlprune.kernels.dispatch import cdiv, opaque, overlaps, power_of_two, processors
from vlprune.kernels.plan import Buffer, Launch, Plan, Slot, planned
from vlprune.kernels.received_attention.triton import upcast

SPLITS = 64  # most parts of one sequence
ROWS, WARPS, STAGES = 128, 4, 2  # cache rows per tile, warps, tiles in flight
OVERSUBSCRIBE = 4  # programs per multiprocessor


@triton.jit
def attend_part(
    q, k, v, index, prefixes, suffixes, parts, statistics, scale, HKV, G, P, splits,
    prefix_start, prefix_stop, suffix_start, suffix_stop, pb, pn, sb, sn,
    qb, qh, qd, kb, kh, ks, kd, vb, vh, vs, vd, ib, ip,
    PREFIX: tl.constexpr, SUFFIX: tl.constexpr, UPCAST: tl.constexpr, OVERLAP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Unnormalised output, maximum and sum of exponentials of one part of the rows, for one key head's G queries.

    statistics: [B * H, splits, 2], maximum and sum of exponentials.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    part = tl.program_id(0)
    b = (tl.program_id(1) // HKV).to(tl.int64)
    head = (tl.program_id(1) % HKV).to(tl.int64)
    if PREFIX:
        prefix_start = tl.load(prefixes + b * pb)
        prefix_stop = tl.load(prefixes + b * pb + pn)
    if SUFFIX:
        suffix_start = tl.load(suffixes + b * sb)
        suffix_stop = tl.load(suffixes + b * sb + sn)
    before = tl.maximum(prefix_stop - prefix_start, 0)
    rows = before + P + tl.maximum(suffix_stop - suffix_start, 0)
    share = tl.cdiv(tl.cdiv(rows, BLOCK_S), splits) * BLOCK_S
    first = part * share
    stop = tl.minimum(first + share, rows)

    g = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_V)
    h = head * G + g
    queries = tl.load(
        q + b * qb + h[:, None] * qh + dim[None, :] * qd, mask=(g < G)[:, None] & (dim < D)[None, :], other=0.0
    )
    if UPCAST:
        queries = queries.to(tl.float32)
    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    out = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    for start in range(first, stop, BLOCK_S):
        t = start + tl.arange(0, BLOCK_S)
        listed = (t >= before) & (t < before + P) & (t < stop)
        row = tl.load(index + b * ib + (t - before) * ip, mask=listed, other=-1).to(tl.int64)
        row = tl.where(t < before, prefix_start + t, tl.where(t < before + P, row, suffix_start + (t - before - P)))
        row = tl.where(t < stop, row, -1).to(tl.int64)
        keys = tl.load(
            k + b * kb + head * kh + row[None, :] * ks + dim[:, None] * kd,
            mask=(row >= 0)[None, :] & (dim < D)[:, None], other=0.0,
        )  # fmt: skip
        values = tl.load(
            v + b * vb + head * vh + row[:, None] * vs + dim_v[None, :] * vd,
            mask=(row >= 0)[:, None] & (dim_v < DV)[None, :], other=0.0,
        )  # fmt: skip
        if UPCAST:
            keys = keys.to(tl.float32)
            values = values.to(tl.float32)
        logits = tl.dot(queries, keys, input_precision="ieee") * scale
        logits = tl.where((row >= 0)[None, :], logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(logits - safe[:, None])
        fade = tl.exp(peak - safe)
        total = total * fade + tl.sum(weights, axis=1)
        out = tl.dot(weights.to(values.dtype), values, out * fade[:, None], input_precision="ieee")
        peak = higher
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    place = ((b * HKV + head) * G + g) * splits + part
    tl.store(statistics + place * 2, peak, mask=g < G)
    tl.store(statistics + place * 2 + 1, total, mask=g < G)
    tl.store(parts + place[:, None] * DV + dim_v[None, :], out, mask=(g < G)[:, None] & (dim_v < DV)[None, :])


@triton.jit
def join_parts(
    parts, statistics, out, lse, dv, splits,
    OVERLAP: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_SPLITS)
    dim = tl.arange(0, BLOCK_V)
    here = statistics + (head * splits + part) * 2
    peak = tl.load(here, mask=part < splits, other=float("-inf"))
    total = tl.load(here + 1, mask=part < splits, other=0.0)
    highest = tl.max(peak, axis=0)
    weight = tl.exp(peak - tl.where(highest == float("-inf"), 0.0, highest))
    x = tl.load(
        parts + (head * splits + part[:, None]) * dv + dim[None, :],
        mask=(part < splits)[:, None] & (dim < dv)[None, :], other=0.0,
    )  # fmt: skip
    whole = tl.sum(total * weight, axis=0)
    some = tl.where(whole > 0, whole, 1.0)
    tl.store(out + head * dv + dim, tl.sum(x * weight[:, None], axis=0) / some, mask=dim < dv)
    tl.store(lse + head, tl.where(whole > 0, highest + tl.log(some), float("-inf")))


@planned
def _plan(inputs, prefix: tuple[int, int], suffix: tuple[int, int], scale: float) -> Plan:
    query, key, value, index, prefixes, suffixes = inputs
    b, h, _, d = query.shape
    hkv, dv, p = key.shape[1], value.shape[3], index.shape[1]
    out, lse = Buffer((b, h, 1, dv), query.dtype), Buffer((b, h), torch.float32)
    if not b:
        return Plan((out, lse), ())
    wide = upcast(query, key, value)
    block_d, block_v = power_of_two(d, 16), power_of_two(dv, 16)
    block_s = 32 if wide or block_d > 128 else ROWS
    wanted = cdiv(OVERSUBSCRIBE * processors(query.device), b * hkv)
    if prefixes is None and suffixes is None:  # the number of rows is known without asking the device
        rows = prefix[1] - prefix[0] + p + suffix[1] - suffix[0]
        wanted = min(wanted, cdiv(rows, block_s))
    splits = power_of_two(wanted, 1, SPLITS)
    parts, statistics = Buffer((b, h, splits, dv), torch.float32), Buffer((b, h, splits, 2), torch.float32)
    overlap = overlaps(query.device)
    options = {"launch_pdl": True} if overlap else {}
    attend = Launch(
        attend_part, (splits, b * hkv), Slot(0), Slot(1), Slot(2), Slot(3), Slot(3 if prefixes is None else 4),
        Slot(3 if suffixes is None else 5), Slot(8), Slot(9), scale, hkv, h // hkv, p, splits, *prefix, *suffix,
        *((0, 0) if prefixes is None else prefixes.stride()), *((0, 0) if suffixes is None else suffixes.stride()),
        query.stride(0), query.stride(1), query.stride(3), *key.stride(), *value.stride(), *index.stride(),
        PREFIX=prefixes is not None, SUFFIX=suffixes is not None, UPCAST=wide, OVERLAP=overlap, D=d, DV=dv,
        BLOCK_G=power_of_two(h // hkv, 16), BLOCK_S=block_s, BLOCK_D=block_d, BLOCK_V=block_v, num_warps=WARPS,
        num_stages=STAGES, **options,
    )  # fmt: skip
    join = Launch(
        join_parts, (b * h,), Slot(8), Slot(9), Slot(6), Slot(7), dv, splits, OVERLAP=overlap, BLOCK_SPLITS=splits,
        BLOCK_V=block_v, **options,
    )  # fmt: skip
    return Plan((out, lse, parts, statistics), (attend, join))


def _fake(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, prefix: list[int], suffix: list[int],
    prefixes: Tensor | None, suffixes: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    b, h = query.shape[:2]
    return query.new_empty(b, h, 1, value.shape[3]), query.new_empty(b, h, dtype=torch.float32)


@opaque("indexed_decode", _fake)
def _launch(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, prefix: list[int], suffix: list[int],
    prefixes: Tensor | None, suffixes: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    made = _plan((query, key, value, index, prefixes, suffixes), tuple(prefix), tuple(suffix), scale)
    return made[0], made[1]


def indexed_decode(
    query: Tensor, key: Tensor, value: Tensor, prefix: tuple[int, int] | Tensor, index: Tensor,
    suffix: tuple[int, int] | Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    spans = [([0, 0], s) if isinstance(s, Tensor) else (list(s), None) for s in (prefix, suffix)]
    (prefix_ints, prefixes), (suffix_ints, suffixes) = spans
    return _launch(query, key, value, index, prefix_ints, suffix_ints, prefixes, suffixes, scale)
