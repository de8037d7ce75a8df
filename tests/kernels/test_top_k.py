from __future__ import annotations

import pytest
import torch

from tests.kernels.conftest import surrounded
from vlprune.errors import BudgetError
from vlprune.ops import top_k

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.triton)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1), (3, 31, 31), (2, 33, 1), (2, 577, 64), (5, 100, 99), (2, 2049, 700)]
INF, NAN = torch.inf, torch.nan


def oracle(scores, keep):
    """By Python's own sort, row by row."""

    def key(row):
        return lambda i: (-row[i] if row[i] == row[i] else INF, i)

    return [sorted(sorted(range(len(row)), key=key(row))[:keep]) for row in scores.double().tolist()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("scores", "keep", "kept"), [
    ([3.0, 1.0, 2.0], 2, [0, 2]),
    ([1.0, 1.0, 1.0, 1.0], 3, [0, 1, 2]),  # ties go to the earlier
    ([1.0, 2.0, 1.0, 2.0, 1.0], 3, [0, 1, 3]),
    ([NAN, -INF, 0.5, NAN], 2, [0, 2]),  # NaN and -inf are the same lowest score
    ([NAN, NAN, NAN], 1, [0]),
    ([-INF, -1.0, INF, NAN], 3, [0, 1, 2]),
    ([-0.0, 0.0, -0.0, -1.0], 2, [0, 1]),  # a tie
    ([-1.0, -2.0, -1e-45, 1e-45, -3.4e38], 3, [0, 2, 3]),
    ([5.0], 1, [0]),
    ([NAN, 5.0], 0, []),
    ([], 0, []),
])  # fmt: skip
def test_hand_made_cases(scores, keep, kept, backend, device):
    assert top_k(torch.tensor(scores, device=device), keep, backend=backend).tolist() == kept


def many_ties(randn, b, n, dtype):
    scores = surrounded(randn(b, n).mul(8).round().div(8).to(dtype))
    scores[:, ::7] = NAN
    return scores


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("b", "n", "keep"), SIZES)
def test_reference_is_the_definition(b, n, keep, dtype, randn):
    scores = many_ties(randn, b, n, dtype)
    assert top_k(scores, keep, backend="reference").tolist() == oracle(scores, keep)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("b", "n", "keep"), SIZES)
def test_kernel_is_the_definition(b, n, keep, dtype, randn, guarded):
    scores = many_ties(randn, b, n, dtype)
    assert top_k(scores, keep, backend="triton").tolist() == oracle(scores, keep)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_ties_than_room(backend, device):
    scores = torch.tensor([[0.0, 1.0] * 40, [1.0, 0.0] * 40], device=device)
    assert top_k(scores, 50, backend=backend).tolist() == oracle(scores, 50)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_strides_and_vmap(backend, randn):
    scores = randn(4, 9, 3).permute(2, 0, 1)
    found = top_k(scores, 4, backend=backend)
    assert found.shape == (3, 4, 4)
    assert found.flatten(0, 1).tolist() == oracle(scores.flatten(0, 1), 4)
    assert torch.equal(torch.vmap(lambda s: top_k(s, 4, backend=backend), 1, 1)(scores), found)
    assert torch.equal(
        top_k(scores[0, 0, ::2], 2, backend=backend), top_k(scores[0, 0, ::2].clone(), 2, backend=backend)
    )
    assert top_k(scores[:0], 4, backend=backend).shape == (0, 4, 4)


def test_double_is_compared_in_single(device):
    scores = torch.tensor([1.0, 1.0 + 1e-12, 0.0], dtype=torch.float64, device=device)
    assert top_k(scores, 1).tolist() == [0]


@pytest.mark.parametrize("keep", [4, -1])
def test_refuses_a_count_that_does_not_exist(keep, randn):
    with pytest.raises(BudgetError, match="between 0 and 3"):
        top_k(randn(3), keep)


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("n", [8192, 32767, 32768, 32769, 100_000])
def test_long_rows_on_a_gpu(n, randn):
    scores = randn(3, n).mul(100).round()
    found = top_k(scores, n // 20)
    assert torch.equal(found.cpu(), top_k(scores.cpu(), n // 20, backend="reference"))
