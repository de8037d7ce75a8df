"""Training batches by step number: drawn by worker processes into shared memory, delivered in order."""

from __future__ import annotations

import mmap
import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .codec import TEXT_TOKENS, Codec
from .drawing import PATCH
from .synth import SIDE, training_sample

Arrays = dict[str, NDArray[Any]]
Batch = dict[str, Tensor]
PATIENCE = 5.0  # seconds between two looks at whether the other side still lives
SPARE = 6  # batches that may wait, beyond the one each worker draws


def layout(batch: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of the arrays of a batch."""
    return {
        "pixels": ((batch, SIDE, SIDE, 3), np.uint8),
        "labels": ((batch, 5, (SIDE // PATCH) ** 2), np.uint8),
        "ids": ((batch, TEXT_TOKENS), np.int16),
        "marks": ((batch, TEXT_TOKENS), np.uint8),
    }


def fill(arrays: Arrays, codec: Codec, seed: int, step: int, difficulty: float) -> None:
    """Draw batch number `step`. Nothing but the arguments decides what it holds."""
    for row in range(len(arrays["ids"])):
        picture, turns = training_sample(f"{seed}/{step}/{row}", difficulty)
        arrays["pixels"][row] = picture.pixels
        arrays["labels"][row] = picture.labels.reshape(5, -1)
        codec.pack(turns, arrays["ids"][row], arrays["marks"][row])


class Loader:
    """Batches `start`, `start + 1`, ... one after the other, without end.

    Args:
        difficulty: of a step, asked when that batch is handed to a worker, some batches ahead of its use.
        workers: forked processes; 0 draws in this one.
    """

    def __init__(
        self, codec: Codec, batch: int, seed: int, difficulty: Callable[[int], float], workers: int, start: int = 0
    ) -> None:
        self.codec, self.seed, self.difficulty, self.step = codec, seed, difficulty, start
        spec = layout(batch)
        sizes = {name: int(np.prod(shape)) * np.dtype(kind).itemsize for name, (shape, kind) in spec.items()}
        slots = workers + SPARE if workers else 1
        stride = -(-sum(sizes.values()) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, stride * slots)  # anonymous and shared: forked workers write into it
        self.slots: list[Arrays] = []
        for slot in range(slots):
            arrays, offset = {}, slot * stride
            for name, (shape, kind) in spec.items():
                arrays[name] = np.frombuffer(self.memory, kind, int(np.prod(shape)), offset).reshape(shape)
                offset += sizes[name]
            self.slots.append(arrays)
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
            fill(self.slots[slot], self.codec, self.seed, step, difficulty)
            self.done.put((step, slot))

    def next(self) -> Arrays:
        """The arrays of the next batch, valid until the next call.

        Raises:
            RuntimeError: a worker has died; its own message stands above.
        """
        if not self.processes:
            fill(self.slots[0], self.codec, self.seed, self.step, self.difficulty(self.step))
            self.step += 1
            return self.slots[0]
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
        return self.slots[self.current]

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
