"""A prefill never makes the host wait for the device, but for the one look at the prompt and what is listed here.

On a CPU the calls that would wait are caught as they are made; on a GPU the driver's own alarm is set off by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from laws.every import cases, give_guide, llava, plan
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vlprune
from vlprune.selection import Selection

WAITS = {  # pruners that do, and why
    "flowcut": "how many tokens leave a vision layer follows from an entropy of its attention",
}
WAITS_ON_A_GPU = WAITS | {
    "agilepruner": "torch.linalg.eigvalsh asks cuSOLVER whether it converged",
}
aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten.item,
           aten._unique2, aten.unique_consecutive, aten.unique_dim}  # fmt: skip
READING = {Tensor.cpu, Tensor.tolist, Tensor.numpy, Tensor.__array__}


class Waited(AssertionError):
    """Something made the host wait."""


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in WAITING:
            raise Waited(str(func))
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            if any(t is not None and t.dtype == torch.bool for t in args[1]):
                raise Waited(f"{func} by a mask")
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING:
            raise Waited(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[None]:
    with Operators(), Methods():
        yield


@contextmanager
def paused() -> Iterator[None]:
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        yield


def inputs(device: str = "cpu") -> dict[str, Tensor]:
    """Two rows of one length with two pictures each: the library builds no mask, and asks for none."""
    g = torch.Generator().manual_seed(0)
    picture = ("img", 16)
    x = tiny.prompt([[3, picture, 4, picture, 5], [4, picture, picture, 8]], g)
    pixels = torch.randn(4, 3, 32, 32, generator=g)
    return {"input_ids": x["input_ids"].to(device), "pixel_values": pixels.to(device)}


def excuse(monkeypatch: pytest.MonkeyPatch, model: Any, pause: Callable[[], Any]) -> None:
    """What may wait: our one look at the prompt, and the library's comparison of placeholders and features."""
    from vlprune.engine import engine

    read, compare = engine.read_prompt, type(model.model).get_placeholder_mask

    def reading(*args: Any) -> Any:
        wait = read(*args)

        def waiting() -> Any:
            with pause():
                return wait()

        return waiting

    def comparing(*args: Any, **kwargs: Any) -> Any:
        with pause():
            return compare(model.model, *args, **kwargs)

    monkeypatch.setattr(engine, "read_prompt", reading)
    monkeypatch.setattr(model.model, "get_placeholder_mask", comparing)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made = llava()[0]
    give_guide(monkeypatch)
    excuse(monkeypatch, made, paused)
    monkeypatch.setattr(Selection, "check", lambda self, *_: self)  # it looks at choices on a CPU only
    yield made
    vlprune.unwrap(made, missing_ok=True)


def test_the_watch_sees_what_waits(model: Any) -> None:
    x = torch.arange(4.0)
    calls = [x[0].item, x.tolist, x.nonzero, lambda: bool(x[0] > 0), lambda: x[x > 1], lambda: x.cpu(), x.unique]
    for call in [*calls, lambda: int(x[1]), lambda: torch.equal(x, x), lambda: x.numpy()]:
        with pytest.raises(Waited), watched():
            call()
    watch(model)  # and lets the library alone, which waits nowhere else


def watch(model: Any) -> None:
    """One prefill, in which nothing may wait."""
    x = inputs()
    with watched():
        model(**x, use_cache=True)


@pytest.mark.parametrize(("pruner", "stage"), cases("encoder", "projector", "1", "cache"))
def test_no_pruner_waits(model: Any, pruner: Any, stage: str) -> None:
    vlprune.wrap(model, plan(pruner, stage, 0.25))
    if pruner.name in WAITS:
        with pytest.raises(Waited):
            watch(model)
        return
    watch(model)
    trace = vlprune.trace(model)
    assert trace.layer_tokens[-1] < trace.visual


MORE = ["random@0:keep=0.5+fastv@1:keep=0.25", "uniform@1:keep=0.75+fastv@2:keep=0.5+fastv@3:keep=4",
        "uniform:keep=0.25+positions=compact", "divprune:keep=0.5+fastv@cache:keep=0.25"]  # fmt: skip


@pytest.mark.parametrize("text", MORE)
def test_no_schedule_waits(model: Any, text: str) -> None:
    vlprune.wrap(model, text)
    watch(model)
    assert vlprune.trace(model).layer_tokens[-1] == 16


def test_a_budget_for_the_prompt_waits_once_a_picture(model: Any) -> None:
    """How it falls to the pictures is known on the device alone."""
    vlprune.wrap(model, "fastv@2:keep=0.25:scope=prompt")
    with pytest.raises(Waited, match="by a mask"):
        watch(model)


# ---- on a GPU


@contextmanager
def quiet() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.fixture(scope="module")
def on_gpu() -> Any:
    return tiny.llava()[0].cuda()


def prefill_in_error_mode(model: Any, text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    excuse(monkeypatch, model, quiet)
    give_guide(monkeypatch)
    x = inputs("cuda")
    try:
        vlprune.wrap(model, text)
        with torch.inference_mode():
            with quiet():  # Triton compiles, libraries set themselves up
                model(**x, use_cache=True)
            torch.cuda.set_sync_debug_mode("error")
            model(**x, use_cache=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        vlprune.unwrap(model, missing_ok=True)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("pruner", "stage"), cases("encoder", "projector", "1", "cache"))
def test_no_pruner_waits_on_a_gpu(on_gpu: Any, pruner: Any, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(pruner, stage, 0.25)
    if pruner.name in WAITS_ON_A_GPU:
        with pytest.raises(RuntimeError, match="synchroniz"):
            prefill_in_error_mode(on_gpu, made, monkeypatch)
    else:
        prefill_in_error_mode(on_gpu, made, monkeypatch)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("text", MORE)
def test_no_schedule_waits_on_a_gpu(on_gpu: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill_in_error_mode(on_gpu, text, monkeypatch)
