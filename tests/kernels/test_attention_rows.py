from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.conftest import surrounded
from vlprune.kernels.dispatch import KernelError
from vlprune.ops import attention_rows

# logits are sums of exact products in float32 whatever the input dtype, so one tolerance serves all of them
CLOSE = {"rtol": 1e-4, "atol": 2e-6}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def oracle(query, key, scale, mask=None, limit=None):
    """The definition, one probability at a time."""
    b, h, r, _ = query.shape
    hkv, s = key.shape[1:3]
    out = torch.zeros(b, h, r, s, dtype=torch.float64)
    for i in range(b):
        for j in range(h):
            for k in range(r):
                logits = []
                for c in range(s):
                    x = scale * float(query[i, j, k].double() @ key[i, j // (h // hkv), c].double())
                    if mask is not None and mask.dtype == torch.bool and not mask.expand(b, h, r, s)[i, j, k, c]:
                        x = -math.inf
                    if mask is not None and mask.dtype != torch.bool:
                        x += float(mask.expand(b, h, r, s)[i, j, k, c])
                    if limit is not None and c > int(limit.expand(b, r)[i, k]):
                        x = -math.inf
                    logits.append(x)
                top = max(logits)
                if top > -math.inf:
                    total = sum(math.exp(x - top) for x in logits)
                    out[i, j, k] = torch.tensor([math.exp(x - top) / total for x in logits])
    return out


def test_reference_is_the_definition():
    query, key = torch.randn(2, 4, 2, 5), torch.randn(2, 2, 7, 5)
    limit = torch.tensor([[3, -1], [6, 0]])
    for mask in (None, torch.rand(2, 1, 2, 7) > 0.4, torch.randn(1, 4, 1, 7)):
        expected = oracle(query, key, 0.4, mask, limit)
        got = attention_rows(query, key, scale=0.4, mask=mask, limit=limit)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
        got = attention_rows(query, key, scale=0.4, mask=mask, limit=limit, heads="mean", rows="max", columns=(2, 6))
        torch.testing.assert_close(got.double(), expected.mean(1).amax(1)[:, 2:6], rtol=1e-5, atol=1e-6)


def test_rows_sum_to_one_and_hidden_rows_are_zero():
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 11, 8)
    total = attention_rows(query, key, scale=1.0, limit=torch.tensor([-1, 0, 10])).sum(-1)
    torch.testing.assert_close(total, torch.tensor([0.0, 1.0, 1.0]).expand(1, 2, 3))


def test_reference_has_gradients():
    query = torch.randn(1, 2, 1, 8, requires_grad=True)
    attention_rows(query, torch.randn(1, 2, 11, 8), scale=1.0)[..., 3].sum().backward()
    assert query.grad is not None
    assert query.grad.abs().sum() > 0


def test_errors():
    query, key = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 11, 8)
    for bad, message in (
        ({"heads": "median"}, "unknown reduction"),
        ({"mask": torch.ones(1, 1, 1, 5, dtype=torch.bool)}, "mask must be"),
        ({"limit": torch.zeros(2, dtype=torch.int64)}, "limit must be"),
        ({"columns": (3, 12)}, "no slice of 11 keys"),
        ({"columns": torch.zeros(2, dtype=torch.int32)}, "int64"),
    ):
        with pytest.raises(KernelError, match=message):
            attention_rows(query, key, scale=1.0, **bad)
    with pytest.raises(KernelError, match="multiple of the key heads"):
        attention_rows(query[:, :3], key, scale=1.0)


