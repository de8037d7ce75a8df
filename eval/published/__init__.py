r"""Scores that papers and their project pages print for token pruning, and what to know before comparing with them.

The figures are in `results.csv`, one row per method and budget; `tables.json` says where each table was read. None of
them was measured here. Compare within one table first: tables differ in their unpruned rows.

One row of a paper on one GPU; weights and data sets are downloaded on first use:

    python -m vlprune.eval.compare llava-hf/llava-1.5-7b-hf --plans divprune --keep 64 \
        --tasks gqa,pope,scienceqa_img,textvqa_val --items 0
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vlprune.plan import Plan

FOLDER = Path(__file__).parent
UNPRUNED = "Unpruned"


@dataclass(frozen=True)
class Source:
    """A published table. `read_from`: "author" (page or README of its authors) or "paper" (text of the paper)."""

    id: str
    model: str
    tokens: int  # visual tokens of the unpruned model
    source: str
    url: str
    read_from: str
    mme: str  # "perception", or "both" for perception + cognition
    printed_over: int | None  # benchmarks behind the printed average, where the source says so


@dataclass(frozen=True)
class Result:
    """One row of one table; scores as printed."""

    source: Source
    method: str
    tokens: int
    note: str
    printed: float | None  # average relative to the unpruned row in per cent, over the source's own benchmarks
    scores: dict[str, float]

    def relative(self, benchmarks: Sequence[str]) -> float | None:
        """Mean of score / unpruned score of the same table in per cent, or None where a benchmark is missing."""
        base = unpruned(self.source.id)
        if any(b not in self.scores or b not in base.scores for b in benchmarks):
            return None
        return 100 * sum(self.scores[b] / base.scores[b] for b in benchmarks) / len(benchmarks)


@dataclass(frozen=True)
class Benchmark:
    """How an lmms-eval task corresponds to a column of the tables; `scale` brings our number to theirs."""

    column: str
    metric: str
    scale: float
    trap: str = ""


BENCHMARKS = {
    "gqa": Benchmark("GQA", "exact_match", 100),
    "pope": Benchmark("POPE", "pope_f1_score", 100, "most tables print F1, some efficiency tables accuracy"),
    "mme": Benchmark("MME", "mme_perception_score", 1, "some tables add the cognition score (unpruned near 1860)"),
    "scienceqa_img": Benchmark("SQA", "exact_match", 100, "barely needs the picture: 91 % survive without any"),
    "textvqa_val": Benchmark(
        "TextVQA", "exact_match", 100,
        "the papers' prompts hold OCR tokens (unpruned 58.2); lmms-eval's do not, and scores are then far lower",
    ),
    "vqav2_val": Benchmark("VQAv2", "exact_match", 100, "the papers use test-dev, which has no public answers"),
    "vizwiz_vqa_val": Benchmark("VizWiz", "exact_match", 100, "most papers use the test server; validation is higher"),
    "mmbench_en_dev": Benchmark("MMB", "gpt_eval_score", 1, "needs a judge; exact matching scores lower"),
    "mmbench_cn_dev": Benchmark("MMB-CN", "gpt_eval_score", 1, "needs a judge; exact matching scores lower"),
    "chartqa": Benchmark("ChartQA", "relaxed_overall", 100),
    "ai2d": Benchmark("AI2D", "exact_match", 100),
    "ocrbench": Benchmark("OCRBench", "ocrbench_accuracy", 1000),
}  # fmt: skip

NAMES = {
    "pyramiddrop": "pyramiddrop",
    "pdrop": "pyramiddrop",
    "prumerge+": "prumerge",
}  # spellings that differ from ours

TRAPS = {
    "average": "Methods inside the language model are quoted by tokens per layer on average, the others by tokens that "
    "enter it. FastV at layer 2 reaches an average of 64 of 576 only with 29 tokens afterwards.",
    "fastv": "FastV's numbers differ by table at one budget (GQA 52.7 or 57.1 at 192 tokens, 49.6 or 54.1 at 128): say "
    "the layer, and whether the count is after it or an average.",
    "visionzip": "VisionZip's 64 tokens are one CLS token, 53 patches and 10 merged ones.",
    "dart": "DART keeps its image pivots on top of the budget: 132 tokens for 128, 68 for 64.",
    "cdpruner": "CDPruner on Qwen2.5-VL: re-runs by others score far below its own page, which has no Qwen code.",
    "anyres": "LLaVA-NeXT with 2880 tokens means that padding was not removed; else the count depends on the picture.",
}


@cache
def sources() -> dict[str, Source]:
    """The tables by their id."""
    return {k: Source(id=k, **v) for k, v in json.loads((FOLDER / "tables.json").read_text()).items()}


@cache
def results() -> tuple[Result, ...]:
    """All rows of all tables."""
    rows = []
    with open(FOLDER / "results.csv", newline="") as f:
        for line in csv.DictReader(f):
            source = sources()[line.pop("table")]
            method, tokens, note, printed = (line.pop(k) for k in ("method", "tokens", "note", "printed"))
            scores = {column: float(value) for column, value in line.items() if value}
            rows.append(Result(source, method, int(tokens), note, float(printed) if printed else None, scores))
    return tuple(rows)


def unpruned(table: str) -> Result:
    """The upper bound row of a table."""
    return next(r for r in results() if r.source.id == table and r.method == UNPRUNED)


def lookup(model: str, method: str, tokens: int | None = None) -> list[Result]:
    """Rows for a model ("LLaVA-1.5-7B"), a pruner's name as registered here or as printed, and a budget in tokens."""
    wanted = _name(method)
    return [r for r in results() if r.source.model == model and _name(r.method) == wanted
            and tokens in (None, r.tokens)]  # fmt: skip


def beside(model: str, plan: Plan, layers: int) -> list[Result]:
    """Published rows a plan may be compared with: its only step's pruner, at its count or at its tokens per layer."""
    if len(plan.steps) != 1:
        return []
    step = plan.steps[0]
    total = next((s.tokens for s in sources().values() if s.model == model), None)
    if total is None:
        return []
    inside = step.stage.layer not in (0, None)
    tokens = round(plan.layer_average(total, layers)) if inside else step.budget.count(total)
    return lookup(model, step.pruner.name, tokens)


def traps(method: str, model: str) -> list[str]:
    """What to know before comparing this method's numbers on this model."""
    inside = _name(method) in ("fastv", "pyramiddrop", "sparsevlm", "entropyprune")
    keys = ["average"] if inside else []
    keys += [_name(method)] if _name(method) in TRAPS else []
    keys += ["anyres"] if "NeXT" in model else []
    return [TRAPS[k] for k in keys]


def recognise(config: Any) -> str | None:
    """The tables' name of a checkpoint, by its shape: fine-tuned copies are recognised too."""
    text = config.get_text_config()
    shape = (config.model_type, text.model_type, text.hidden_size, text.num_hidden_layers)
    return {
        ("llava", "llama", 4096, 32): "LLaVA-1.5-7B",
        ("llava_next", "llama", 4096, 32): "LLaVA-NeXT-7B",
        ("qwen2_5_vl", "qwen2_5_vl_text", 3584, 28): "Qwen2.5-VL-7B",
    }.get(shape)


def _name(method: str) -> str:
    plain = method.casefold().replace("_", "").replace("-", "")
    return NAMES.get(plain, plain)
