from __future__ import annotations

import math

import pytest
import torch

from tests.pruners.golden import load, names
from vlprune.kernels.dispatch import KernelError
from vlprune.ops import token_entropy

GOLDEN = [name for name in names("entropyprune") if not name.endswith("budget")]


def agree(s):
    """Four heads with one and the same query."""
    return torch.eye(4, 8)[:1].expand(4, 8) * s


def alternate(s):
    return agree(s) * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]


def apart(s):
    """Head h points along axis h."""
    return torch.eye(4, 8) * s


HAND = [agree(1), alternate(0.5), alternate(1), alternate(2), apart(0.5), apart(1), apart(2), apart(4)]
HAND_SCORES = [0, 0.25, 0, -4, 0.375, 0.75, 0, -12]
HAND_TRACE = [0, 0, 0, 0] + [math.log(3) / math.log(4)] * 4


@pytest.mark.parametrize("name", GOLDEN)
def test_reference_matches_the_authors(name):
    g = load(name)
    score = token_entropy(g["queries"])
    torch.testing.assert_close(score, g["entropy_f64"], rtol=1e-6, atol=1e-8)
    assert score.topk(g.params["keep"]).indices.sort().values.tolist() == g["keep_sorted"].tolist()


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_hand_made_tokens(backend, device):
    queries = torch.stack(HAND, dim=1).to(device)
    score = token_entropy(queries, backend=backend).cpu()
    torch.testing.assert_close(score, torch.tensor(HAND_SCORES, dtype=torch.float64), rtol=0, atol=1e-7)
    score = token_entropy(queries, normalize="trace", backend=backend).cpu()
    torch.testing.assert_close(score, torch.tensor(HAND_TRACE, dtype=torch.float64), rtol=0, atol=1e-7)


def test_reference_is_invariant_under_what_the_formula_ignores():
    queries = torch.randn(5, 6, 32, dtype=torch.float64)
    score = token_entropy(queries)
    turn = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64)).Q
    for same in (queries[torch.randperm(5)], queries + torch.randn(32), queries @ turn):
        torch.testing.assert_close(token_entropy(same), score)


def test_errors():
    with pytest.raises(KernelError, match="H >= 2"):
        token_entropy(torch.randn(1, 5, 8))
    with pytest.raises(KernelError, match="normalize"):
        token_entropy(torch.randn(2, 5, 8), normalize="rows")
    with pytest.raises(KernelError, match="float32 or float64"):
        token_entropy(torch.randn(2, 5, 8), dtype=torch.bfloat16)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("dtype", "normalize", "b", "h", "n", "d"),
    [
        (torch.float32, "none", 2, 4, 3, 16),
        (torch.float16, "trace", 2, 4, 3, 16),
        (torch.bfloat16, "none", 1, 7, 2, 12),
        (torch.float32, "none", 1, 2, 1, 256),  # the width is averaged to 128
    ],
)
def test_kernel(dtype, normalize, b, h, n, d, randn, guarded):
    """[B, N, H, d] storage seen as [B, H, N, d]."""
    queries = randn(b, n, h, d, dtype=dtype).transpose(1, 2)
    got = token_entropy(queries, normalize=normalize, backend="triton")
    expected = token_entropy(queries.double(), normalize=normalize, backend="reference")
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.triton
def test_kernel_in_float32(randn, guarded):
    queries = randn(4, 3, 16)
    got = token_entropy(queries, dtype=torch.float32, backend="triton")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), token_entropy(queries, backend="reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.triton
def test_kernel_with_equal_eigenvalues_low_rank_and_no_token(device):
    queries = torch.zeros(4, 3, 16, device=device)
    queries[:2, 1] = 3.0
    queries[:, 2, :4] = torch.eye(4, device=device)
    got = token_entropy(queries, backend="triton")
    torch.testing.assert_close(got, token_entropy(queries, backend="reference"), rtol=1e-9, atol=1e-9)
    assert token_entropy(queries[:, :0], backend="triton").shape == (0,)


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("b", "h", "n", "d"), [(1, 32, 576, 128), (2, 28, 333, 128), (1, 40, 65, 80), (1, 64, 9, 128)])
def test_real_sizes(dtype, b, h, n, d, device):
    queries = (3 * torch.randn(b, h, n, d, device=device) + 2 * torch.randn(b, 1, n, d, device=device)).to(dtype)
    for normalize in ("none", "trace"):
        got = token_entropy(queries, normalize=normalize, backend="triton")
        expected = token_entropy(queries.cpu(), normalize=normalize)
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-9, atol=1e-9)
