"""Rows of the benchmark: what is measured of a plan on one prompt size, and how it is shown."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from vlprune.eval.files import write
from vlprune.eval.report import markdown
from vlprune.eval.timing import Spread

UNPRUNED = "unpruned"
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Row:
    """One plan on one prompt size. Times in milliseconds, memory in bytes; None: not measured (`failed` says why)."""

    plan: str
    batch: int
    visual: int  # visual tokens a prompt
    text: int
    kept: float | None = None  # visual tokens a prompt that the last layer's cache holds
    layer_average: float | None = None
    runs: int = 0
    vision: Spread | None = None  # tower and projector
    scoring: Spread | None = None  # choosing and gathering at all stages; what happens inside the tower is in `vision`
    decoder: Spread | None = None  # the decoder stack in the prefill, with all that pruning does there
    language: Spread | None = None  # the prefill without `vision`
    prefill: Spread | None = None
    decode: Spread | None = None  # a step
    language_floor: Spread | None = None  # the decoder stack on sequences that were short from the start
    prefill_floor: Spread | None = None  # the whole unpruned prefill, its decoder layers cut to the same lengths
    decode_floor: Spread | None = None
    decoder_over_floor: Spread | None = None  # ratios of runs that stood beside each other in time
    prefill_over_floor: Spread | None = None
    tokens_per_second: float | None = None  # new tokens of the whole batch, prefill included
    peak_bytes: int | None = None  # allocated, weights included; CUDA only
    kv_bytes: int | None = None  # what the cache holds after the prefill
    flops: float | None = None  # of the decoder layers in the prefill, theoretical
    failed: str | None = None


@dataclass(frozen=True)
class Report:
    """Where and how it was measured, and the rows."""

    setting: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def ratios(self, row: Row) -> dict[str, float | None]:
        """Speed-ups over the unpruned row of the same size (above 1 is faster), and a decode step over its floor."""
        same = (r for r in self.rows if (r.plan, r.batch, r.visual) == (UNPRUNED, row.batch, row.visual))
        base = next(same, None)
        out: dict[str, float | None] = {}
        for name in ("language", "prefill", "decode"):
            out[f"{name}_speedup"] = _over(getattr(base, name, None), getattr(row, name))
        out["decode_over_floor"] = _over(row.decode, row.decode_floor)
        return out

    def to_dict(self) -> dict[str, Any]:
        return {"setting": self.setting, "rows": [dataclasses.asdict(r) | self.ratios(r) for r in self.rows]}

    def save(self, folder: Path) -> None:
        """Write bench.json, bench.csv and bench.md."""
        data = self.to_dict()
        write(folder / "bench.json", json.dumps(data, indent=2) + "\n")
        flat = [_flat(row) for row in data["rows"]]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in flat for key in row)))
        writer.writeheader()
        writer.writerows(flat)
        write(folder / "bench.csv", text.getvalue())
        write(folder / "bench.md", markdown(self.setting, TITLES, map(self.cells, self.rows)))

    def cells(self, row: Row) -> Sequence[str]:
        """A row as text, under `TITLES`: medians, with 20th and 80th percentile where they decide."""
        head = [row.plan, str(row.batch), str(row.visual)]
        if row.failed or row.prefill is None:
            return [*head, "not timed", *[""] * (len(TITLES) - len(head) - 1)]
        r = self.ratios(row)
        return [
            *head, _text(row.kept, "g"), _text(row.vision), _text(row.scoring), _range(row.decoder, ".1f"),
            _range(row.decoder_over_floor, ".3f"), _range(row.prefill, ".1f"), _range(row.prefill_over_floor, ".3f"),
            _text(r["prefill_speedup"]), _text(row.decode), _text(r["decode_speedup"]), _text(r["decode_over_floor"]),
            _text(row.kv_bytes, ".1f", MIB), _text(row.peak_bytes, ".2f", GIB), _text(row.flops, ".3g", 1e9), str(row.runs),
        ]  # fmt: skip

    def table(self) -> Table:
        """The rows for a terminal."""
        shown = Table(title=f"{self.setting['model']} ({self.setting['weights']} weights), times in ms")
        for i, title in enumerate(TITLES):
            shown.add_column(title, justify="right" if i else "left", overflow="fold")
        for row in self.rows:
            shown.add_row(*self.cells(row))
        return shown


TITLES = ("plan", "batch", "visual", "kept", "vision", "scoring", "decoder (p20-p80)", "over floor", "prefill (p20-p80)",
          "over floor", "speed-up", "decode", "speed-up", "over floor", "KV MiB", "peak GiB", "GFLOP", "runs")  # fmt: skip


def _text(value: Spread | float | None, form: str = ".2f", unit: float = 1) -> str:
    number = value.median if isinstance(value, Spread) else value
    return "-" if number is None else format(number / unit if unit != 1 else number, form)


def _range(value: Spread | None, form: str) -> str:
    return "-" if value is None else f"{value.median:{form}} ({value.p20:{form}}-{value.p80:{form}})"


def _over(a: Spread | None, b: Spread | None) -> float | None:
    return None if a is None or b is None else a.median / b.median


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Percentiles as columns of their own."""
    out: dict[str, Any] = {}
    for name, value in row.items():
        out |= {f"{name}_{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return out
