"""What replaying saves where launching kernels takes longer than running them: prefill and decode at batch 1.

    python -m vlprune.eval.fast llava-1.5-7b --plan uniform:keep=32 --visual 2880 --new 32

Three rows, measured in turn: the unpruned model, the pruned one, and the pruned one replayed (`vlprune.replay`). Nothing
is timed before the replay's logits agreed with those of the pruned model at every step.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

import vlprune
from vlprune.errors import PruningError, SpecError
from vlprune.eval.files import output_folder, write
from vlprune.eval.gate import decode
from vlprune.eval.report import markdown, setting
from vlprune.eval.shapes import SHAPES, Prompt, load, random_prompt
from vlprune.eval.timing import Marks, Spread, prefill, synchronise
from vlprune.releases import CACHE

NEAR = {
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 8e-2,
}  # |a - b| / |b| of logits, other kernels, same sums
TITLES = ("", "prefill (p20-p80)", "speed-up", "decode step (p20-p80)", "speed-up")
Times = dict[str, Spread]  # "prefill", "decode", milliseconds


def agreement(model: Any, fast: Any, prompt: Prompt, new: int) -> dict[str, float]:
    """Compare a replay with the wrapped model, step by step on the replay's tokens.

    Returns "error", the largest relative distance of the logits, and "equal", the share of steps whose likeliest token is
    the same. Raises PruningError where the distance is more than kernels of this precision explain.
    """
    errors, equal = [], 0
    with torch.inference_mode():
        out = prefill(model, prompt.inputs, Marks(model.device))
        mine = fast.prefill(prompt.inputs)
        for _ in range(new):
            theirs = out.logits[:, -1]
            errors.append(float((mine.float() - theirs.float()).norm() / theirs.float().norm()))
            equal += int(torch.equal(mine.argmax(-1), theirs.argmax(-1)))
            token: Tensor = fast.token.clone()
            out = model(input_ids=token, use_cache=True, **{CACHE: out[CACHE]})
            mine = fast.step()
    worst = max(errors)
    if worst > NEAR[model.dtype]:
        raise PruningError(f"the replay's logits are {worst:.3g} of their size away from the pruned model's")
    return {"error": worst, "equal": equal / new}


def fast_times(
    model: Any, plan: str, prompt: Prompt, new: int, repeats: int, warmup: int
) -> tuple[dict[str, Times], Any]:
    """Times of the three ways by name, and how far the replay agrees with the wrapped model."""
    device = model.device

    def timed(first: Callable[[], Any], then: Callable[[Any], Any]) -> dict[str, float]:
        marks = Marks(device)
        synchronise(device)
        marks.set("start")
        out = first()
        marks.set("prefilled")
        synchronise(device)
        marks.set("decode")
        then(out)
        marks.set("end")
        return {
            "prefill": marks.milliseconds("start", "prefilled"),
            "decode": marks.milliseconds("decode", "end") / new,
        }

    def plain() -> dict[str, float]:
        return timed(lambda: prefill(model, prompt.inputs, Marks(device)), lambda out: decode(model, out, new))

    def steps(_: Any) -> None:
        for _ in range(new):
            fast.step()

    samples: dict[str, list[dict[str, float]]] = {"unpruned": [], str(plan): [], f"{plan}, replayed": []}
    ways = list(samples)
    with torch.inference_mode():
        with vlprune.pruning(model, plan):
            fast = vlprune.replay(model, prompt.inputs, new + 1)
            agrees = agreement(model, fast, prompt, new)
        for turn in range(-warmup, repeats):
            found = [plain()]
            with vlprune.pruning(model, plan):
                found.append(plain())
                found.append(timed(lambda: fast.prefill(prompt.inputs), steps))
            if turn >= 0:
                for way, sample in zip(ways, found, strict=True):
                    samples[way].append(sample)
    return {way: {k: Spread.of([s[k] for s in runs]) for k in runs[0]} for way, runs in samples.items()}, agrees


def main(arguments: Sequence[str] | None = None) -> None:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="python -m vlprune.eval.fast", description=lines[0])
    parser.add_argument("model", help=f"a checkpoint, or a shape with random weights: {', '.join(SHAPES)}")
    parser.add_argument("--plan", required=True, help="such as uniform:keep=32")
    parser.add_argument("--visual", type=int, default=2880)
    parser.add_argument("--text", type=int, default=64)
    parser.add_argument("--new", type=int, default=32, help="decode steps")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--output", help="folder for fast.json and fast.md")
    given = parser.parse_args(arguments)
    if min(given.visual, given.text, given.new, given.repeats) < 1 or given.warmup < 0:
        raise SpecError("visual, text, new and repeats are at least 1, warmup at least 0")
    folder = None if given.output is None else output_folder(given.output)
    device = torch.device(given.device)
    model = load(given.model, getattr(torch, given.dtype), "sdpa", device).model
    prompt = random_prompt(model, 1, given.visual, given.text)
    times, agrees = fast_times(model, given.plan, prompt, given.new, given.repeats, given.warmup)
    head = setting(device, given.dtype, "python -m vlprune.eval.fast " + " ".join(arguments or sys.argv[1:]))
    head |= {"visual tokens": prompt.visual, "text tokens": prompt.text, "batch": 1, "repeats": given.repeats,
             "replay against the pruned model": f"logits within {agrees['error']:.2%}, {agrees['equal']:.0%} of tokens equal"}  # fmt: skip
    base = times["unpruned"]
    table = [[way, *(cell for part in ("prefill", "decode") for cell in _cells(t[part], base[part]))]
             for way, t in times.items()]  # fmt: skip
    text = markdown(head, TITLES, table)
    print(text)
    if folder is not None:
        data = {way: {part: asdict(s) for part, s in t.items()} for way, t in times.items()}
        write(folder / "fast.json", json.dumps({"setting": head, "agreement": agrees, "times": data}, indent=2) + "\n")
        write(folder / "fast.md", text)


def _cells(time: Spread, base: Spread) -> tuple[str, str]:
    return f"{time.median:.2f} ({time.p20:.2f}-{time.p80:.2f})", f"{base.median / time.median:.2f} x"


if __name__ == "__main__":
    main()
