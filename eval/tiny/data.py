"""Training batches by step number: drawn by worker processes into shared memory, delivered in order."""

from __future__ import annotations

import mmap
import multiprocessing
import queue
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .drawing import PATCH
from .synth import SIDE, training_sample

Arrays = dict[str, NDArray[Any]]
Batch = dict[str, Tensor]
PATIENCE = 5.0  # seconds between two looks at whether the other side still lives
SPARE = 6  # batches that may wait, beyond the one each worker draws


class Shape(NamedTuple):
    """A batch: pictures of (height, width) pixels with `text` tokens behind each; `label` names it in the log."""

    batch: int
    size: tuple[int, int]
    text: int
    label: str = ""

    def layout(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and dtype of its arrays."""
        height, width = self.size
        return {
            "pixels": ((self.batch, height, width, 3), np.uint8),
            "labels": ((self.batch, 5, height // PATCH * (width // PATCH)), np.uint8),
            "ids": ((self.batch, self.text), np.int16),
            "marks": ((self.batch, self.text), np.uint8),
        }

    @property
    def bytes(self) -> int:
        return sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in self.layout().values())

    def arrays(self, memory: mmap.mmap, offset: int) -> Arrays:
        """Its arrays, lying in shared memory from `offset` on."""
        arrays: Arrays = {}
        for name, (shape, kind) in self.layout().items():
            arrays[name] = np.frombuffer(memory, kind, int(np.prod(shape)), offset).reshape(shape)
            offset += arrays[name].nbytes
        return arrays


@dataclass(frozen=True)
class Syllabus:
    """Which shapes the batches of a run have: (share of the steps, shapes drawn from at random), several times."""

    groups: tuple[tuple[float, tuple[Shape, ...]], ...]

    def shape(self, seed: int, step: int) -> Shape:
        rng = random.Random(f"shape/{seed}/{step}")
        shapes = rng.choices([shapes for _, shapes in self.groups], [share for share, _ in self.groups])[0]
        return rng.choice(shapes)

    @property
    def largest(self) -> int:
        """Bytes of the largest batch."""
        return max(shape.bytes for _, shapes in self.groups for shape in shapes)


def squares(batch: int) -> Syllabus:
    """Pictures of SIDE x SIDE pixels; with the prefix and 576 visual tokens a row has 768 tokens."""
    return Syllabus(((1.0, (Shape(batch, (SIDE, SIDE), 189),)),))


WINDOW = 112  # pixels
SMALL = ((3, 4), (4, 3), (2, 6), (6, 2), (3, 4), (4, 3), (3, 3), (4, 4), (3, 5), (5, 3), (2, 4), (4, 2))
MEDIUM = ((4, 6), (6, 4), (5, 5), (6, 6), (4, 8), (8, 4), (5, 7), (7, 5), (6, 8), (8, 6))
LARGE = (
    (7, 8), (8, 7), (8, 8), (8, 9), (9, 8), (9, 9), (7, 10), (10, 7), (8, 10), (10, 8), (8, 11), (11, 8), (6, 12),
    (12, 6),
)  # fmt: skip


def all_sizes(batch: int) -> Syllabus:
    """Pictures of all sizes in whole windows; `batch` is that of the small ones, larger ones come in fewer."""
    tokens = batch * 192

    def shapes(label: str, grids: tuple[tuple[int, int], ...], text: int) -> tuple[Shape, ...]:
        return tuple(Shape(max(1, tokens // (16 * a * b)), (a * WINDOW, b * WINDOW), text, label) for a, b in grids)

    return Syllabus((
        (0.40, shapes("small", SMALL, 220)), (0.18, shapes("medium", MEDIUM, 300)), (0.42, shapes("large", LARGE, 400)),
    ))  # fmt: skip


def fill(arrays: Arrays, codec: Any, seed: int, step: int, difficulty: float) -> None:
    """Draw batch number `step`. Nothing but the arguments and the arrays' shapes decides what it holds."""
    height, width = arrays["pixels"].shape[1:3]
    for row in range(len(arrays["ids"])):
        picture, turns = training_sample(f"{seed}/{step}/{row}", difficulty, (width, height))
        arrays["pixels"][row] = picture.pixels
        arrays["labels"][row] = picture.labels.reshape(5, -1)
        codec.pack(turns, arrays["ids"][row], arrays["marks"][row])


class Loader:
    """Batches `start`, `start + 1`, ... one after the other, without end.

    Args:
        codec: what `draw` is given to write text with.
        difficulty: of a step, asked when that batch is handed to a worker, some batches ahead of its use.
        workers: forked processes; 0 draws in this one.
        draw: writes a batch into its arrays, from what `fill` gets.
    """

    def __init__(
        self,
        codec: Any,
        syllabus: Syllabus,
        seed: int,
        difficulty: Callable[[int], float],
        workers: int,
        start: int = 0,
        draw: Callable[[Arrays, Any, int, int, float], None] = fill,
    ) -> None:
        self.codec, self.syllabus, self.seed, self.difficulty, self.step = codec, syllabus, seed, difficulty, start
        self.draw = draw
        slots = workers + SPARE if workers else 1
        self.stride = -(-syllabus.largest // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, self.stride * slots)  # anonymous and shared: forked workers write into it
        self.current: int | None = None  # the slot whose arrays the caller holds
        self.drawn: dict[int, int] = {}  # step -> slot, finished out of order
        self.processes: list[Any] = []
        if workers:
            fork = multiprocessing.get_context("fork")
            self.todo, self.done = fork.Queue(), fork.Queue()
            self.processes = [fork.Process(target=self._work, daemon=True) for _ in range(workers)]
            for process in self.processes:
                process.start()
            self.ahead = start
            for slot in range(slots):
                self._order(slot)

    def arrays(self, step: int, slot: int) -> Arrays:
        return self.syllabus.shape(self.seed, step).arrays(self.memory, slot * self.stride)

    def _order(self, slot: int) -> None:
        self.todo.put((self.ahead, slot, self.difficulty(self.ahead)))
        self.ahead += 1

    def _work(self) -> None:
        parent = multiprocessing.parent_process()
        while parent is None or parent.is_alive():
            try:
                step, slot, difficulty = self.todo.get(timeout=PATIENCE)
            except queue.Empty:
                continue
            self.draw(self.arrays(step, slot), self.codec, self.seed, step, difficulty)
            self.done.put((step, slot))

    def next(self) -> Arrays:
        """The arrays of the next batch, valid until the next call.

        Raises:
            RuntimeError: a worker has died; its own message stands above.
        """
        if not self.processes:
            arrays = self.arrays(self.step, 0)
            self.draw(arrays, self.codec, self.seed, self.step, self.difficulty(self.step))
            self.step += 1
            return arrays
        if self.current is not None:
            self._order(self.current)
        while self.step not in self.drawn:
            try:
                step, slot = self.done.get(timeout=PATIENCE)
                self.drawn[step] = slot
            except queue.Empty:
                dead = [process.pid for process in self.processes if not process.is_alive()]
                if dead:
                    raise RuntimeError(f"data workers {dead} have died; batch {self.step} will not come") from None
        self.current = self.drawn.pop(self.step)
        self.step += 1
        return self.arrays(self.step - 1, self.current)

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()


def batches(loader: Loader, device: torch.device) -> Iterator[Batch]:
    """The loader's batches on the device; towards a GPU they are copied while it computes."""
    if device.type != "cuda":
        while True:
            yield {name: torch.from_numpy(array.copy()) for name, array in loader.next().items()}
    ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=3)
    threading.Thread(target=_copy, args=(loader, device, ready), daemon=True).start()
    while True:
        batch = ready.get()
        if isinstance(batch, BaseException):
            raise batch
        for tensor in batch.values():
            tensor.record_stream(torch.cuda.current_stream())  # its memory was taken on the copying stream
        yield batch


def _copy(loader: Loader, device: torch.device, ready: queue.Queue[Batch | BaseException]) -> None:
    try:
        memory = np.frombuffer(loader.memory, np.uint8)
        # Page-locked memory copies without holding up the thread that launches kernels; unlocked memory works too.
        torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)  # type: ignore[no-untyped-call]
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        while True:
            arrays = loader.next()
            with torch.cuda.stream(stream):
                batch = {k: torch.from_numpy(v).to(device, non_blocking=True) for k, v in arrays.items()}
            stream.synchronize()
            ready.put(batch)
    except BaseException as error:
        ready.put(error)
