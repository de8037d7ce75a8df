"""What one call of an op launches, worked out once for each set of shapes.

Choosing block sizes and grids, and Triton's handling of some thirty arguments per launch, keep the host busy several
times longer than the launches themselves. Both depend on shapes, strides, dtypes and alignment alone, so a `Plan` is kept
per set of them, and its kernels are called directly once Triton has compiled them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlprune.kernels.dispatch import interpreted, on_device

PLANS = 2048  # plans kept per op before they are dropped; each is a few kilobytes and holds no tensor
ALIGNED = 16  # bytes; Triton compiles another kernel for pointers that are not


class Slot(NamedTuple):
    """Stands for a tensor among the arguments of a launch: an input of the plan, or a buffer, counted after those."""

    which: int
    dtype: torch.dtype | None = None  # what the kernel takes its bits for


class Buffer(NamedTuple):
    """Uninitialised memory of one call."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: torch.device) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)


@cache
def _callable_directly() -> bool:
    """Whether a compiled kernel takes all arguments in order: so run in triton 3.6, and so read in 3.9."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return not interpreted() and (int(major), int(minor)) >= (3, 6)


def _fill(argument: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(argument, Slot):
        t = tensors[argument.which]
        return t if argument.dtype is None else (t if t.dim() > 2 else t[..., None]).view(argument.dtype)
    if type(argument) is tuple:
        return tuple(_fill(a, tensors) for a in argument)
    return argument


def _places(argument: Any) -> Any:
    """What `argument` takes from the tensors: a number, a tuple of numbers, or nothing."""
    if isinstance(argument, Slot):
        return argument.which
    if type(argument) is tuple and argument and isinstance(argument[0], Slot):
        return tuple(slot.which for slot in argument)
    return None


class Launch:
    """One launch of a Triton kernel.

    grid: 1 to 3 sizes. arguments: in the kernel's order, a `Slot` or a tuple of them in place of tensors. constants:
    compile-time parameters by name, which follow the arguments in the kernel's signature, and Triton's options.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        self.kernel, self.grid, self.arguments, self.constants = kernel, grid, arguments, constants
        self.ready: Callable[..., None] | None = None
        self.template: list[Any] = []
        self.places: list[tuple[int, Any]] = []

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        if self.ready is None:
            compiled = self.kernel[self.grid](*(_fill(a, tensors) for a in self.arguments), **self.constants)
            if _callable_directly():
                self._prepare(compiled)
            return
        arguments = self.template.copy()
        for place, which in self.places:
            # the launcher reads a tensor's address alone, so its dtype no longer matters
            arguments[place] = tensors[which] if type(which) is int else tuple([tensors[i] for i in which])
        self.ready(*arguments)

    def _prepare(self, compiled: Any) -> None:
        rest = self.kernel.arg_names[len(self.arguments) :]
        self.template = [*self.arguments, *(self.constants[name] for name in rest)]
        self.places = [(i, which) for i, a in enumerate(self.arguments) if (which := _places(a)) is not None]
        self.ready = compiled[(*self.grid, 1, 1)[:3]]


class Plan(NamedTuple):
    """buffers: outputs, then scratch memory."""

    buffers: tuple[Buffer, ...]
    launches: tuple[Launch, ...]

    def run(self, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        """The buffers, after the launches. inputs: the first is on the device where everything runs."""
        first = inputs[0]
        assert first is not None
        made = [buffer.make(first.device) for buffer in self.buffers]
        if self.launches:
            tensors: Any = [*inputs, *made]
            with on_device(first):
                for launch in self.launches:
                    launch(tensors)
        return made


def planned(make: Callable[..., Plan]) -> Callable[..., list[Tensor]]:
    """Decorator for ``make(inputs, *options) -> Plan``, giving a function of the same arguments that runs the plan.

    make: reads the inputs' shapes, strides, dtypes and alignment, never their values; options must be hashable.
    """
    plans: dict[Any, Plan] = {}

    def call(inputs: Sequence[Tensor | None], *options: Any) -> list[Tensor]:
        key = (
            inputs[0].device,  # type: ignore[union-attr]
            options,
            *[None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % ALIGNED) for t in inputs],
        )
        plan = plans.get(key)
        if plan is None:
            if len(plans) >= PLANS:
                plans.clear()
            plan = plans[key] = make(inputs, *options)
        return plan.run(inputs)

    return call
