"""What choosing costs: milliseconds and bytes of every pruner's `select`, on random tensors of a published shape.

    python -m vlprune.eval.scoring --device cuda --out scoring
    python -m vlprune.eval.scoring --precision --cases tests.pruners.vectors --out precision
    python -m vlprune.eval.scoring --pruners zoo_prune:rank=128 "debias(fastv)" --tokens 576 --quick

Shapes are those of LLaVA-1.5-7B. A pruner gets the fields of `Context` that it names in `needs`, made of random
queries, keys and features; what making these fields costs a model is not part of the time. A batch is handed over as
the engine does it: in one call, which most rules take item by item. A rule that works inside the vision tower is timed
over all its layers there, a per-step rule over one decode step, item after item. A rule whose choice is malformed or
differs from call to call is not timed.

--precision counts how many of the K kept tokens change when the inputs come in half precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlprune.errors import VlpruneError
from vlprune.eval.draws import Maker, Shape, Task, check, choose, every_pruner, read
from vlprune.eval.files import output_folder, write
from vlprune.eval.report import markdown, setting
from vlprune.eval.timing import Marks, Spread, measure, synchronise

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEAST = 5  # repeats of a row that takes longer than its share of time


# ---- time and memory


@dataclass(frozen=True)
class Row:
    """One pruner at one size. `milliseconds` are those of the whole batch; None: not measured (`failed` says why)."""

    pruner: str
    stage: str
    tokens: int
    keep: int
    batch: int
    milliseconds: Spread | None = None
    peak_bytes: int | None = None  # allocated beyond the inputs while choosing for the batch; CUDA only
    failed: str | None = None


@torch.inference_mode()
def cost(maker: Maker, text: str, n: int, keep: int, batch: int, repeats: int, seconds: float, warmup: int = 1) -> Row:
    """Time one pruner, or say why not.

    Args:
        repeats: of the whole batch; fewer, but at least 5, where they would take longer than `seconds`.
    """
    row = Row(text, read(text)[1], n, keep, batch)
    try:
        tasks = [Task.make(maker, text, n, keep, seed) for seed in range(batch)]
        check(tasks)

        def run() -> dict[str, float]:
            marks = Marks(maker.device)
            synchronise(maker.device)
            marks.set("start")
            choose(tasks)
            marks.set("end")
            return {"all": marks.milliseconds("start", "end")}

        once = measure(run, 1, warmup)["all"].median
        fit = int(seconds * 1e3 / max(once, 1e-6))
        peak = _peak(run, maker.device)
        times = measure(run, max(min(LEAST, repeats), min(repeats, fit)), 0)["all"]
        return replace(row, milliseconds=times, peak_bytes=peak)
    except (VlpruneError, torch.OutOfMemoryError) as error:
        return replace(row, failed=str(error).partition("\n")[0])
    finally:
        tasks = []
        gc.collect()


def _peak(run: Callable[[], Any], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) - before


def costs(
    texts: Iterable[str], maker: Maker, tokens: Sequence[int], keep: Sequence[int], batch: Sequence[int], repeats: int,
    seconds: float,
) -> Iterator[Row]:  # fmt: skip
    """Rows for all combinations with K < N."""
    for text in texts:
        for n in tokens:
            for k in keep:
                for size in batch if k < n else ():
                    yield cost(maker, text, n, k, size, repeats, seconds)


# ---- precision


@dataclass(frozen=True)
class Change:
    """How many of K kept tokens leave the kept set when the inputs are rounded."""

    pruner: str
    inputs: str
    keep: int
    draws: int
    bfloat16: float  # the median over the draws
    float16: float
    worst: int  # the most over draws and both dtypes


Rounding = Callable[[Tensor], Tensor]


def rounding(dtype: torch.dtype) -> Rounding:
    """A function that brings floating-point tensors to `dtype`."""
    return lambda t: t.to(dtype) if t.is_floating_point() else t


def changed(reference: Sequence[int], kept: Sequence[int]) -> int:
    return len(set(reference) - set(kept))


@torch.inference_mode()
def changes_at_random(
    texts: Iterable[str], shape: Shape, device: torch.device, n: int, keep: int, draws: int
) -> Iterator[Change]:
    """Random tensors of the model's shape, the same in three dtypes."""
    makers = {name: Maker(shape, device, dtype) for name, dtype in DTYPES.items()}
    for text in texts:
        found: dict[str, list[int]] = {"bfloat16": [], "float16": []}
        for seed in range(draws):
            kept = {name: Task.make(maker, text, n, keep, seed).kept() for name, maker in makers.items()}
            for name, counts in found.items():
                counts.append(changed(kept["float32"], kept[name]))
        yield _change(text, f"random, N = {n}", keep, found)


