from __future__ import annotations

import pytest
import torch

from vlprune.kernels.dispatch import KernelError
from vlprune.ops import gather_cache, gather_tokens


def picked(x, index):
    """The definition of gather_tokens, one row at a time."""
    out = torch.zeros(*index.shape, *x.shape[2:], dtype=x.dtype, device=x.device)
    for b in range(index.shape[0]):
        for p in range(index.shape[1]):
            if index[b, p] >= 0:
                out[b, p] = x[b if x.shape[0] > 1 else 0, index[b, p]]
    return out


def token_tensors(device, t=20):
    """Everything that goes along with tokens: widths 33, 8, 7, 1 and none, six dtypes, odd strides and starts."""
    return [
        torch.randn(2, t, 33, device=device),
        torch.randn(1, t, 8, device=device).bfloat16(),
        torch.randn(2, t, 7, device=device).half(),
        torch.rand(2, t, device=device) > 0.5,
        torch.randint(1 << 40, (1, t), device=device),
        torch.randn(2, 9, t, device=device).transpose(1, 2),
        torch.randn(2, t + 3, 10, device=device)[:, 3:, 1:7],
        torch.randint(1 << 40, (2, 5, t), device=device).transpose(1, 2),
        torch.randint(9, (2, t, 3), device=device, dtype=torch.uint8),
        torch.randn(2, t, 1, device=device, dtype=torch.float64),
    ]


INDEX = [[3, -1, 5, 7, 19, 0, 0], [2, 1, 0, -1, -1, 18, 19]]


def test_reference_copies_rows_and_zeros_pads():
    index = torch.tensor(INDEX)
    for x in token_tensors("cpu"):
        assert torch.equal(gather_tokens(x, index), picked(x, index))
    a, b = gather_tokens(token_tensors("cpu")[:2], index)
    assert a.shape == (2, 7, 33)
    assert b.shape == (2, 7, 8)
    assert gather_tokens([], index) == ()


def test_a_pad_hides_nan():
    x = torch.full((1, 2, 3), float("nan"))
    assert torch.equal(gather_tokens(x, torch.tensor([[-1]])), torch.zeros(1, 1, 3))


def test_reference_has_gradients():
    x = torch.randn(1, 4, 3, requires_grad=True)
    gather_tokens(x, torch.tensor([[2, -1, 2]])).sum().backward()
    assert x.grad[0].sum(1).tolist() == [0, 0, 6, 0]


def test_errors():
    with pytest.raises(KernelError, match="int64"):
        gather_tokens(torch.zeros(1, 4, 2), torch.zeros(1, 3, dtype=torch.int32))
    with pytest.raises(KernelError, match="T in common"):
        gather_tokens([torch.zeros(1, 4, 2), torch.zeros(1, 5, 2)], torch.zeros(1, 3, dtype=torch.int64))
    x, index, (source, slot, weight) = torch.zeros(1, 4, 2), torch.zeros(1, 3, dtype=torch.int64), entries("cpu")
    for bad, message in (
        ((source, slot[1:], weight), "one length"),
        ((source, slot.int(), weight), "int64"),
        ((source, slot, slot), "weight floating"),
    ):
        with pytest.raises(KernelError, match=message):
            gather_tokens(x, index, merge=bad)
    with pytest.raises(KernelError, match="must be floating"):
        gather_tokens(x.long(), index, merge=(source, slot, weight))
    with pytest.raises(KernelError, match="as many keys as values"):
        gather_cache([torch.zeros(1, 1, 4, 2)], [], torch.zeros(1, 3, dtype=torch.int64))


def merged(x, index, source, slot, weight):
    """The definition of a merge, one entry at a time, in float64."""
    out = picked(x.double(), index)
    for row in set(slot.tolist()):
        out[row // index.shape[1], row % index.shape[1]] = 0
    for s, p, w in zip(source.tolist(), slot.tolist(), weight.tolist(), strict=True):
        b = p // index.shape[1]
        out[b, p % index.shape[1]] += w * x[b if x.shape[0] > 1 else 0, s].double()
    return out


def entries(device, e=40, t=20, p=14):
    """Entries in no order; slot 3 takes several, slot 5 one of weight 0, most slots none or one."""
    slot = torch.randint(p, (e,)).masked_fill(torch.rand(e) < 0.4, 3)
    slot[slot == 5] = 6
    source, weight = torch.randint(t, (e + 1,)), torch.randn(e + 1)
    weight[-1] = 0
    return tuple(x.to(device) for x in (source, torch.cat([slot, torch.tensor([5])]), weight))


BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.triton)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 20, 33), (1, 20, 33), (2, 20), (1, 20, 2100)])
def test_merging(backend, dtype, shape, device):
    """The first tensor is merged, the others are copied as ever."""
    index, merge, others = torch.tensor(INDEX, device=device), entries(device), token_tensors(device)[:4]
    x = torch.randn(shape, device=device).to(dtype)
    first, *rest = gather_tokens([x, *others], index, merge=merge, backend=backend)
    assert first.dtype == dtype
    torch.testing.assert_close(first.double(), merged(x, index, *merge), rtol=torch.finfo(dtype).eps, atol=1e-5)
    for t, got in zip(others, rest, strict=True):
        assert torch.equal(got, picked(t, index))


