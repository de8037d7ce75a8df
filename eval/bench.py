"""Speed and memory of pruned prefill and decode, against the unpruned model and against the least that can be paid.

    python -m vlprune.eval.bench llava-1.5-7b --plans holov:keep=0.111 fastv@2:keep=0.333 --batch 1 8 --visual 576 2880
    python -m vlprune.eval.bench FOLDER --plans divprune:keep=64 --output out/

Every row is one plan on one prompt size. A row is timed only after it passed the gate: keep=1.0 gives the unpruned
model's logits bit for bit (where two unpruned runs agree so), every item keeps the tokens its budget says, and the
cache is as long as the trace claims.
The floor of a row is the bare language model on sequences that were short from the start: each decoder layer runs on
as many tokens as in the pruned run, and nothing is chosen. No pruning at the same places can be faster.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gc
import io
import itertools
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DynamicCache

import vlprune
from vlprune.api import adapter_of
from vlprune.errors import PruningError, SpecError, UnsupportedStage
from vlprune.eval.files import output_folder, write
from vlprune.eval.shapes import SHAPES, Loaded, Prompt, load, random_prompt
from vlprune.eval.timing import Marks, Spread, measure, prefill, prefill_parts, synchronise

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
UNPRUNED = "unpruned"


@dataclass(frozen=True)
class Row:
    """One plan on one prompt size. Times in milliseconds, memory in bytes; None: not measured (`failed` says why)."""

    plan: str
    batch: int
    visual: int  # visual tokens a prompt
    text: int
    kept: float | None = None  # visual tokens a prompt that the last layer's cache holds
    layer_average: float | None = None
    vision: Spread | None = None  # tower and projector
    scoring: Spread | None = None  # choosing and gathering at all stages; what happens inside the tower is in `vision`
    decoder: Spread | None = None  # the decoder stack in the prefill, with all that pruning does there
    language: Spread | None = None  # the prefill without `vision`
    prefill: Spread | None = None
    decode: Spread | None = None  # a step
    language_floor: Spread | None = None
    decode_floor: Spread | None = None
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
        """Speed-ups over the unpruned row of the same size (above 1 is faster), and time over the floor."""
        same = (r for r in self.rows if (r.plan, r.batch, r.visual) == (UNPRUNED, row.batch, row.visual))
        base = next(same, None)
        out: dict[str, float | None] = {}
        for name in ("language", "prefill", "decode"):
            out[f"{name}_speedup"] = _over(getattr(base, name, None), getattr(row, name))
        for name in ("decoder", "language"):
            out[f"{name}_over_floor"] = _over(getattr(row, name), row.language_floor)
        out["decode_over_floor"] = _over(row.decode, row.decode_floor)
        return out

    def to_dict(self) -> dict[str, Any]:
        return {"setting": self.setting, "rows": [dataclasses.asdict(r) | self.ratios(r) for r in self.rows]}

    def save(self, folder: Path) -> None:
        """Write bench.json and bench.csv."""
        data = self.to_dict()
        write(folder / "bench.json", json.dumps(data, indent=2) + "\n")
        flat = [_flat(row) for row in data["rows"]]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in flat for key in row)))
        writer.writeheader()
        writer.writerows(flat)
        write(folder / "bench.csv", text.getvalue())


def bench(
    model: str,
    plans: Sequence[str],
    *,
    batch: Sequence[int] = (1,),
    visual: Sequence[int] = (576,),
    text: int = 64,
    new: int = 32,
    dtype: str = "bfloat16",
    attention: str = "sdpa",
    device: str | None = None,
    repeats: int = 20,
    warmup: int = 3,
    seed: int = 0,
    output: str | Path | None = None,
    console: Console | None = None,
) -> Report:
    """Measure the unpruned model and every plan on every combination of `batch` and `visual`.

    Args:
        model: a checkpoint folder, a shipped checkpoint, or a shape with random weights (`vlprune.eval.shapes.SHAPES`).
        plans: texts as for `vlprune.wrap`.
        visual: visual tokens a prompt, about; the report has the real number.
        text: text tokens of a prompt.
        new: decode steps timed after each prefill.
        device: default: the GPU if there is one.
        output: folder for bench.json and bench.csv, written after every row.
    Raises:
        SpecError, BudgetError, UnsupportedModel, UnsupportedStage: before anything is measured.
        VlpruneError: the output folder cannot be written to.
    """
    if dtype not in DTYPES:
        raise SpecError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if min([*batch, *visual, text, new, repeats]) < 1 or warmup < 0:
        raise SpecError("batch, visual, text, new and repeats are at least 1, warmup at least 0")
    parsed = [vlprune.Plan.parse(p) for p in plans]
    folder = None if output is None else output_folder(output)
    console = console or Console()
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = load(model, DTYPES[dtype], attention, place, seed)
    for asked in parsed:
        reason = vlprune.why_unsupported(loaded.model, asked)
        if reason:
            raise UnsupportedStage(reason)
    report = Report(_setting(loaded, place, dtype, text, new, repeats, warmup))
    console.print("  ".join(f"{k}={v}" for k, v in report.setting.items()), highlight=False, markup=False)
    for size, count in itertools.product(batch, visual):
        prompt = random_prompt(loaded.model, size, count, text, seed)
        timer = Timer(loaded.model, prompt, new, repeats, warmup)
        for plan in (None, *parsed):
            with console.status(f"{plan or UNPRUNED}, batch {size}, {prompt.visual} visual tokens"):
                report.rows.append(timer.row(plan))
            if folder is not None:
                report.save(folder)
    console.print(table(report))
    for row in report.rows:
        if row.failed:
            console.print(f"{row.plan} (batch {row.batch}, {row.visual}) was not timed: {row.failed}", markup=False)
    return report


# ---- the gate


@torch.inference_mode()
def gate(model: Any, prompt: Prompt, plan: vlprune.Plan) -> None:
    """Refuse to time a plan that is wrong on this prompt. PruningError says what is."""
    expected = _logits(model, prompt)
    every = tuple(vlprune.Step(s.pruner, s.stage, vlprune.Budget(1.0, s.budget.scope)) for s in plan.steps)
    with vlprune.pruning(model, vlprune.Plan(every, plan.positions)):
        found = _logits(model, prompt)
    again = _logits(model, prompt)  # a device whose decode step wavers cannot show equal bits: its spread is the bound
    for before, repeat, after in zip(expected, again, found, strict=True):
        change, spread = _apart(before, after), _apart(before, repeat)
        if change > 2 * spread:
            other = f"two unpruned runs differ by {spread:.3g}"
            raise PruningError(f"keep=1.0 changes the logits by up to {change:.3g}; {other}")
    with vlprune.pruning(model, plan):
        cache = prefill(model, prompt.inputs, Marks(model.device)).past_key_values
        trace = vlprune.trace(model)
    check_counts(plan, trace)
    check_cache(cache, trace)


def _apart(a: Tensor, b: Tensor) -> float:
    return 0.0 if torch.equal(a, b) else float((a.float() - b.float()).abs().max())


def check_counts(plan: vlprune.Plan, trace: vlprune.Trace) -> None:
    """Every item of every stage keeps what its budget says, or fewer where the rule decides itself."""
    sizes = {(p.row, p.picture): p.tokens for p in trace.pictures}
    steps = [s for s in plan.steps if s.stage.name != "decode"]  # nothing is removed there
    for step, stage in zip(steps, trace.stages, strict=True):
        groups: dict[Any, list[Any]] = {}
        for item in stage.items:
            groups.setdefault(item.row if step.budget.scope == "prompt" else (item.row, item.picture), []).append(item)
        for items in groups.values():
            entered, kept = sum(i.tokens for i in items), sum(i.kept for i in items)
            due = min(entered, step.budget.count(sum(sizes[i.row, i.picture] for i in items)))
            if kept != due and not (step.pruner.adaptive and kept < due):
                row = items[0].row
                raise PruningError(f"{step} kept {kept} of {entered} tokens in row {row}; its budget says {due}")


def check_cache(cache: Any, trace: vlprune.Trace) -> None:
    """Every cache layer holds as many tokens as the trace claims. Rows here are equally long, so padding shows too."""
    for number, (layer, visual) in enumerate(zip(cache.layers, trace.layer_tokens, strict=True)):
        rows, slots = layer.keys.shape[0], layer.keys.shape[2]
        claimed = visual + trace.text
        longest = math.ceil(claimed / rows)
        if slots < longest or (slots > longest and len(set(_kept_by_row(trace))) == 1):
            raise PruningError(f"layer {number} caches {rows} x {slots} tokens; the trace claims {claimed} in all")


def _kept_by_row(trace: vlprune.Trace) -> list[int]:
    kept = [0] * trace.rows
    for item in trace.stages[-1].items if trace.stages else []:
        kept[item.row] += item.kept
    return kept


# ---- measuring


@dataclass(eq=False)
class Timer:
    """Rows for one model and one prompt."""

    model: Any
    prompt: Prompt
    new: int
    repeats: int
    warmup: int
    floors: dict[Any, dict[str, Spread]] = field(default_factory=dict)  # plans with equal counts share one

    def row(self, plan: vlprune.Plan | None) -> Row:
        """One row; a plan that fails its gate or runs out of memory is not timed, and the row says so."""
        prompt = self.prompt
        row = Row(str(plan or UNPRUNED), prompt.batch, prompt.visual, prompt.text)
        try:
            if plan is None:
                measured, slots = self._measure(pruned=False)
                lengths = slots
                row = dataclasses.replace(row, kept=prompt.visual, layer_average=prompt.visual)
            else:
                gate(self.model, prompt, plan)
                with vlprune.pruning(self.model, plan):
                    measured, slots = self._measure(pruned=True)
                    trace = vlprune.trace(self.model)
                lengths = prefill_lengths(prompt, trace, len(slots))
                kept, average = trace.kept / prompt.batch, trace.layer_average / prompt.batch
                row = dataclasses.replace(row, kept=kept, layer_average=average)
            measured |= self._floor(lengths, slots)
            flops = decoder_flops(self.model.config.get_text_config(), lengths, prompt.batch)
            return dataclasses.replace(row, flops=flops, **measured)
        except (PruningError, torch.OutOfMemoryError) as error:
            return dataclasses.replace(row, failed=str(error).partition("\n")[0])
        finally:
            _release(self.model.device)

    @torch.inference_mode()
    def _measure(self, pruned: bool) -> tuple[dict[str, Any], list[int]]:
        """Fields of a Row for the model as it is now, and the tokens that each cache layer holds after the prefill."""
        model, prompt, device = self.model, self.prompt, self.model.device
        held: dict[str, Any] = {}

        def run() -> dict[str, float]:
            marks = Marks(device)
            out = prefill(model, prompt.inputs, marks)
            layers = out.past_key_values.layers
            held["kv_bytes"] = sum(t.numel() * t.element_size() for lay in layers for t in (lay.keys, lay.values))
            held["slots"] = [layer.keys.shape[2] for layer in layers]
            parts = prefill_parts(marks)
            marks.set("decode")
            _decode(model, out, self.new)
            marks.set("decoded")
            return {
                **parts,
                "scoring": sum(s.milliseconds for s in vlprune.trace(model).stages) if pruned else 0.0,
                "decode": marks.milliseconds("decode", "decoded") / self.new,
            }

        _release(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = measure(run, self.repeats, self.warmup)
        seconds = (times["prefill"].median + self.new * times["decode"].median) / 1e3
        fields = dict(
            times,
            tokens_per_second=prompt.batch * self.new / seconds,
            peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            kv_bytes=held["kv_bytes"],
        )
        return fields, held["slots"]

    @torch.inference_mode()
    def _floor(self, lengths: Sequence[int], slots: Sequence[int]) -> dict[str, Spread]:
        """The bare language model on random embeddings; layers cut by slicing to `lengths`, their caches to `slots`."""
        key = (tuple(lengths), tuple(slots))
        if key in self.floors:
            return self.floors[key]
        device, text = self.model.device, adapter_of(self.model).text
        width = text.get_input_embeddings().embedding_dim
        embeds = torch.randn(self.prompt.batch, lengths[0], width, device=device, dtype=self.model.dtype)
        one = embeds[:, :1].contiguous()

        def run() -> dict[str, float]:
            cache, marks = DynamicCache(config=text.config), Marks(device)
            synchronise(device)
            marks.set("start")
            out = text(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
            self.model.lm_head(out.last_hidden_state[:, -1:])
            marks.set("prefilled")
            for layer, n in zip(cache.layers, slots, strict=True):
                layer.keys, layer.values = layer.keys[:, :, :n].contiguous(), layer.values[:, :, :n].contiguous()
            synchronise(device)
            marks.set("decode")
            for _ in range(self.new):
                out = text(inputs_embeds=one, past_key_values=cache, use_cache=True)
                self.model.lm_head(out.last_hidden_state).argmax(-1)
            marks.set("end")
            return {"language_floor": marks.milliseconds("start", "prefilled"),
                    "decode_floor": marks.milliseconds("decode", "end") / self.new}  # fmt: skip

        with _cut(text.layers, lengths, slots):
            self.floors[key] = measure(run, self.repeats, self.warmup)
        return self.floors[key]


def prefill_lengths(prompt: Prompt, trace: vlprune.Trace, layers: int) -> list[int]:
    """Tokens of a row in every decoder layer while the prompt runs; a "cache" stage acts only afterwards."""
    cuts = {0 if s.stage in ("encoder", "projector") else int(s.stage): s.kept
            for s in trace.stages if s.stage not in ("cache", "decode")}  # fmt: skip
    left, lengths = trace.visual, []
    for layer in range(layers):
        left = cuts.get(layer, left)
        lengths.append(math.ceil(left / prompt.batch) + prompt.text)
    return lengths


def decoder_flops(config: Any, lengths: Sequence[int], batch: int) -> float:
    """Operations of the decoder layers for a prompt; a multiply-add counts as two, norms and activations as none.

        sum_l  2 n_l (2 D H d + 2 D Hkv d + 3 D F) + 2 n_l^2 H d

    n_l: tokens of a row in layer l; D, F: widths of the model and of its MLP. The last term is Q K^T and A V, of which
    a causal model needs half.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    d = getattr(config, "head_dim", None) or width // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    weights = 2 * width * heads * d + 2 * width * kv_heads * d + 3 * width * config.intermediate_size
    return float(batch * sum(2 * n * weights + 2 * n * n * heads * d for n in lengths))


