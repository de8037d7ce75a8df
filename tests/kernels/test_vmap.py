"""Ops under torch.vmap: one call, the same answer as with a leading dimension."""

from __future__ import annotations

import pytest
import torch

from vlprune.kernels.dispatch import leading
from vlprune.ops import greedy_dpp, max_min, token_entropy

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.triton)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [0, 1])
def test_max_min(backend, dim, randn):
    x, w = randn(3, 17, 8), randn(3, 17).abs()
    found = torch.vmap(lambda x, w: max_min(x, 6, weights=w, first="weight", order=True, backend=backend), (dim, 0))(
        x.movedim(0, dim), w
    )
    assert torch.equal(found, max_min(x, 6, weights=w, first="weight", order=True, backend=backend))
    shared = torch.vmap(lambda x: max_min(x, 6, weights=w[0], backend=backend))(x)
    assert torch.equal(shared, max_min(x, 6, weights=w[:1].expand(3, -1), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_dpp(backend, randn):
    x, r = randn(3, 17, 8), randn(3, 17).abs()
    found = torch.vmap(lambda x, r: greedy_dpp((x, r), 6, backend=backend))(x, r)
    assert torch.equal(found, greedy_dpp((x, r), 6, backend=backend))
    kernel = x @ x.mT
    found = torch.vmap(lambda k: greedy_dpp(k, 6, backend=backend))(kernel)
    assert torch.equal(found, greedy_dpp(kernel, 6, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_entropy(backend, randn):
    q = randn(3, 4, 5, 8)
    found = torch.vmap(lambda q: token_entropy(q, backend=backend))(q)
    assert torch.equal(found, token_entropy(q, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_batches(backend, randn):
    x = randn(2, 3, 17, 8)
    found = torch.vmap(lambda x: max_min(x, 6, backend=backend))(x)
    assert torch.equal(found, torch.stack([max_min(part, 6, backend=backend) for part in x]))


def test_a_function_is_called_once_on_plain_tensors(randn):
    seen = []

    def total(x, y, z):
        seen.append((type(x), x.shape, y.shape, z))
        return (x * y[..., None, :]).sum(-1)

    x, y = randn(4, 3, 5), randn(5)
    found = torch.vmap(lambda x: leading(total, x, y, None))(x)
    torch.testing.assert_close(found, x @ y)
    assert seen == [(torch.Tensor, (4, 3, 5), (4, 5), None)]
