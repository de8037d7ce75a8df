"""What choosing costs: milliseconds and bytes of every pruner's `select` on random tensors of a published model's shape.

    python -m vlprune.eval.scoring --device cuda --out scoring
    python -m vlprune.eval.scoring --precision --cases tests.pruners.vectors --out precision
    python -m vlprune.eval.scoring --pruners zoo_prune:rank=128 "debias(fastv)" --tokens 576 --quick

Shapes are those of LLaVA-1.5-7B. A pruner gets the fields of `Context` that it names in `needs`, made of random
queries, keys and features; what making these fields costs a model is not part of the time. A batch is as many contexts
one after the other, as in the engine. A rule that works inside the vision tower is timed over all its layers there, a
per-step rule over one decode step. A rule whose choice is malformed or differs from call to call is not timed.

--precision counts how many of the K kept tokens change when the inputs come in half precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import math
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import vlprune
from vlprune import Context, DecodePruner, EncoderPruner, Grid, Plan, Pruner, Selection
from vlprune.errors import PruningError, SpecError, VlpruneError
from vlprune.eval.files import output_folder, write
from vlprune.eval.timing import Marks, Spread, measure, synchronise
from vlprune.ops import attention_rows, received_attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PER_TOKEN = {"index": 0, "features": 0, "encoder_features": 0, "padding": 0, "newline": 0, "queries": 1, "keys": 1,
             "values": 1, "cls_attention": 1, "received_attention": 1, "last_attention": 1, "next_attention": 1,
             "text_attention": 2}  # fmt: skip  # field -> its dimension of N
SHARPNESS = 2.0  # standard deviation of the logits: attention neither flat nor on one token
PICTURE = (640, 480)  # what a pruner that looks for padding is told
LEAST = 5  # repeats of a row that takes longer than its share of time


@dataclass(frozen=True)
class Shape:
    """Widths of a model; the defaults are LLaVA-1.5-7B's. The tower's last block is not run, as nobody reads it."""

    text: int = 64  # M
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    d: int = 128
    model: int = 4096  # D
    tower_layers: int = 24
    tower_heads: int = 16
    tower_d: int = 64
    tower: int = 1024  # Dv


# ---- pruners


def every_pruner() -> list[str]:
    """Texts of all registered pruners; one that wraps another stands there with every pruner it takes."""
    importlib.import_module("vlprune.pruners")
    texts = []
    for name, cls in sorted(vlprune.PRUNERS.items()):
        if not any(f.name == "inner" for f in dataclasses.fields(cls)):
            texts.append(name)
            continue
        for inner, inner_cls in sorted(vlprune.PRUNERS.items()):
            if inner_cls is not cls and _takes(f"{name}({inner})"):
                texts.append(f"{name}({inner})")
    return texts


def _takes(text: str) -> bool:
    try:
        Plan.parse(text, 2)
    except SpecError:
        return False
    return True


def read(text: str) -> tuple[Pruner, str]:
    """A pruner and the stage it stands at, of a text such as "zoo_prune:rank=128" or "debias(fastv)@2"."""
    step = Plan.parse(text, 2).steps[0]
    return step.pruner, str(step.stage)


# ---- inputs


def grids(n: int) -> tuple[Grid, ...]:
    """The tiles of a multiple of 576 tokens, as LLaVA-NeXT cuts a picture; else one grid as square as n allows."""
    if n % 576 == 0:
        return (Grid(1, 24, 24),) * (n // 576)
    height = next(h for h in range(math.isqrt(n), 0, -1) if n % h == 0)
    return (Grid(1, height, n // height),)


@dataclass(eq=False)
class Maker:
    """Random Contexts. One seed gives the same numbers in every dtype, up to rounding to it.

    Attention rows are made of queries and keys already in that dtype, and are themselves float32: what a model in half
    precision hands over.
    """

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    modules: dict[str, nn.Module] = field(default_factory=dict)

    def project(self) -> nn.Module:
        """A LLaVA projector with random weights."""
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

        s = self.shape
        config = transformers.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", "hidden_size": s.tower},
            text_config={"model_type": "llama", "hidden_size": s.model},
        )
        return self._module("project", lambda: LlavaMultiModalProjector(config))

    def norm(self) -> nn.Module:
        return self._module("norm", lambda: nn.RMSNorm(self.shape.model, eps=1e-5))

    def _module(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        if name not in self.modules:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                module = make().requires_grad_(False)
            self.modules[name] = module.to(self.device, self.dtype)
        return self.modules[name]

    @torch.no_grad()
    def context(self, pruner: Pruner, stage: str, n: int, keep: int, seed: int) -> Context:
        """What `pruner` gets to see of n tokens at `stage`.

        Raises:
            SpecError: it needs a field that is not known here.
        """
        s, needs = self.shape, frozenset(pruner.needs)
        early = stage in ("encoder", "projector")
        heads, kv, d = (s.tower_heads, s.tower_heads, s.tower_d) if early else (s.heads, s.kv_heads, s.d)
        generator = torch.Generator(self.device).manual_seed(seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=self.device).to(self.dtype)

        out: dict[str, Any] = {}
        if needs & {"encoder_features", "project"}:
            out["encoder_features"] = draw(n, s.tower)
        if "features" in needs:
            x = out.get("encoder_features")
            out["features"] = draw(n, s.tower if stage == "encoder" else s.model) if x is None else self.project()(x)
        out |= {name: draw(s.text, s.model) for name in ("text_features", "text_embeddings") if name in needs}
        if needs & ATTENTION:
            q, k = draw(heads, n + s.text, d) * SHARPNESS, draw(kv, n + s.text, d)
            out |= _rows(needs, q, k, n)
        if "values" in needs or "last_value" in needs:
            out["values"], out["last_value"] = draw(kv, n, d), draw(kv, d)
        if needs & {"cls_attention", "cls_value"}:
            q, k = draw(1, heads, 1, d) * SHARPNESS, draw(1, heads, 1 + n, d)
            out["cls_attention"] = attention_rows(q, k, scale=d**-0.5)[0, :, 0, 1:]
            out["cls_value"] = draw(heads, d)
        out |= {"grids": grids(n), "image_size": PICTURE, "generator": torch.Generator()}
        if "project" in needs:
            out["project"] = self.project()
        if "norm" in needs:
            out["norm"] = self.norm()
        unknown = needs - out.keys() - OPTIONAL
        if unknown:
            raise SpecError(f"scoring does not know how to draw {', '.join(sorted(unknown))} for {pruner.name}")
        layers = s.tower_layers if isinstance(pruner, EncoderPruner) else s.layers
        layer = int(stage) if stage.isdigit() else None
        return Context(keep=keep, layer=layer, layers=layers, **{k: v for k, v in out.items() if k in needs})


ATTENTION = frozenset({"queries", "keys", "last_query", "text_keys", "last_attention", "next_attention", "text_attention",
                       "text_self_attention", "received_attention"})  # fmt: skip
OPTIONAL = frozenset({"index", "padding", "newline"})  # None where nothing was removed and nothing is padded


def _rows(needs: frozenset[str], q: Tensor, k: Tensor, n: int) -> dict[str, Any]:
    """Fields made of one layer's queries [H, N + M, d] and keys [Hkv, N + M, d], visual tokens first, text after them."""
    scale = q.shape[-1] ** -0.5
    out: dict[str, Any] = {"queries": q[:, :n], "keys": k[:, :n], "last_query": q[:, -1], "text_keys": k[:, n:]}
    if needs & {"last_attention", "next_attention"}:
        out["last_attention"] = attention_rows(q[None, :, -1:], k[None], scale=scale, columns=(0, n))[0, :, 0]
        out["next_attention"] = out["last_attention"]
    if needs & {"text_attention", "text_self_attention"}:
        limit = torch.arange(n, k.shape[1], device=k.device)
        rows = attention_rows(q[None, :, n:], k[None], scale=scale, limit=limit)[0].transpose(0, 1)  # [M, H, N + M]
        out["text_attention"], out["text_self_attention"] = rows[..., :n], rows[..., n:]
    if "received_attention" in needs:
        out["received_attention"] = received_attention(q[None, :, :n], k[None, :, :n], scale=scale, heads="none")[0]
    return out