@pytest.mark.parametrize("backend", BACKENDS)
def test_merging_nothing_is_copying(backend, device):
    index, x = torch.tensor(INDEX, device=device), torch.randn(2, 20, 33, device=device)
    merge = tuple(t[:0] for t in entries(device))
    assert torch.equal(gather_tokens(x, index, merge=merge, backend=backend), picked(x, index))


@pytest.mark.triton
def test_merging_is_deterministic_and_leaves_nothing_unwritten(guarded, device):
    index, x, merge = torch.tensor(INDEX, device=device), torch.randn(2, 20, 33, device=device), entries(device, 300)
    once, again = (gather_tokens(x, index, merge=merge, backend="triton") for _ in range(2))
    assert torch.equal(once, again)
    torch.testing.assert_close(once.double(), merged(x, index, *merge), rtol=1e-5, atol=1e-4)


def test_merging_has_gradients():
    x, weight = torch.randn(1, 4, 3, requires_grad=True), torch.tensor([0.5, 2.0], requires_grad=True)
    merge = (torch.tensor([3, 1]), torch.tensor([1, 1]), weight)
    gather_tokens(x, torch.tensor([[2, 0]]), merge=merge).sum().backward()
    torch.testing.assert_close(x.grad[0].sum(1), torch.tensor([0.0, 6.0, 3.0, 1.5]))
    torch.testing.assert_close(weight.grad, x[0, [3, 1]].sum(1))


@pytest.mark.triton
def test_token_kernel(guarded, device):
    index = torch.tensor(INDEX, device=device)
    tensors = token_tensors(device)
    for x, got in zip(tensors, gather_tokens(tensors, index, backend="triton"), strict=True):
        assert torch.equal(got, picked(x, index))


@pytest.mark.triton
@pytest.mark.parametrize("p", [0, 1, 5])
def test_token_kernel_at_the_edges(p, device):
    """No slot, one slot, a strided index, one token, no sequence."""
    index = torch.zeros(2, 2 * p, dtype=torch.int64, device=device)[:, ::2]
    x = torch.randn(2, 1, 3000, device=device)  # wider than a program's tile
    assert torch.equal(gather_tokens(x, index, backend="triton"), x.expand(2, 1, 3000)[:, :1].expand(2, p, 3000))
    assert gather_tokens(x[:0], index[:0], backend="triton").shape == (0, p, 3000)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cache_kernel(dtype, guarded, device):
    """Layers in two storages, two widths and two lengths: four groups, each one launch."""
    index = torch.tensor(INDEX, device=device)
    keys = [torch.randn(2, 20, 3, 16, device=device).to(dtype).transpose(1, 2) for _ in range(3)]
    keys += [torch.randn(2, 2, 23, 16, device=device).to(dtype)]
    values = [torch.randn(2, 3, 20, 13, device=device).to(dtype) for _ in range(3)]
    values += [torch.randn(2, 2, 23, 24, device=device).to(dtype)[..., ::2]]
    got = gather_cache(keys, values, index, backend="triton")
    for x, y in zip(keys + values, got[0] + got[1], strict=True):
        expected = torch.stack([picked(x[:, h], index) for h in range(x.shape[1])], dim=1)
        assert torch.equal(y, expected)
    again = gather_cache(keys, values, index, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(got[0] + got[1], again[0] + again[1], strict=True))


@pytest.mark.gpu
@pytest.mark.triton
def test_one_launch_each(device):
    index = torch.randint(0, 2944, (8, 384), device=device).sort().values
    tokens = [torch.randn(8, 2944, 512, device=device, dtype=torch.bfloat16)]
    tokens += [torch.randn(1, 2944, 128, device=device) for _ in range(2)] + [torch.rand(8, 2944, device=device) > 0.5]
    layers = [torch.randn(8, 4, 2944, 128, device=device, dtype=torch.bfloat16) for _ in range(28)]
    for call in (lambda: gather_tokens(tokens, index), lambda: gather_cache(layers, layers, index)):
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        assert len([e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]) == 1


@pytest.mark.gpu
@pytest.mark.triton
def test_offsets_beyond_int32(device):
    """9.8 GB of hidden states: the last rows start past word 2^31. More than 65535 rows are picked."""
    x = torch.empty(1, 1_200_000, 4096, dtype=torch.bfloat16, device=device)
    index = torch.randint(0, x.shape[1], (1, 70_000), device=device)
    index[0, -1] = x.shape[1] - 1
    x[0, index[0]] = torch.randn(70_000, 1, device=device).bfloat16()
    assert torch.equal(gather_tokens(x, index)[0], x[0, index[0]])
    layer = x.view(1, 1, -1, 64)
    (got,), _ = gather_cache([layer], [layer], index * 64)
    assert torch.equal(got[0, 0], layer[0, 0, index[0] * 64])
