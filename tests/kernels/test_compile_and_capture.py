"""Every op goes through torch.compile in one graph, into a CUDA graph, and never waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlprune import ops

INDEX = [[3, -1, 5, 7], [2, 1, 0, -1]]


def calls(device: str, dtype: torch.dtype, backend: str) -> dict[str, tuple[Callable[..., Any], list[torch.Tensor]]]:
    """Name -> (function of its tensors alone, the tensors)."""

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device).to(dtype)

    index = torch.tensor(INDEX, device=device)
    q, k = randn(2, 4, 1, 16), randn(2, 2, 20, 16)
    limit = torch.tensor([19], device=device)
    b = {"backend": backend}
    return {
        "attention_rows": (
            lambda q, k: ops.attention_rows(q, k, scale=0.2, heads="mean", columns=(3, 15), **b), [q, k],
        ),
        "attention_rows masked": (
            lambda q, k, i, m: ops.attention_rows(
                q, k, scale=0.2, columns=i, limit=m, mask=k[:, :1, :, 0, None].mT > 0, **b
            ),
            [q, k, index, limit],
        ),
        "received_attention": (lambda q, k: ops.received_attention(q, k, scale=0.2, **b), [randn(2, 4, 20, 16), k]),
        "gather_tokens": (lambda x, y, i: ops.gather_tokens([x, y], i, **b), [randn(2, 20, 6), randn(1, 20, 5), index]),
        "gather_tokens merged": (
            lambda x, y, i, s, w: ops.gather_tokens([x, y], i, merge=(s, s % 8, w), **b),
            [randn(2, 20, 6), randn(1, 20, 5), index, torch.tensor([9, 1, 17, 9], device=device), randn(4)],
        ),
        "gather_cache": (lambda k, v, i: ops.gather_cache([k, k], [v, v], i, **b), [k, randn(2, 2, 20, 16), index]),
        "max_min": (lambda x: ops.max_min(x, 5, **b), [randn(2, 20, 24)]),
        "greedy_dpp": (lambda x, r: ops.greedy_dpp((x, r.abs()), 5, **b), [randn(2, 20, 24), randn(2, 20)]),
        "top_k": (lambda x: ops.top_k(x, 5, **b), [randn(2, 20)]),
        "token_entropy": (lambda x: ops.token_entropy(x, **b), [randn(1, 4, 2, 8)]),
        "indexed_decode": (
            lambda q, k, i: ops.indexed_decode(q, k, k, (8, 10), i, (18, 20), scale=0.2, **b), [q, k, index],
        ),
    }  # fmt: skip


NAMES = list(calls("cpu", torch.float32, "reference"))


def flat(x: Any) -> list[torch.Tensor]:
    return [x] if isinstance(x, torch.Tensor) else [t for part in x for t in flat(part)]


def assert_same(got: Any, expected: Any) -> None:
    for a, b in zip(flat(got), flat(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.triton
@pytest.mark.parametrize("name", NAMES)
def test_kernels_compile_in_one_graph(name, device):
    function, tensors = calls(device, torch.float32, "triton")[name]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*tensors), function(*tensors))


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("name", ["attention_rows", "gather_cache"])
def test_kernels_compile_with_inductor(name, device):
    function, tensors = calls(device, torch.bfloat16, "auto")[name]
    torch.compiler.reset()
    assert_same(torch.compile(function, fullgraph=True)(*tensors), function(*tensors))


@pytest.mark.parametrize("name", NAMES)
def test_references_compile_in_one_graph(name, device):
    function, tensors = calls(device, torch.float32, "reference")[name]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert_same(compiled(*tensors), function(*tensors))


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_no_synchronisation_and_capture(name, dtype, device):
    function, tensors = calls(device, dtype, "auto")[name]
    function(*tensors)  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(*tensors)
    for x in tensors:
        if x.is_floating_point():
            x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, function(*tensors))
