"""Speed and memory of pruned prefill and decode, against the unpruned model and against the least that can be paid.

    python -m vlprune.eval.bench llava-1.5-7b --plans holov:keep=0.111 fastv@2:keep=0.333 --batch 1 8 --visual 576 2880
    python -m vlprune.eval.bench llava-1.5-7b --every 32 --batch 8 --visual 2880 --output out/
    python -m vlprune.eval.bench FOLDER --plans divprune:keep=64 --output out/

Every row is one plan on one prompt size. A row is timed only after it passed the gate: keep=1.0 gives the unpruned
model's logits bit for bit (where unpruned runs agree so), every item keeps the tokens its budget says, and the cache is
as long as the trace claims.
There are two floors, in which nothing is chosen and each decoder layer runs on as many tokens as in the pruned run: the
bare language model on sequences that were short from the start, and the whole unpruned prefill with its decoder layers
cut. No pruning at the same places can be faster.
All plans of a size and their floors run in turn, round after round, so that clocks and other load fall on all alike.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import vlprune
from vlprune.errors import PruningError, SpecError, UnsupportedStage
from vlprune.eval.draws import every_pruner
from vlprune.eval.files import output_folder
from vlprune.eval.floors import Floors, Lengths, decoder_flops, prefill_lengths
from vlprune.eval.gate import Gate, decode
from vlprune.eval.report import console_for_tables
from vlprune.eval.rows import UNPRUNED, Report, Row
from vlprune.eval.shapes import SHAPES, Loaded, Prompt, load, random_prompt
from vlprune.eval.timing import Marks, Spread, prefill, prefill_parts, synchronise
from vlprune.releases import CACHE

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LEAST = 3  # runs of a plan that takes longer than its share of time


def bench(
    model: str,
    plans: Sequence[str] = (),
    *,
    every: int | float | None = None,
    batch: Sequence[int] = (1,),
    visual: Sequence[int] = (576,),
    text: int = 64,
    new: int = 32,
    dtype: str = "bfloat16",
    attention: str = "sdpa",
    device: str | None = None,
    repeats: int = 20,
    warmup: int = 3,
    seconds: float = 60.0,
    seed: int = 0,
    output: str | Path | None = None,
    console: Console | None = None,
) -> Report:
    """Measure the unpruned model and every plan on every combination of `batch` and `visual`.

    Args:
        model: a checkpoint folder, a shipped checkpoint, or a shape with random weights (`vlprune.eval.shapes.SHAPES`).
        plans: texts as for `vlprune.wrap`.
        every: also every registered pruner that this model takes and that prunes in the prefill, at its own stage, with
            this `keep`.
        visual: visual tokens a prompt, about; the report has the real number.
        text: text tokens of a prompt.
        new: decode steps timed after each prefill.
        device: default: the GPU if there is one.
        seconds: a plan that has taken longer than this gets no more runs once it has three.
        output: folder for bench.json, bench.csv and bench.md, written after every round.
    Raises:
        SpecError, BudgetError, UnsupportedModel, UnsupportedStage: before anything is measured.
        VlpruneError: the output folder cannot be written to.
    """
    if dtype not in DTYPES:
        raise SpecError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if min([*batch, *visual, text, new, repeats]) < 1 or warmup < 0 or seconds <= 0:
        raise SpecError("batch, visual, text, new and repeats are at least 1, warmup at least 0, seconds above 0")
    parsed = [vlprune.Plan.parse(p) for p in plans]
    folder = None if output is None else output_folder(output)
    console = console or console_for_tables()
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = load(model, DTYPES[dtype], attention, place, seed)
    for asked in parsed:
        reason = vlprune.why_unsupported(loaded.model, asked)
        if reason:
            raise UnsupportedStage(reason)
    if every is not None:
        parsed += every_plan(loaded.model, every)
    report = Report(_setting(loaded, place, dtype, text, new, repeats, warmup))
    console.print("  ".join(f"{k}={v}" for k, v in report.setting.items()), highlight=False, markup=False)
    for size, count in itertools.product(batch, visual):
        prompt = random_prompt(loaded.model, size, count, text, seed)
        before = list(report.rows)

        def note(rows: list[Row], before: list[Row] = before) -> None:
            report.rows[:] = before + rows
            if folder is not None:
                report.save(folder)

        with console.status(f"batch {size}, {prompt.visual} visual tokens"):
            note(Bout(loaded.model, prompt, new, repeats, warmup, seconds).rows([None, *parsed], note))
    console.print(report.table())
    for row in report.rows:
        if row.failed:
            console.print(f"{row.plan} (batch {row.batch}, {row.visual}) was not timed: {row.failed}", markup=False)
    return report


def every_plan(model: Any, keep: int | float) -> list[vlprune.Plan]:
    """All registered pruners that act on this model's prefill, each where its paper puts it."""
    plans = [vlprune.Plan.parse(f"{name}:keep={keep}") for name in every_pruner()]
    before = [
        p for p in plans
        if p.steps[0].stage.name not in ("cache", "decode") and "guide" not in p.steps[0].pruner.needs
    ]  # fmt: skip
    return [p for p in before if vlprune.why_unsupported(model, p) is None]