@contextmanager
def _cut(layers: nn.ModuleList, lengths: Sequence[int], slots: Sequence[int]) -> Iterator[None]:
    """Slice what enters each decoder layer to its first tokens: the least that any removal must do."""

    def hook(i: int) -> Callable[..., Any]:
        def cut(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            new, mask, n = dict(kwargs), kwargs.get("attention_mask"), lengths[i]
            if x.shape[1] > 1:  # the prompt
                x, columns = x[:, :n], n
                new["position_embeddings"] = tuple(t[..., :n, :] for t in kwargs["position_embeddings"])
                new["position_ids"] = None
            else:
                columns = kwargs["past_key_values"].layers[i].keys.shape[2] + 1
            if isinstance(mask, Tensor):
                new["attention_mask"] = mask[..., : x.shape[1], :columns]
            if args:
                return (x, *args[1:]), new
            return args, {**new, "hidden_states": x}

        return cut

    shorter = [i for i in range(len(layers)) if lengths[i] < lengths[0] or slots[i] != slots[0]]
    handles = [layers[i].register_forward_pre_hook(hook(i), with_kwargs=True) for i in shorter]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- one run


def _decode(model: Any, out: Any, steps: int) -> Tensor:
    """Greedy steps after a prefill of rows without padding, which need no mask; the last logits."""
    cache = out.past_key_values
    logits: Tensor = out.logits
    for _ in range(steps):
        ids = logits[:, -1].argmax(-1, keepdim=True)
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return logits


def _logits(model: Any, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Of the prompt's last token and of the first decode step."""
    out = prefill(model, prompt.inputs, Marks(model.device))
    return out.logits, _decode(model, out, 1)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- showing


def table(report: Report) -> Table:
    """The rows for a terminal: medians, with the 20th and 80th percentile of the prefill."""
    shown = Table(title=f"{report.setting['model']} ({report.setting['weights']} weights), times in ms")
    shown.add_column("plan", overflow="fold", min_width=20)
    for name in ("batch", "visual", "kept", "vision", "scoring", "decoder", "over floor", "language", "over floor",
                 "prefill", "p20-p80", "speed-up", "decode", "speed-up", "over floor", "KV MiB", "peak GiB",
                 "GFLOP"):  # fmt: skip
        shown.add_column(name, justify="right")
    for row in report.rows:
        if row.failed or row.prefill is None:
            shown.add_row(row.plan, str(row.batch), str(row.visual), "not timed")
            continue
        r = report.ratios(row)
        shown.add_row(
            row.plan, str(row.batch), str(row.visual), _text(row.kept, "g"), _text(row.vision), _text(row.scoring),
            _text(row.decoder), _text(r["decoder_over_floor"], ".2f"), _text(row.language),
            _text(r["language_over_floor"], ".2f"), _text(row.prefill),
            f"{row.prefill.p20:.1f}-{row.prefill.p80:.1f}", _text(r["prefill_speedup"], ".2f"), _text(row.decode),
            _text(r["decode_speedup"], ".2f"), _text(r["decode_over_floor"], ".2f"), _text(row.kv_bytes, ".1f", 2**20),
            _text(row.peak_bytes, ".2f", 2**30), _text(row.flops, ".3g", 1e9),
        )  # fmt: skip
    return shown


def _text(value: Spread | float | None, form: str = ".2f", unit: float = 1) -> str:
    number = value.median if isinstance(value, Spread) else value
    return "-" if number is None else format(number / unit if unit != 1 else number, form)


def _over(a: Spread | None, b: Spread | None) -> float | None:
    return None if a is None or b is None else a.median / b.median


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Percentiles as columns of their own."""
    out: dict[str, Any] = {}
    for name, value in row.items():
        out |= {f"{name}_{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return out


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


def main(arguments: Sequence[str] | None = None) -> None:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="python -m vlprune.eval.bench", description=lines[0])
    shapes = f"a checkpoint folder, a shipped checkpoint, or a shape with random weights: {', '.join(SHAPES)}"
    parser.add_argument("model", help=shapes)
    parser.add_argument("--plans", nargs="*", default=[], help="such as holov:keep=0.111 fastv@2:keep=0.333")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--visual", nargs="+", type=int, default=[576], help="visual tokens a prompt, about")
    parser.add_argument("--text", type=int, default=64)
    parser.add_argument("--new", type=int, default=32, help="decode steps")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="folder for bench.json and bench.csv")
    bench(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
