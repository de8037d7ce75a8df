"""How long a call takes on the device, and how long the host is busy with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]


class Spread(NamedTuple):
    """Microseconds."""

    low: float  # 20th percentile
    median: float
    high: float  # 80th percentile

    def __str__(self) -> str:
        digits = 1 if self.median < 100 else 0
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


def spread(samples: list[float]) -> Spread:
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Spread(*torch.quantile(torch.tensor(samples, dtype=torch.float64), shares).tolist())


def device_time(calls: list[Call], capture: bool = True, samples: int = 25, budget: float = 0.25) -> Spread:
    """Time of one call on the device, from replays of a CUDA graph of `calls`, at least four of them.

    The calls differ in their inputs alone, so that together they do not fit in the cache. Without `capture`, for what a
    graph cannot hold, it is the time between events, launches included.
    """
    calls = calls * -(-4 // len(calls))

    def run() -> None:
        for call in calls:
            call()

    run()
    torch.cuda.synchronize()
    if capture:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    run()
    first = _events(run)
    samples = max(5, min(samples, int(budget * 1e6 / max(first, 1.0))))
    return spread([_events(run) / len(calls) for _ in range(samples)])


def _events(run: Call) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1000


def host_time(call: Call, samples: int = 15, inner: int = 10) -> Spread:
    """Time until one eager call returns, while the device keeps up or not."""
    call()
    found = []
    for _ in range(samples):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(inner):
            call()
        found.append((time.perf_counter() - start) / inner * 1e6)
    torch.cuda.synchronize()
    return spread(found)


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes per microsecond of a large device-to-device copy, read and written bytes both counted.

    The faster of the driver's copy and an elementwise kernel, so that no floor is too generous.
    """
    source = torch.randn(size // 4, device="cuda")
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return max(2 * size / device_time([way]).median for way in ways)