# ---- measuring


@dataclass(eq=False)
class Entry:
    """A plan among those of a bout, and what is known of it so far."""

    plan: vlprune.Plan | None
    row: Row
    lengths: Lengths | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, float]] = field(default_factory=list)
    spent: float = 0.0  # milliseconds

    def finished(self) -> Row:
        """The row, with what was measured."""
        if self.row.failed or not self.samples:
            return self.row
        samples = [s | _over(s) for s in self.samples]
        spreads: dict[str, Any] = {name: Spread.of([s[name] for s in samples]) for name in samples[0]}
        seconds = (spreads["prefill"].median + self.facts["new"] * spreads["decode"].median) / 1e3
        speed = self.row.batch * self.facts["new"] / seconds
        facts = {k: v for k, v in self.facts.items() if k != "new"}
        return replace(self.row, **spreads, **facts, runs=len(samples), tokens_per_second=speed)


def _over(sample: dict[str, float]) -> dict[str, float]:
    pairs = {"decoder": "language_floor", "prefill": "prefill_floor"}
    return {f"{name}_over_floor": sample[name] / sample[floor] for name, floor in pairs.items() if floor in sample}


@dataclass(eq=False)
class Bout:
    """Plans against each other on one prompt size."""

    model: Any
    prompt: Prompt
    new: int
    repeats: int
    warmup: int
    seconds: float = 60.0

    def rows(self, plans: Sequence[vlprune.Plan | None], note: Callable[[list[Row]], None] | None = None) -> list[Row]:
        """A row for each plan (None: unpruned). A plan that fails its gate or runs out of memory is not timed, and its
        row says so. `note` is called with the rows so far after every round."""
        prompt = self.prompt
        gate, floors = Gate(self.model, prompt), Floors(self.model, prompt, self.new)
        entries = [Entry(p, Row(str(p or UNPRUNED), prompt.batch, prompt.visual, prompt.text)) for p in plans]
        for entry in entries:
            with self._failing(entry):
                self._open(entry, gate)
        for turn in range(-self.warmup, self.repeats):
            known: dict[Lengths, dict[str, float]] = {}
            for entry in entries:
                if entry.row.failed or (entry.spent > 1e3 * self.seconds and len(entry.samples) >= LEAST):
                    continue
                with self._failing(entry):
                    self._turn(entry, turn, floors, known)
            if note is not None and turn >= 0:
                note([e.finished() for e in entries])
        return [e.finished() for e in entries]

    @contextmanager
    def _failing(self, entry: Entry) -> Iterator[None]:
        """What goes wrong with one plan does not stop the others."""
        try:
            yield
        except (PruningError, torch.OutOfMemoryError) as error:
            entry.row = replace(entry.row, failed=str(error).partition("\n")[0])
            error.__traceback__ = None  # its frames hold tensors
            _release(self.model.device)

    def _open(self, entry: Entry, gate: Gate) -> None:
        """Let a plan through its gate, and note what does not change from run to run."""
        batch, config = self.prompt.batch, self.model.config.get_text_config()
        layers = config.num_hidden_layers
        if entry.plan is None:
            kept = average = float(self.prompt.visual)
            lengths = (self.prompt.visual + self.prompt.text,) * layers
        else:
            trace = gate.check(entry.plan)
            kept, average = trace.kept / batch, trace.layer_average / batch
            lengths = prefill_lengths(self.prompt, trace, layers)
        flops = decoder_flops(config, lengths, batch)
        entry.row = replace(entry.row, kept=kept, layer_average=average, flops=flops)
        entry.lengths = Lengths(lengths, lengths)

    def _turn(self, entry: Entry, turn: int, floors: Floors, known: dict[Lengths, dict[str, float]]) -> None:
        """One run of a plan and, if no other has just run them, of its floors; the unpruned model has none."""
        if entry.plan is None:
            sample = self._run(entry, pruned=False)
        else:
            with vlprune.pruning(self.model, entry.plan):
                sample = self._run(entry, pruned=True)
            lengths = entry.lengths
            assert lengths is not None
            if lengths not in known:
                known[lengths] = floors.native(lengths) | floors.whole(lengths)
            sample |= known[lengths]
        if turn >= 0:
            entry.samples.append(sample)
            entry.spent += sample["prefill"] + self.new * sample["decode"]

    @torch.inference_mode()
    def _run(self, entry: Entry, pruned: bool) -> dict[str, float]:
        """Times of one prefill and its decode steps."""
        device = self.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        marks = Marks(device)
        out = prefill(self.model, self.prompt.inputs, marks)
        layers = out[CACHE].layers
        parts = prefill_parts(marks)
        entry.facts["new"] = self.new
        entry.facts["kv_bytes"] = sum(t.numel() * t.element_size() for lay in layers for t in (lay.keys, lay.values))
        assert entry.lengths is not None
        entry.lengths = replace(entry.lengths, slots=tuple(layer.keys.shape[2] for layer in layers))
        synchronise(device)
        marks.set("decode")
        decode(self.model, out, self.new)
        marks.set("decoded")
        times = {
            **parts,
            "scoring": sum(s.milliseconds for s in vlprune.trace(self.model).stages) if pruned else 0.0,
            "decode": marks.milliseconds("decode", "decoded") / self.new,
        }
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        entry.facts["peak_bytes"] = peak and max(peak, entry.facts.get("peak_bytes") or 0)
        return times


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _setting(loaded: Loaded, device: torch.device, dtype: str, text: int, new: int, repeats: int,
             warmup: int) -> dict[str, Any]:  # fmt: skip
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "model": loaded.name, "weights": loaded.weights, "device": f"{device.type} {name}", "dtype": dtype,
        "attention": loaded.model.config._attn_implementation, "text_tokens": text, "new_tokens": new,
        "repeats": repeats, "warmup": warmup, "torch": torch.__version__, "cuda": torch.version.cuda,
        "transformers": transformers.__version__, "vlprune": vlprune.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def _keep(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="python -m vlprune.eval.bench", description=lines[0])
    shapes = f"a checkpoint folder, a shipped checkpoint, or a shape with random weights: {', '.join(SHAPES)}"
    parser.add_argument("model", help=shapes)
    parser.add_argument("--plans", nargs="*", default=[], help="such as holov:keep=0.111 fastv@2:keep=0.333")
    parser.add_argument(
        "--every", type=_keep, metavar="KEEP", help="also every pruner at its own stage, with this keep"
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--visual", nargs="+", type=int, default=[576], help="visual tokens a prompt, about")
    parser.add_argument("--text", type=int, default=64)
    parser.add_argument("--new", type=int, default=32, help="decode steps")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a plan, after which three runs are enough")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="folder for bench.json, bench.csv and bench.md")
    bench(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