def masks(b, h, r, s, device):
    generator = torch.Generator().manual_seed(5)
    seen = torch.rand(b, 1, r, s, generator=generator) > 0.3
    seen[..., 0] = True
    limit = torch.randint(0, s, (b, r), generator=generator)
    limit[0, 0] = -1
    wanted = torch.randint(-1, s, (b, 6), generator=generator).to(device)
    return {
        "plain": {},
        "bool": {"mask": surrounded(seen.to(device)), "columns": (1, s)},
        "bool per head": {"mask": (torch.rand(1, h, 1, s, generator=generator) > 0.5).to(device)},
        "lowest": {"mask": torch.where(seen, 0.0, torch.finfo(torch.float32).min).to(device)},
        "added": {"mask": torch.randn(b, h, 1, s, generator=generator).to(device), "columns": wanted},
        "limit": {"limit": limit.to(device), "columns": (s // 3, s - s // 4)},
        "limit for all": {"limit": limit[0].to(device), "columns": wanted[0]},
    }


MASKS = list(masks(1, 1, 1, 9, "cpu"))


@pytest.mark.triton
@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize(("h", "hkv", "r", "s", "d"), [(4, 2, 3, 70, 20), (3, 3, 1, 33, 72)])
def test_kernel_with_masks(case, h, hkv, r, s, d, randn, guarded, device):
    query, key = randn(2, h, r, d), randn(2, hkv, s, d)
    kw = {"scale": d**-0.5, **masks(2, h, r, s, device)[case]}
    got = attention_rows(query, key, **kw, backend="triton")
    expected = attention_rows(query.double(), key.double(), **kw, backend="reference")
    torch.testing.assert_close(got.double(), expected, **CLOSE)


@pytest.mark.triton
@pytest.mark.parametrize("heads", ["none", "mean", "max", "sum"])
@pytest.mark.parametrize("rows", ["none", "mean", "max", "sum"])
def test_kernel_with_reductions(heads, rows, randn, guarded, device):
    query, key = randn(2, 4, 3, 16), randn(2, 2, 45, 16)
    kw = {"scale": 0.5, "heads": heads, "rows": rows, "columns": (5, 40)}
    got = attention_rows(query, key, **kw, backend="triton")
    expected = attention_rows(query.double(), key.double(), **kw, backend="reference")
    torch.testing.assert_close(got.double(), expected, **CLOSE)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("case", "heads", "rows"),
    [("plain", "mean", "mean"), ("lowest", "max", "max"), ("limit", "none", "max"), ("limit for all", "max", "sum")],
)
def test_kernel_with_many_rows(case, heads, rows, randn, guarded, device):
    """Past 64 rows per key head the two passes of received_attention run, unless the reductions do not commute."""
    query, key = randn(1, 2, 70, 16), randn(1, 1, 50, 16)
    kw = {"scale": 0.25, "heads": heads, "rows": rows, **masks(1, 2, 70, 50, device)[case]}
    got = attention_rows(query, key, **kw, backend="triton")
    expected = attention_rows(query.double(), key.double(), **kw, backend="reference")
    torch.testing.assert_close(got.double(), expected, **CLOSE)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_with_dtypes_and_strides(dtype, randn, guarded, device):
    """[B, S, H, d] storage seen as [B, H, S, d], every second key, and a head width whose stride is not 1."""
    query = randn(2, 3, 4, 24, dtype=dtype).transpose(1, 2)[..., ::2]
    key = randn(2, 88, 2, 12, dtype=dtype).transpose(1, 2)[:, :, ::2]
    got = attention_rows(query, key, scale=0.3, heads="mean", backend="triton")
    expected = attention_rows(query.double(), key.double(), scale=0.3, heads="mean", backend="reference")
    torch.testing.assert_close(got.double(), expected, **CLOSE)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("dtype", "b", "h", "hkv", "s", "d", "case", "heads"),
    [
        (torch.float16, 2, 7, 1, 300, 16, "plain", "none"),
        (torch.bfloat16, 3, 6, 2, 270, 20, "bool", "mean"),
        (torch.float16, 2, 4, 4, 33, 24, "limit", "max"),
    ],
)
def test_kernel_with_one_row_per_head(dtype, b, h, hkv, s, d, case, heads, randn, guarded, device):
    """The last prompt token: query heads that do not fill a tile, several tiles of keys."""
    query, key = randn(b, h, 1, d, dtype=dtype), randn(b, s, hkv, d, dtype=dtype).transpose(1, 2)
    kw = {"scale": d**-0.5, "heads": heads, **masks(b, h, 1, s, device)[case]}
    got = attention_rows(query, key, **kw, backend="triton")
    expected = attention_rows(query.double(), key.double(), **kw, backend="reference")
    torch.testing.assert_close(got.double(), expected, **CLOSE)