@torch.inference_mode()
def changes_in(cases: Iterable[Any]) -> Iterator[Change]:
    """Given cases: objects with `name`, `pruner` (a text) and `run(change)`, what is kept when inputs are changed."""
    for case in cases:
        reference = case.run(rounding(torch.float32))
        found: dict[str, list[int]] = {"bfloat16": [], "float16": []}
        for name, counts in found.items():
            counts.append(changed(reference, case.run(rounding(DTYPES[name]))))
        yield _change(case.pruner, case.name, len(reference), found)


def _change(pruner: str, inputs: str, keep: int, found: dict[str, list[int]]) -> Change:
    medians = {name: statistics.median(counts) for name, counts in found.items()}
    draws = len(found["bfloat16"])
    return Change(pruner, inputs, keep, draws, **medians, worst=max(c for counts in found.values() for c in counts))


# ---- showing


def cost_cells(row: Row) -> list[str]:
    cells = [row.pruner, row.stage, str(row.tokens), str(row.keep), str(row.batch)]
    if row.milliseconds is None:
        return [*cells, f"not timed: {row.failed}", "", ""]
    ms = row.milliseconds
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
    return [*cells, f"{ms.median:.3f}", f"{ms.p20:.3f} - {ms.p80:.3f}", peak]


COST_TITLES = ("pruner", "stage", "N", "K", "batch", "ms", "p20 - p80", "peak MiB")
CHANGE_TITLES = ("pruner", "inputs", "K", "draws", "bfloat16", "float16", "worst")


def change_cells(row: Change) -> list[str]:
    counts = (row.keep, row.draws, row.bfloat16, row.float16, row.worst)
    return [row.pruner, row.inputs, *(f"{count:g}" for count in counts)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vlprune.eval.scoring", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pruners", nargs="+", help="texts such as holov or zoo_prune:rank=128; default: all of them")
    parser.add_argument("--tokens", nargs="+", type=int, default=[576, 2880], help="visual tokens N of an item")
    parser.add_argument("--keep", nargs="+", type=int, default=[64, 160], help="counts K")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.2, help="of one row, after which 5 repeats are enough")
    parser.add_argument("--quick", action="store_true", help="K = 64 and batch 1 alone, 5 repeats, 2 draws")
    parser.add_argument("--precision", action="store_true", help="count changed tokens instead of timing")
    parser.add_argument("--draws", type=int, default=4, help="random inputs of each size, for --precision")
    parser.add_argument("--cases", help="for --precision: a module with cases(), such as tests.pruners.vectors")
    parser.add_argument("--out", help="write FILE.md and FILE.json")
    options = parser.parse_args(arguments)
    if options.quick:
        options.keep, options.batch, options.repeats, options.draws = options.keep[:1], options.batch[:1], LEAST, 2
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "vlprune.eval.scoring", *given])
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    texts = options.pruners or every_pruner()
    for text in texts:
        read(text)
    if options.out:
        output_folder(Path(options.out).parent)

    rows: list[Any] = []
    titles: Sequence[str]
    stream: Iterator[tuple[Any, list[str]]]
    if options.precision:
        head, titles = setting(device, "float32, bfloat16, float16", command), CHANGE_TITLES
        sizes = [(n, k) for n in options.tokens for k in options.keep if k < n]
        found = [changes_at_random(texts, Shape(), device, n, k, options.draws) for n, k in sizes]
        if options.cases:
            found.insert(0, changes_in(importlib.import_module(options.cases).cases()))
        stream = ((row, change_cells(row)) for part in found for row in part)
    else:
        head, titles = setting(device, options.dtype, command), COST_TITLES
        maker = Maker(Shape(), device, DTYPES[options.dtype])
        timed = costs(texts, maker, options.tokens, options.keep, options.batch, options.repeats, options.seconds)
        stream = ((row, cost_cells(row)) for row in timed)
    print(markdown(head, titles, []), end="", flush=True)
    cells, out = [], Path(options.out or ".")
    for row, line in stream:
        rows.append(row)
        cells.append(line)
        print(f"| {' | '.join(line)} |", flush=True)
        if options.out:
            data = {"setting": head, "rows": [dataclasses.asdict(r) for r in rows]}
            write(out.with_name(out.name + ".json"), json.dumps(data, indent=2) + "\n")
            write(out.with_name(out.name + ".md"), markdown(head, titles, cells))


if __name__ == "__main__":
    main()
