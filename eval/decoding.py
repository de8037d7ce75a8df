"""What a decode step costs when a few layers look at the whole page and the others at K of its tokens.

    python -m vlprune.eval.decoding --visual 4096 8192 16384 32768 --batch 1 4 8 16 --keep 0.05
    python -m vlprune.eval.decoding --end-to-end --visual 16384 --batch 1

The first form times the attention of all layers alone, at the shape of Qwen2.5-VL-7B: dense with torch's SDPA and with our
kernel over all rows, and FastOCR's step, in which focal layers attend densely and rank, and the others read K tokens and
the text. "Device" is the replay of a CUDA graph, "eager" includes what Python and the launches cost. The second form
decodes with a model of random weights, everything included: eager, as the library runs it, with a cache that is copied to
grow by a token; and on the device, with one that is written in place. Eager steps go without cuDNN's attention, with
which they take tens of milliseconds longer (it seems to plan for every new length); on the device the faster of both counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache, DynamicLayer

import vlprune
from vlprune.api import adapter_of
from vlprune.errors import PruningError
from vlprune.eval.files import output_folder, write
from vlprune.eval.report import markdown, setting
from vlprune.eval.shapes import QWEN_7B, Prompt, load, random_prompt
from vlprune.eval.timing import Marks, Spread, measure, prefill, synchronise
from vlprune.ops import attention_rows, indexed_decode
from vlprune.pruners.fastocr import FastOCR
from vlprune.releases import CACHE

MODEL = "qwen2.5-vl-7b"
TEXT = 64  # text tokens of a prompt: a quarter before the picture
TOLERANCE = 2e-2  # relative error of a bfloat16 attention output against the same rows by masking; float32: far less
REPEATS, WARMUP = 15, 2
STEPS = 32  # decode steps of the second form
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Shape:
    layers: int
    heads: int
    kv_heads: int
    width: int

    @staticmethod
    def of(config: dict[str, Any]) -> Shape:
        heads = config["num_attention_heads"]
        width = config["hidden_size"] // heads
        return Shape(config["num_hidden_layers"], heads, config["num_key_value_heads"], width)


class Attention:
    """Queries, keys and values of one decode step in all layers, of random numbers."""

    def __init__(
        self, shape: Shape, batch: int, visual: int, keep: float, focal: Sequence[int], dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        def draw(heads: int, length: int) -> list[Tensor]:
            size = (batch, heads, length, shape.width)
            return [torch.randn(size, dtype=dtype, device=device) for _ in range(shape.layers)]

        self.focal, self.scale = frozenset(focal), shape.width**-0.5
        self.rows = visual + TEXT
        self.page = (TEXT // 4, TEXT // 4 + visual)
        self.keep = vlprune.Budget(keep).count(visual)
        self.queries = draw(shape.heads, 1)
        self.keys, self.values = draw(shape.kv_heads, self.rows), draw(shape.kv_heads, self.rows)
        self.choice = self.rank(0)  # of the step before

    def layer(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.queries[i], self.keys[i], self.values[i]

    def sdpa(self, i: int, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.layer(i)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=True)

    def rank(self, i: int) -> Tensor:
        """[B, K] cache rows of the tokens that layer i attends to most."""
        paid = attention_rows(self.queries[i], self.keys[i], scale=self.scale, heads="mean", columns=self.page)
        return vlprune.top(paid[:, 0], self.keep) + self.page[0]

    def some(self, i: int, choice: Tensor) -> Tensor:
        q, k, v = self.layer(i)
        before, after = (0, self.page[0]), (self.page[1], self.rows)
        return indexed_decode(q, k, v, before, choice, after, scale=self.scale)[0]

    def dense(self) -> list[Tensor]:
        return [self.sdpa(i) for i in range(len(self.keys))]

    def dense_by_kernel(self) -> list[Tensor]:
        """All rows through the kernel of the pruned layers."""
        parts = (self.layer(i) for i in range(len(self.keys)))
        return [indexed_decode(q, k, v, (0, self.rows), None, None, scale=self.scale)[0] for q, k, v in parts]

    def fastocr(self) -> list[Tensor]:
        choice, out = self.choice, []
        for i in range(len(self.keys)):
            if i in self.focal:
                out.append(self.sdpa(i))
                choice = self.rank(i)
            else:
                out.append(self.some(i, choice))
        return out

    def check(self) -> None:
        """Refuse to time a pruned layer that is not dense attention over the same rows."""
        layer = next(i for i in range(len(self.keys)) if i not in self.focal)
        mask = torch.ones(len(self.choice), self.rows, dtype=torch.bool, device=self.choice.device)
        mask[:, self.page[0] : self.page[1]] = False
        mask.scatter_(1, self.choice, True)
        wanted, found = self.sdpa(layer, mask[:, None, None]).float(), self.some(layer, self.choice).float()
        error = float((found - wanted).norm() / wanted.norm())
        if not error <= TOLERANCE:  # NaN fails too
            raise PruningError(f"a pruned layer differs from masked attention by {error:.1e}; nothing was timed")


@dataclass(frozen=True)
class Cell:
    """Milliseconds a decode step; `device` and `eager` hold "dense", "dense_by_kernel" and "fastocr"."""

    batch: int
    visual: int
    keep: int
    cache_bytes: int  # keys and values of all layers
    device: dict[str, Spread]
    eager: dict[str, Spread]

    @property
    def speedup(self) -> float:
        """Of the device time, over the faster of both dense forms."""
        best = min(self.device["dense"].median, self.device["dense_by_kernel"].median)
        return best / self.device["fastocr"].median


def attention(
    batch: Sequence[int],
    visual: Sequence[int],
    keep: float = 0.05,
    shape: Shape | None = None,
    focal: Sequence[int] = (),
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = REPEATS,
) -> list[Cell]:
    """Attention of one decode step over all layers.

    Args:
        focal: default: FastOCR's own for this number of layers.
        device: on a CPU nothing can be captured, and both times are eager ones.
    Raises:
        PruningError: a pruned layer is wrong.
    """
    shape, place = shape or Shape.of(QWEN_7B), torch.device(device)
    focal = tuple(focal) or FastOCR().focal(shape.layers)
    cells = []
    for b, n in itertools.product(batch, visual):
        step = Attention(shape, b, n, keep, focal, dtype, place)
        step.check()
        calls = {"dense": step.dense, "dense_by_kernel": step.dense_by_kernel, "fastocr": step.fastocr}
        eager = {name: _clock(call, place, repeats) for name, call in calls.items()}
        captured = {name: _captured(call) for name, call in calls.items()} if place.type == "cuda" else calls
        device_times = {name: _clock(call, place, repeats) for name, call in captured.items()}
        held = sum(t.numel() * t.element_size() for t in (*step.keys, *step.values))
        cells.append(Cell(b, n, step.keep, held, device_times, eager))
        del step, calls, captured
        _release(place)
    return cells


def _captured(call: Callable[[], Any]) -> Callable[[], Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _clock(call: Callable[[], Any], device: torch.device, repeats: int) -> Spread:
    def run() -> dict[str, float]:
        synchronise(device)
        marks = Marks(device)
        marks.set("start")
        call()
        marks.set("end")
        return {"time": marks.milliseconds("start", "end")}

    return measure(run, repeats, WARMUP)["time"]


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- a whole model


@dataclass(frozen=True)
class Run:
    """Decoding of one prompt size, greedy. Milliseconds a step, the whole model and the whole batch."""

    plan: str
    batch: int
    visual: int
    eager: Spread  # the library's own cache, which is copied to grow
    device: Spread  # one step again and again as a CUDA graph, over a cache that is written in place
    weight_bytes: int  # read once a step
    cache_bytes: int  # keys and values that a dense step reads

    def tokens_per_second(self, step: Spread) -> float:
        return self.batch / step.median * 1e3


class Full(DynamicLayer):
    """What a layer holds when a step has been taken, the new token's slot written by every step anew.

    So a static cache looks that is just full: nothing is copied, and no mask has to hide what is empty.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = (F.pad(t, (0, 0, 0, 1)) for t in (layer.keys, layer.values))
        self.fixation = getattr(layer, "fixation", None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2]) - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(self.keys.shape[2]), 0