# ---- one choice


@dataclass(eq=False)
class Task:
    """One pruner on one item: everything is there, `run` is what gets timed."""

    pruner: Pruner
    n: int
    keep: int
    contexts: list[Context]  # one; of a rule inside the tower one per layer
    state: Any = None  # of a per-step rule

    @staticmethod
    def make(maker: Maker, text: str, n: int, keep: int, seed: int) -> Task:
        pruner, stage = read(text)
        if isinstance(pruner, EncoderPruner):
            steps = range(maker.shape.tower_layers - 2)  # the engine asks up to the block before the one that is read
            seeds = [seed + 1000 * layer for layer in steps]
            drawn = [replace(maker.context(pruner, stage, n, keep, s), layer=i) for i, s in zip(steps, seeds, strict=True)]
            return Task(pruner, n, keep, _as_they_leave(pruner, drawn, n))
        ctx = maker.context(pruner, stage, n, keep, seed)
        if isinstance(pruner, DecodePruner):
            last = replace(ctx, layer=max(pruner.focal(maker.shape.layers)))
            return Task(pruner, n, keep, [last], pruner.start(last))
        return Task(pruner, n, keep, [ctx])

    def run(self) -> Selection:
        """The choice, of the N tokens; of a rule inside the tower the last one, of the tokens that had not left before."""
        pruner = self.pruner
        if isinstance(pruner, DecodePruner):
            return pruner.step(self.contexts[0], self.state)[0]
        if not isinstance(pruner, EncoderPruner):
            return pruner.select(self.contexts[0])
        state, last = pruner.start(), None
        for ctx in self.contexts:
            selection, state = pruner.step(ctx, state)
            last = last if selection is None else selection
        if last is None:
            raise PruningError(f"{pruner.name} dropped nothing in {len(self.contexts)} layers")
        return last

    def check(self) -> None:
        """Raise PruningError unless the choice is well formed and a second call makes the same one."""
        first, second = self.run(), self.run()
        n = self.contexts[-1].tokens
        well_formed(first, n, self.keep, self.pruner.adaptive)
        if not torch.equal(first.kept, second.kept):
            raise PruningError(f"{self.pruner.name} chooses other tokens when it is asked again")


