from __future__ import annotations

import pytest
import torch

from vlprune.kernels.dispatch import KernelError
from vlprune.ops import received_attention

CLOSE = {"rtol": 1e-4, "atol": 2e-6}


def whole_map(query, key, scale, mask=None):
    """[B, H, L, L] in float64, held in full."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query.double() @ key.double().transpose(2, 3) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1).nan_to_num()


@pytest.mark.parametrize("n", [1, 5, 300])
def test_reference_is_the_column_mean_of_the_map(n):
    query, key = torch.randn(2, 4, n, 8), torch.randn(2, 2, n, 8)
    mask = torch.rand(2, 1, 1, n) > 0.3
    for kind in (None, mask, torch.randn(1, 1, n, n)):
        columns = whole_map(query, key, 0.5, kind).mean(2)
        for heads, expected in (("none", columns), ("mean", columns.mean(1)), ("max", columns.amax(1))):
            got = received_attention(query, key, scale=0.5, mask=kind, heads=heads)
            torch.testing.assert_close(got.double(), expected, **CLOSE)


def test_every_row_gives_one():
    query, key = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    assert received_attention(query, key, scale=1.0).sum() == pytest.approx(1.0)


def test_errors():
    query = torch.randn(1, 4, 6, 8)
    with pytest.raises(KernelError, match=r"\[B, H, L, d\]"):
        received_attention(query, query[:, :, :5], scale=1.0)
    with pytest.raises(KernelError, match="does not broadcast"):
        received_attention(query, query, scale=1.0, mask=torch.ones(1, 1, 6, 5, dtype=torch.bool))


@pytest.mark.triton
@pytest.mark.parametrize("heads", ["none", "mean"])
@pytest.mark.parametrize("mask", ["none", "bool", "added"])
@pytest.mark.parametrize(("h", "hkv", "n", "d"), [(2, 1, 70, 16), (1, 1, 33, 72), (2, 2, 1, 20)])
def test_kernel(heads, mask, h, hkv, n, d, randn, guarded, device):
    query, key = randn(1, h, n, d), randn(1, n, hkv, d).transpose(1, 2)
    chosen = {"none": None, "bool": torch.rand(1, 1, 1, n, device=device) > 0.3, "added": randn(1, 1, n, n)}[mask]
    got = received_attention(query, key, scale=d**-0.5, mask=chosen, heads=heads, backend="triton")
    expected = whole_map(query, key, d**-0.5, chosen).mean(2)
    expected = expected if heads == "none" else expected.mean(1)
    torch.testing.assert_close(got.double(), expected, **CLOSE)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernel_in_half_precision(dtype, randn, guarded):
    query, key = randn(2, 1, 40, 16, dtype=dtype), randn(2, 1, 40, 16, dtype=dtype)
    got = received_attention(query, key, scale=0.25, backend="triton")
    torch.testing.assert_close(got.double(), whole_map(query, key, 0.25).mean((1, 2)), **CLOSE)


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("b", "h", "n", "d"), [(1, 16, 729, 72), (2, 16, 577, 64), (1, 32, 2944, 128)])
def test_real_sizes(dtype, b, h, n, d, device):
    query = torch.randn(b, h, n, d, device=device).to(dtype)
    key = torch.randn(b, h, n, d, device=device).to(dtype)
    got = received_attention(query, key, scale=d**-0.5)
    expected = received_attention(query.double(), key.double(), scale=d**-0.5, backend="reference")
    torch.testing.assert_close(got.double(), expected, **CLOSE)