@torch.inference_mode()
def end_to_end(model: Any, prompt: Prompt, plan: str | None, steps: int = STEPS) -> Run:
    """Prefill once, then time `steps` decode steps one by one, and the first of them as often on the device alone.

    Raises:
        PruningError: the two forms of the first step do not agree.
    """
    if plan is not None:
        with vlprune.pruning(model, plan):
            return dataclasses.replace(end_to_end(model, prompt, None, steps), plan=plan)
    device = model.device
    out = prefill(model, prompt.inputs, Marks(device))
    cache, ids = out[CACHE], out.logits[:, -1].argmax(-1, keepdim=True)
    full = Cache(layers=[Full(layer) for layer in cache.layers])
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    weights = sum(p.numel() * p.element_size() for p in adapter_of(model).text.parameters())
    weights += model.lm_head.weight.numel() * model.lm_head.weight.element_size()
    length = cache.get_seq_length()
    kinds = getattr(adapter_of(model).text.config, "layer_types", None)
    # none is needed, and the library would build some while a graph is captured
    masks: Any = dict.fromkeys(kinds) if kinds else None

    def step(ids: Tensor, at: Tensor, cache: Any) -> Tensor:
        out = model(input_ids=ids, position_ids=at, attention_mask=masks, use_cache=True, **{CACHE: cache})
        return out.logits  # type: ignore[no-any-return]

    first, at = ids, torch.full_like(ids, length)
    times: list[float] = []
    for i in range(WARMUP + steps):
        synchronise(device)
        marks = Marks(device)
        marks.set("start")
        with sdpa_kernel(WITHOUT_PLANS):
            logits = step(ids, at + i, cache)
        marks.set("end")
        times.append(marks.milliseconds("start", "end"))
        if i == 0:
            wanted = logits.float()
        ids = logits[:, -1].argmax(-1, keepdim=True)
    del cache, out
    with sdpa_kernel(WITHOUT_PLANS):
        found = step(first, at, full).float()
    error = float((found - wanted).norm() / wanted.norm())
    if not error <= TOLERANCE:  # NaN fails too
        raise PruningError(f"a step over a cache written in place differs by {error:.1e}; its time would mean nothing")

    def again() -> Tensor:
        return step(first, at, full)

    forms = []
    for kernels in (WITHOUT_PLANS, [*WITHOUT_PLANS, SDPBackend.CUDNN_ATTENTION]):
        with sdpa_kernel(kernels):
            again()  # sets up what a capture may not
            forms.append(_clock(_captured(again) if device.type == "cuda" else again, device, steps))
    best = min(forms, key=lambda form: form.median)
    return Run("dense", prompt.batch, prompt.visual, Spread.of(times[WARMUP:]), best, weights, held)