def _as_they_leave(pruner: EncoderPruner, contexts: list[Context], n: int) -> list[Context]:
    """The contexts of all layers, each with as many tokens as the layers before it leave."""
    state, out = pruner.start(), []
    for ctx in contexts:
        cut = {name: getattr(ctx, name).narrow(dim, 0, n) for name, dim in PER_TOKEN.items() if getattr(ctx, name) is not None}
        out.append(replace(ctx, **cut))
        selection, state = pruner.step(out[-1], state)
        n = n if selection is None else len(selection.kept)
    return out


def well_formed(selection: Selection, n: int, keep: int, adaptive: bool = False) -> None:
    """PruningError unless it is K of N tokens in ascending order, with a merge and scores that fit; looks at values."""
    kept = selection.kept.cpu()
    Selection(kept).check(n, keep, adaptive)
    merge = selection.merge
    if merge is not None:
        source, slot, weight = merge.source.cpu(), merge.slot.cpu(), merge.weight.cpu()
        shapes = {tuple(t.shape) for t in (source, slot, weight)}
        if len(shapes) != 1 or source.dim() != 1:
            raise PruningError(f"the entries of a merge are three lists of one length, got {sorted(shapes)}")
        inside = (source >= 0).all() and (source < n).all() and (slot >= 0).all() and (slot < len(kept)).all()
        if not inside or not weight.isfinite().all():
            raise PruningError("a merge names tokens that are not there, or weights that are no numbers")
    scores = selection.scores
    if scores is not None and (tuple(scores.shape) != (n,) or not scores.dtype.is_floating_point or scores.isnan().any()):
        raise PruningError(f"scores are {n} numbers, got {scores.dtype} of shape {tuple(scores.shape)}, perhaps with NaN")


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
def cost(maker: Maker, text: str, n: int, keep: int, batch: int, repeats: int, seconds: float, warmup: int = 2) -> Row:
    """Time one pruner, or say why not.

    Args:
        repeats: of the whole batch; fewer, but at least 5, where they would take longer than `seconds`.
    """
    row = Row(text, read(text)[1], n, keep, batch)
    try:
        tasks = [Task.make(maker, text, n, keep, seed) for seed in range(batch)]
        for task in tasks:
            task.check()

        def run() -> dict[str, float]:
            marks = Marks(maker.device)
            synchronise(maker.device)
            marks.set("start")
            for task in tasks:
                task.run()
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
    """How many of K kept tokens leave the kept set when the inputs are rounded. None: that dtype failed."""

    pruner: str
    inputs: str
    keep: int
    draws: int
    bfloat16: float | None  # the median over the draws
    float16: float | None
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
            kept = {name: _final(Task.make(maker, text, n, keep, seed)) for name, maker in makers.items()}
            for name, counts in found.items():
                counts.append(changed(kept["float32"], kept[name]))
        yield _change(text, f"random, N = {n}", keep, found)


