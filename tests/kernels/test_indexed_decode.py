from __future__ import annotations

import pytest
import torch

from vlprune.kernels.dispatch import KernelError
from vlprune.ops import indexed_decode

# float32: sums in another order. Half precision: the weights are rounded before they meet the values, as in SDPA, and
# the output is rounded once more: some 2^-9 (bfloat16) or 2^-12 (float16) of values near 1.
CLOSE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 4e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-2},
}


def oracle(query, key, value, rows, scale):
    """Attention over rows[b], a list of row numbers, sequence by sequence in float64."""
    b, h, _, _ = query.shape
    share = h // key.shape[1]
    out = torch.zeros(b, h, 1, value.shape[3], dtype=torch.float64, device=query.device)
    lse = torch.full((b, h), -torch.inf, dtype=torch.float64, device=query.device)
    for i in range(b):
        for j in range(h):
            if rows[i]:
                k, v = key[i, j // share, rows[i]].double(), value[i, j // share, rows[i]].double()
                logits = query[i, j, 0].double() @ k.T * scale
                lse[i, j] = logits.logsumexp(0)
                out[i, j, 0] = logits.softmax(0) @ v
    return out, lse


INDEX = [[30, 33, 40, -1, 50], [-1, -1, -1, 31, 32]]
CASES = {
    "all three": ((0, 7), INDEX, (60, 75)),
    "per sequence": ([[3, 10], [0, 0]], INDEX, [[60, 75], [70, 74]]),
    "list only": (None, INDEX, None),
    "prefix only": ((2, 75), None, None),
    "suffix only": (None, None, [[75, 75], [0, 1]]),
    "nothing": (None, [[-1], [-1]], None),
}


def arguments(case, device):
    def tensor(x):
        return torch.tensor(x, device=device) if isinstance(x, list) else x

    prefix, index, suffix = CASES[case]
    rows = []
    for b in range(2):
        spans = [s if s is None or isinstance(s, tuple) else s[b] for s in (prefix, suffix)]
        first, last = ([] if s is None else list(range(*s)) for s in spans)
        rows.append(first + [r for r in (index[b] if index else []) if r >= 0] + last)
    return tensor(prefix), tensor(index), tensor(suffix), rows


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=[pytest.mark.triton])])
@pytest.mark.parametrize("case", list(CASES))
def test_matches_the_definition(backend, case, randn, device, request):
    if backend == "triton":
        request.getfixturevalue("guarded")
    query, key, value = randn(2, 6, 1, 20), randn(2, 2, 75, 20), randn(2, 2, 75, 12)
    *given, rows = arguments(case, device)
    got = indexed_decode(query, key, value, *given, scale=0.3, backend=backend)
    for have, want in zip(got, oracle(query, key, value, rows, 0.3), strict=True):
        torch.testing.assert_close(have.double(), want, **CLOSE[torch.float32])


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_with_dtypes_and_strides(dtype, randn, guarded, device):
    """[B, S, H, d] storage, a query cut out of a longer one, an index with a stride."""
    query = randn(2, 4, 5, 16, dtype=dtype)[:, :, 3:4]
    key = randn(2, 50, 4, 16, dtype=dtype).transpose(1, 2)
    value = randn(2, 50, 4, 32, dtype=dtype).transpose(1, 2)[..., ::2]
    index = torch.tensor([[9, 0, 11, 0, -1, 0], [10, 0, 12, 0, 19, 0]], device=device)[:, ::2]
    rows = [[0, 1, 9, 11, 49], [0, 1, 10, 12, 19, 49]]
    out, lse = indexed_decode(query, key, value, (0, 2), index, (49, 50), scale=0.25, backend="triton")
    want_out, want_lse = oracle(query, key, value, rows, 0.25)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want_out, **CLOSE[dtype])
    torch.testing.assert_close(lse.double(), want_lse, **CLOSE[torch.float32])


def test_parts_join_by_their_log_sum_exp(randn, device):
    """What lse is for: attention over two sets of rows from attention over each."""
    query, key, value = randn(1, 2, 1, 8), randn(1, 2, 30, 8), randn(1, 2, 30, 8)
    whole, total = indexed_decode(query, key, value, (0, 30), None, None, scale=0.5)
    (a, x), (b, y) = (indexed_decode(query, key, value, span, None, None, scale=0.5) for span in ((0, 11), (11, 30)))
    torch.testing.assert_close(torch.logaddexp(x, y), total)
    joined = a * (x - total).exp()[..., None, None] + b * (y - total).exp()[..., None, None]
    torch.testing.assert_close(joined, whole)


def test_errors(device):
    query, key = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 11, 8)
    for bad, message in (
        (((0, 12), None, None), "no range of the 11"),
        ((None, torch.zeros(2, 3, dtype=torch.int64), None), r"\[1, P\]"),
        ((None, None, torch.zeros(2, dtype=torch.int64)), "suffix must be"),
    ):
        with pytest.raises(KernelError, match=message):
            indexed_decode(query, key, key, *bad, scale=1.0)
    with pytest.raises(KernelError, match=r"\[B, H, 1, d\]"):
        indexed_decode(key, key, key, None, None, None, scale=1.0)


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "h", "hkv", "s", "p"), [(8, 28, 4, 32768, 1638), (1, 32, 32, 3000, 160), (2, 16, 2, 70_001, 5)]
)
def test_real_sizes(dtype, b, h, hkv, s, p, device):
    query = torch.randn(b, h, 1, 128, device=device).to(dtype)
    key, value = (torch.randn(b, hkv, s, 128, device=device).to(dtype) for _ in range(2))
    index = torch.stack([torch.randperm(s - 200, device=device)[:p].sort().values + 100 for _ in range(b)])
    index[:, p // 2] = -1
    prefix = torch.tensor([[0, 35]] * b, device=device)
    prefix[-1] = torch.tensor([20, 35])
    rows = [[*range(*prefix[i].tolist()), *index[i][index[i] >= 0].tolist(), *range(s - 60, s)] for i in range(b)]
    out, lse = indexed_decode(query, key, value, prefix, index, (s - 60, s), scale=128**-0.5)
    want_out, want_lse = oracle(query, key, value, rows, 128**-0.5)
    torch.testing.assert_close(out.double(), want_out, **CLOSE[dtype])
    torch.testing.assert_close(lse.double(), want_lse, **CLOSE[torch.float32])
