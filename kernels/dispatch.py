"""Which implementation of an op runs: the plain torch definition, or the Triton kernel."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from vlprune.errors import SpecError, VlpruneError, nearest

BACKENDS = ("auto", "reference", "triton")
VARIABLE = "VLPRUNE_KERNELS"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # what the kernels compute from

P = ParamSpec("P")
T = TypeVar("T")


class KernelError(VlpruneError, ValueError):
    """An op was given tensors it cannot work on, or a backend this machine does not have."""


_FOUND = find_spec("triton") is not None


def has_triton() -> bool:
    return _FOUND


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU and slowly. Triton reads this at import."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def choose(backend: str, *tensors: Tensor, covered: bool = True, faster: bool = True) -> str:
    """ "reference" or "triton" for this call.

    An explicit `backend` wins over the environment variable VLPRUNE_KERNELS, and that over "auto": Triton where it is
    installed and every tensor is on a CUDA device, else the reference. Tensors that need a gradient take the reference
    under "auto", because the kernels have no backward pass.

    Args:
        backend: "auto", "reference" or "triton".
        tensors: the op's inputs.
        covered: whether the kernel handles these sizes and dtypes at all.
        faster: whether it beats plain torch on them; only "auto" asks.
    Raises:
        SpecError: an unknown backend. KernelError: "triton" was asked for and cannot run here.
    """
    asked = os.environ.get(VARIABLE, "auto") if backend == "auto" else backend
    if asked not in BACKENDS:
        names = ", ".join(BACKENDS)
        raise SpecError(f"unknown kernel backend {asked!r}{nearest(asked, BACKENDS)}; it is one of {names}")
    if asked == "reference":
        return asked
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    on_gpu = all(t.is_cuda for t in tensors)
    if asked == "auto":
        return "triton" if on_gpu and covered and faster and not gradient and has_triton() else "reference"
    if not has_triton():
        raise KernelError("backend 'triton' was asked for and triton is not installed; use 'auto' or 'reference'")
    if not on_gpu and not interpreted():
        raise KernelError(
            f"backend 'triton' needs CUDA tensors, got {tensors[0].device}; use 'auto', or set TRITON_INTERPRET=1"
            " before the first call to run the kernels in Triton's interpreter"
        )
    if gradient:
        raise KernelError("backend 'triton' has no backward pass; use torch.no_grad(), 'auto' or 'reference'")
    if not covered:
        found = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors[:3])
        raise KernelError(f"the kernel does not cover {found}; use 'auto' or 'reference'")
    return asked


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype references compute in: float32, or float64 where an input is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def opaque(name: str, fake: Callable[P, T]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator: torch.compile sees the launch as one operator, eager calls skip the operator's overhead.

    Args:
        name: the operator becomes torch.ops.vlprune.<name>.
        fake: the same signature, returning empty tensors of the right shape.
    """

    def decorate(launch: Callable[P, T]) -> Callable[P, T]:
        operator = torch.library.custom_op(f"vlprune::{name}", launch, mutates_args=())
        operator.register_fake(fake)

        @wraps(launch)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            return operator(*args, **kwargs) if torch.compiler.is_compiling() else launch(*args, **kwargs)

        return call

    return decorate


class _Leading(torch.autograd.Function):
    """torch.vmap hands its batch to `leading`'s function as the first dimension."""

    @staticmethod
    def forward(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], function: Callable[..., Tensor], *tensors: Tensor | None
    ) -> tuple[Tensor, int]:
        size = info.batch_size
        moved = [
            t if t is None else t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        return function(*moved), 0


def leading(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """``function(*tensors)``, for what takes a leading dimension by itself and cannot be, or need not be, mapped.

    Under torch.vmap it is called once, on plain tensors that all begin with the batch. The result has no gradient.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return function(*tensors)
    return _Leading.apply(function, *tensors)


def shapes(**tensors: Tensor) -> str:
    """ "query (1, 8, 1, 64), key (1, 2, 9, 64)", for messages; made only when one is raised."""
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; this makes it the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, for choosing grids; small in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may be set up there while the one before it still runs (programmatic dependent launch)."""
    if device.type != "cuda" or interpreted() or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    from triton.language.extra import cuda

    return hasattr(cuda, "gdc_wait")


def cdiv(n: int, d: int) -> int:
    """n / d rounded up; triton.cdiv costs the host ten times as much."""
    return -(-n // d)


def power_of_two(n: int, low: int = 1, high: int = 1 << 30) -> int:
    """The smallest power of two >= n, within [low, high]."""
    return max(low, min(high, 1 << (n - 1).bit_length() if n > 1 else 1))
