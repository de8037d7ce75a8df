"""Time every op against its target, and print misses as plainly as hits.

    python -m vlprune.kernels.benchmarks.run --out results.md [--only attention_rows,greedy]

Needs one CUDA device and triton; takes about two minutes. An op whose result is wrong is not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version

import torch

from vlprune.kernels.benchmarks.cases import GROUPS, Case
from vlprune.kernels.benchmarks.timing import copy_bandwidth, device_time, host_time

COLUMNS = ("op", "size", "us on the device", "us of the host", "floor us", "torch, us", "target", "verdict")


def measure(case: Case, bandwidth: float) -> list[str]:
    """One row of the table."""
    head = [case.op, case.size]
    for inputs in case.inputs[:2]:
        wrong = case.check(case.run(*inputs), *inputs)
        if wrong:
            return [*head, "", "", "", "", case.target, f"WRONG, not timed: {wrong}"]
    ours = device_time([partial(case.run, *inputs) for inputs in case.inputs])
    host = host_time(partial(case.run, *case.inputs[0]))
    others, shown = {}, []
    for name, call in case.baselines.items():
        found = device_time([partial(call, *inputs) for inputs in case.inputs], capture=case.capture)
        others[name] = found.median
        busy = host_time(partial(call, *case.inputs[0]), inner=3)
        shown.append(f"{name} {found}, host {busy.median:.0f}" + ("" if case.capture else ", by events"))
    floor = case.moved / bandwidth if case.moved else None
    verdict = "" if case.met is None else "met" if case.met(ours.median, others, floor or 0.0) else "MISSED"
    if others:
        verdict += (", " if verdict else "") + ", ".join(f"{t / ours.median:.1f} x" for t in others.values())
    if floor:
        verdict += f", {100 * floor / ours.median:.0f} % of copy bandwidth"
    least = f"{floor:.1f}" if floor else ""
    return [*head, str(ours), f"{host.median:.0f}", least, "; ".join(shown), case.target, verdict]


def table(rows: list[list[str]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", help="file for the table, Markdown")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"some of {','.join(GROUPS)}")
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("these benchmarks need a CUDA device", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    card = torch.cuda.get_device_properties(0)
    lines = [
        f"Device: {card.name}, {card.multi_processor_count} multiprocessors; copy bandwidth {bandwidth / 1e6:.2f} TB/s"
        " (1 GiB, bytes read and written).",
        f"torch {torch.__version__}, triton {version('triton')}, CUDA {torch.version.cuda}; bfloat16 unless said.",
        "Median (20th to 80th percentile). Device: replays of a CUDA graph over input sets no cache holds. Host: time"
        " until an eager call returns. Floor: bytes that must move, at copy bandwidth.",
        "",
    ]
    rows = []
    for name in asked.only.split(","):
        for case in GROUPS[name]():
            rows.append(measure(case, bandwidth))
            print(" | ".join(rows[-1]), flush=True)
    text = "\n".join([*lines, table(rows), ""])
    if asked.out:
        with open(asked.out, "w", encoding="utf-8") as file:
            file.write(text)
    print(text)
    return int(any("WRONG" in row[-1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
