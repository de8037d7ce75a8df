"""What a plan must show on a prompt before it is timed there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vlprune
from vlprune.errors import PruningError
from vlprune.eval.shapes import Prompt
from vlprune.eval.timing import Marks, prefill
from vlprune.releases import CACHE

STEADY = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # cuDNN's decode step is not
Logits = tuple[Tensor, Tensor]  # of the prompt's last token and of the first decode step


@dataclass(eq=False)
class Gate:
    """Plans are compared with the unpruned model, which runs the prompt three times for all of them."""

    model: Any  # unwrapped
    prompt: Prompt
    passed: set[Any] = field(default_factory=set)  # kinds of plans that change nothing where they keep everything

    @torch.inference_mode()
    def check(self, plan: vlprune.Plan) -> vlprune.Trace:
        """The trace of a prefill with `plan`. PruningError says what is wrong with the plan on this prompt.

        keep=1.0 must give the unpruned model's logits bit for bit. The decode step runs without cuDNN's attention, which
        PyTorch prefers on recent GPUs: for a single query it does not give the same bits twice. Should unpruned runs
        differ all the same, the logits may be twice as far from theirs as they are from each other.
        """
        self._check_everything_kept(plan)
        with vlprune.pruning(self.model, plan):
            cache = prefill(self.model, self.prompt.inputs, Marks(self.model.device))[CACHE]
            trace = vlprune.trace(self.model)
        check_counts(plan, trace)
        check_cache(cache, trace)
        return trace

    def _check_everything_kept(self, plan: vlprune.Plan) -> None:
        """Where nothing goes no rule is asked, so one run stands for all rules that look at the same things."""
        kind = plan.positions, *((str(s.stage), s.pruner.needs, _in_between(s.pruner)) for s in plan.steps)
        if kind in self.passed:
            return
        every = tuple(vlprune.Step(s.pruner, s.stage, vlprune.Budget(1.0, s.budget.scope)) for s in plan.steps)
        with vlprune.pruning(self.model, vlprune.Plan(every, plan.positions)):
            found = self._logits()
        unpruned = self._unpruned
        for i, where in enumerate(("the prompt's", "the next step's")):
            change = min(_apart(run[i], found[i]) for run in unpruned)
            spread = max(_apart(a[i], b[i]) for a in unpruned for b in unpruned)
            if change > 2 * spread:
                raise PruningError(
                    f"keep=1.0 changes {where} logits by {change:.3g}; unpruned runs differ by {spread:.3g}"
                )
        self.passed.add(kind)

    @cached_property
    def _unpruned(self) -> list[Logits]:
        return [self._logits() for _ in range(3)]

    def _logits(self) -> Logits:
        out = prefill(self.model, self.prompt.inputs, Marks(self.model.device))
        with sdpa_kernel(STEADY):
            return out.logits, decode(self.model, out, 1)


def decode(model: Any, out: Any, steps: int) -> Tensor:
    """Greedy steps after a prefill of rows without padding, which need no mask; the last logits."""
    cache = out[CACHE]
    logits: Tensor = out.logits
    for _ in range(steps):
        ids = logits[:, -1].argmax(-1, keepdim=True)
        logits = model(input_ids=ids, use_cache=True, **{CACHE: cache}).logits
    return logits


def _in_between(pruner: vlprune.Pruner) -> str:
    """The rule's name if it is asked between layers, even where it is to keep everything."""
    return pruner.name if isinstance(pruner, vlprune.EncoderPruner | vlprune.DecodePruner) else ""


def _apart(a: Tensor, b: Tensor) -> float:
    return 0.0 if torch.equal(a, b) else float((a.float() - b.float()).abs().max())


def check_counts(plan: vlprune.Plan, trace: vlprune.Trace) -> None:
    """Every item of every stage keeps what its budget says, or fewer where the rule decides itself."""
    sizes = {(p.row, p.picture): p.tokens for p in trace.pictures}
    steps = [s for s in plan.steps if s.stage.name != "decode"]  # nothing is removed there
    for step, stage in zip(steps, trace.stages, strict=True):
        if getattr(step.pruner, "tokens", "visual") == "all":
            continue  # its budget is one of all tokens, text included; `check_cache` counts them
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
    text = trace.text_tokens or [trace.text] * len(trace.layer_tokens)
    for number, (layer, visual, words) in enumerate(zip(cache.layers, trace.layer_tokens, text, strict=True)):
        rows, slots = layer.keys.shape[0], layer.keys.shape[2]
        claimed = visual + words
        longest = math.ceil(claimed / rows)
        if slots < longest or (slots > longest and len(set(_kept_by_row(trace))) == 1):
            raise PruningError(f"layer {number} caches {rows} x {slots} tokens; the trace claims {claimed} in all")


def _kept_by_row(trace: vlprune.Trace) -> list[int]:
    kept = [0] * trace.rows
    for item in trace.stages[-1].items if trace.stages else []:
        kept[item.row] += item.kept
    return kept
