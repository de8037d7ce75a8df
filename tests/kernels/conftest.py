"""Kernel tests: in Triton's interpreter on the CPU, or compiled where there is a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()
if not GPU:  # read when a kernel is decorated, so before its module is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

MARGIN = 64  # elements on either side of a guarded buffer; keeps its start aligned


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("triton") and find_spec("triton") is None:
            item.add_marker(pytest.mark.skip(reason="needs triton"))
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device() -> str:
    return "cuda" if GPU else "cpu"


def _poison(buffer: Tensor) -> Tensor:
    if buffer.dtype.is_floating_point:
        return buffer.fill_(float("nan"))
    return buffer.fill_(True if buffer.dtype == torch.bool else torch.iinfo(buffer.dtype).max - 7)


def surrounded(x: Tensor) -> Tensor:
    """The same values in the middle of a poisoned buffer: a read past either end shows."""
    buffer = _poison(torch.zeros(x.numel() + 2 * MARGIN, dtype=x.dtype, device=x.device))
    middle = buffer[MARGIN : MARGIN + x.numel()].view(x.shape)
    middle.copy_(x)
    return middle


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every buffer a kernel gets from torch.empty starts poisoned and has canaries around it, checked at the end."""
    made: list[tuple[Tensor, Tensor]] = []
    plain, plain_new = torch.empty, torch.Tensor.new_empty

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any) -> Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        if kwargs or device == "meta":
            return plain(shape, dtype=dtype, device=device, **kwargs)
        buffer = _poison(plain(shape.numel() + 2 * MARGIN, dtype=dtype, device=device))
        made.append((buffer, buffer.clone()))
        return buffer[MARGIN : MARGIN + shape.numel()].view(shape)

    def new_empty(self: Tensor, *size: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        if device is not None:  # the interpreter's own copies
            return plain_new(self, *size, dtype=dtype or self.dtype, device=device)
        return empty(*size, dtype=dtype or self.dtype, device=self.device)

    def empty_like(x: Tensor, **kwargs: Any) -> Tensor:
        return empty(x.shape, dtype=x.dtype, device=x.device, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    monkeypatch.undo()
    assert made, "the op allocated nothing: the guard saw no buffer"
    for after, before in made:
        for edge in (slice(None, MARGIN), slice(-MARGIN, None)):
            assert torch.equal(after[edge].view(torch.uint8), before[edge].view(torch.uint8)), "a write past the end"


@pytest.fixture
def randn(device: str) -> Callable[..., Tensor]:
    """Fresh normal numbers on the device, drawn on the CPU; the seed is printed when a test fails."""
    seed = int(torch.randint(1 << 30, ()))
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return surrounded(torch.randn(*size, generator=generator).to(device, dtype))

    return draw