@pytest.mark.triton
def test_kernel_with_one_key_no_columns_and_no_batch(randn, device):
    query, key = randn(1, 2, 1, 16), randn(1, 2, 1, 16)
    ones = attention_rows(query, key, scale=1.0, backend="triton")
    torch.testing.assert_close(ones, torch.ones_like(ones))
    assert attention_rows(query, key, scale=1.0, columns=(1, 1), backend="triton").shape == (1, 2, 1, 0)
    assert attention_rows(query[:0], key[:0], scale=1.0, heads="mean", backend="triton").shape == (0, 1, 1)


@pytest.mark.triton
def test_kernel_with_equal_and_huge_logits(device):
    """All keys equal: a uniform row. Logits of 1e4: no overflow, everything on one key."""
    query = torch.full((1, 1, 1, 16), 50.0, device=device)
    key = torch.full((1, 1, 40, 16), 12.5, device=device)
    got = attention_rows(query, key, scale=1.0, backend="triton")
    torch.testing.assert_close(got, torch.full_like(got, 1 / 40))
    key[:, :, 7] += 1
    got = attention_rows(query, key, scale=1.0, backend="triton")
    assert got[0, 0, 0, 7] == 1
    assert got.sum() == 1


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "h", "hkv", "r", "s", "d"),
    [(1, 28, 4, 1, 640, 128), (8, 28, 4, 1, 8192, 128), (2, 32, 32, 1, 2944, 128), (1, 16, 16, 5, 577, 64),
     (2, 28, 4, 64, 1000, 128), (1, 16, 16, 729, 729, 72), (1, 1, 1, 1, 100_003, 256), (300, 4, 4, 1, 577, 64),
     (3, 14, 2, 1, 20_001, 128)],
)  # fmt: skip
def test_real_sizes(dtype, b, h, hkv, r, s, d, device):
    query = torch.randn(b, h, r, d, device=device).to(dtype)
    key = torch.randn(b, hkv, s, d, device=device).to(dtype)
    limit = torch.randint(0, s, (b, r), device=device)
    for kw in ({"heads": "mean", "rows": "mean", "columns": (s // 9, s - 7)}, {"heads": "max", "limit": limit}, {}):
        got = attention_rows(query, key, scale=d**-0.5, **kw)
        expected = attention_rows(query.double(), key.double(), scale=d**-0.5, **kw, backend="reference")
        torch.testing.assert_close(got.double(), expected, **CLOSE)


@pytest.mark.gpu
@pytest.mark.triton
def test_offsets_beyond_int32(device):
    """Keys 2^25 elements apart: the last lies past element 2^31 of its storage."""
    step, s, d = 1 << 25, 70, 64
    storage = torch.empty(step * s + d, dtype=torch.bfloat16, device=device)
    key = storage.as_strided((1, 1, s, d), (0, 0, step, 1))
    key.copy_(torch.randn(1, 1, s, d))
    query = torch.randn(1, 1, 1, d, device=device).bfloat16()
    for rows in (1, 70):
        many = query.expand(1, 1, rows, d)
        got = attention_rows(many, key, scale=0.2, rows="mean", backend="triton")
        expected = attention_rows(query.double(), key.double(), scale=0.2, rows="mean", backend="reference")
        torch.testing.assert_close(got.double(), expected, **CLOSE)