def _final(task: Task) -> list[int]:
    """The kept tokens by their numbers among the N of the start."""
    if not isinstance(task.pruner, EncoderPruner):
        return task.run().kept.tolist()
    alive, state = torch.arange(task.n, device=task.contexts[0].device), task.pruner.start()
    whole = {name: [getattr(c, name) for c in task.contexts] for name in PER_TOKEN if getattr(task.contexts[0], name) is not None}
    for i, ctx in enumerate(task.contexts):
        rows = {name: values[i].index_select(PER_TOKEN[name], alive) for name, values in whole.items()}
        selection, state = task.pruner.step(replace(ctx, **rows), state)
        alive = alive if selection is None else alive[selection.kept]
    return alive.tolist()


@torch.inference_mode()
def changes_in(cases: Iterable[Any]) -> Iterator[Change]:
    """Given cases: objects with `name`, `pruner` (a text) and `run(change)`, the kept tokens after `change` of all inputs."""
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


def setting(device: torch.device, dtype: str, command: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": f"{device.type} {name}", "dtype": dtype, "torch": torch.__version__, "cuda": torch.version.cuda,
        "transformers": transformers.__version__, "vlprune": vlprune.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "command": command,
    }  # fmt: skip


def markdown(head: dict[str, Any], titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The setting, one item a line, and a table; the first column is text, the others are numbers."""
    lines = [f"- {k}: {v}" for k, v in head.items() if v is not None] + [""]
    lines += [f"| {' | '.join(titles)} |", f"|{'|'.join([':--'] + ['--:'] * (len(titles) - 1))}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


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
    return [row.pruner, row.inputs, str(row.keep), str(row.draws), f"{row.bfloat16:g}", f"{row.float16:g}", str(row.worst)]


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
    parser.add_argument("--seconds", type=float, default=0.5, help="of one row, after which 5 repeats are enough")
    parser.add_argument("--quick", action="store_true", help="K = 64 and batch 1 alone, 5 repeats, 2 draws")
    parser.add_argument("--precision", action="store_true", help="count changed tokens instead of timing")
    parser.add_argument("--draws", type=int, default=8, help="random inputs of each size, for --precision")
    parser.add_argument("--cases", help="for --precision also a module with cases(); the repository has tests.pruners.vectors")
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
    if device.type == "cuda":  # comparisons of dtypes and of devices are about the inputs, not about TensorFloat-32
        torch.backends.cuda.matmul.allow_tf32 = False

    rows: list[Any] = []
    if options.precision:
        head, titles = setting(device, "float32, bfloat16, float16", command), CHANGE_TITLES
        sizes = [(n, k) for n in options.tokens for k in options.keep if k < n]
        found: list[Iterator[Change]] = [
            changes_at_random(texts, Shape(), device, n, k, options.draws) for n, k in sizes
        ]
        if options.cases:
            found.insert(0, changes_in(importlib.import_module(options.cases).cases()))
        stream = ((row, change_cells(row)) for part in found for row in part)
    else:
        head, titles = setting(device, options.dtype, command), COST_TITLES
        maker = Maker(Shape(), device, DTYPES[options.dtype])
        timed = costs(texts, maker, options.tokens, options.keep, options.batch, options.repeats, options.seconds)
        stream = ((row, cost_cells(row)) for row in timed)
    print(markdown(head, titles, []), end="", flush=True)
    cells = []
    for row, line in stream:
        rows.append(row)
        cells.append(line)
        print(f"| {' | '.join(line)} |", flush=True)
        if options.out:
            data = {"setting": head, "rows": [dataclasses.asdict(r) for r in rows]}
            write(Path(options.out).with_suffix(".json"), json.dumps(data, indent=2) + "\n")
            write(Path(options.out).with_suffix(".md"), markdown(head, titles, cells))


if __name__ == "__main__":
    main()