# ---- showing


def attention_table(cells: Sequence[Cell], head: dict[str, Any]) -> str:
    def ms(x: Spread) -> str:
        return f"{x.median:.3f}"

    titles = ["batch x visual tokens", "K", "cache GB", "dense SDPA, device", "dense, our kernel", "fastocr", "speed-up",
              "dense SDPA, eager", "fastocr, eager"]  # fmt: skip
    rows = [
        [f"{c.batch} x {c.visual}", str(c.keep), f"{c.cache_bytes / 1e9:.2f}", ms(c.device["dense"]),
         ms(c.device["dense_by_kernel"]), ms(c.device["fastocr"]), f"{c.speedup:.2f} x", ms(c.eager["dense"]),
         ms(c.eager["fastocr"])]
        for c in cells
    ]  # fmt: skip
    return markdown(head, titles, rows)


def run_table(runs: Sequence[Run], head: dict[str, Any]) -> str:
    def ms(x: Spread) -> str:
        return f"{x.median:.1f} ({x.p20:.1f} - {x.p80:.1f})"

    titles = ["plan", "batch x visual tokens", "weights GB", "cache GB", "device: ms a step (p20 - p80)",
              "tokens a second", "eager: ms a step", "tokens a second"]  # fmt: skip
    rows = [
        [r.plan, f"{r.batch} x {r.visual}", f"{r.weight_bytes / 1e9:.1f}", f"{r.cache_bytes / 1e9:.2f}", ms(r.device),
         f"{r.tokens_per_second(r.device):.1f}", ms(r.eager), f"{r.tokens_per_second(r.eager):.1f}"]
        for r in runs
    ]  # fmt: skip
    return markdown(head, titles, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="python -m vlprune.eval.decoding", description=lines[0])
    parser.add_argument("--visual", nargs="+", type=int, default=[4096, 8192, 16384, 32768])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--keep", type=float, default=0.05)
    parser.add_argument("--end-to-end", action="store_true", help="a whole model of random weights")
    parser.add_argument("--model", default=MODEL, help="for --end-to-end: as in vlprune.eval.bench")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", help="folder for a table and its numbers")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    place = torch.device(options.device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    head = setting(place, str(dtype).removeprefix("torch."), " ".join(["python -m vlprune.eval.decoding", *given]))
    name = "end_to_end" if options.end_to_end else "attention"
    if options.end_to_end:
        model = load(options.model, dtype, "sdpa", place).model
        found: list[Any] = []
        for b, n in itertools.product(options.batch, options.visual):
            prompt = random_prompt(model, b, n, TEXT)
            found += [end_to_end(model, prompt, plan) for plan in (None, f"fastocr:keep={options.keep}")]
            _release(place)
        text = run_table(found, head)
    else:
        found = attention(options.batch, options.visual, options.keep, device=options.device, dtype=dtype)
        text = attention_table(found, head)
    print(text)
    if options.output:
        folder = output_folder(options.output)
        numbers = [dataclasses.asdict(x) for x in found]
        write(folder / f"{name}.json", json.dumps({"setting": head, "rows": numbers}, indent=1) + "\n")
        write(folder / f"{name}.md", text)


if __name__ == "__main__":
    main()
