"""What `vlprune show` makes: one question about one picture with all tokens and with few, and a page that shows what stayed."""

from __future__ import annotations

from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from rich.console import Console

import vlprune
from vlprune.draw import style
from vlprune.eval.demo import Answer, ask
from vlprune.eval.files import reporting, write
from vlprune.eval.html import figure, page, table

PAGES = (".html", ".htm")
LONGEST = 192  # tokens of an answer: a short page of text


def key(colour: style.Colour, rim: style.Colour = style.RULE) -> str:
    """A small square of a colour, in running text."""
    return f'<i class="key" style="background: rgb{colour}; border-color: rgb{rim}"></i>'


DRAWN = {
    "kept": f"<b>Kept</b> {{kept}} of {{visual}} visual tokens{key(style.FADED)} dropped",
    "score": f"<b>Score</b>{key(style.SCALE[0])} low{key(style.SCALE[4])}{key(style.SCALE[-1])} high; kept tokens have a white rim",
    "merge": "<b>Merge</b> dropped tokens in the colour of the rim of the token they were merged into",
}


def show(model: Any, processor: Any, image: Image.Image, question: str, plan: str, out: Path, console: Console) -> None:
    """Ask twice, print answers and costs, write a page or, if `out` has another ending, the picture of kept tokens."""
    full = ask(model, processor, image, question, longest=LONGEST)
    pruned = ask(model, processor, image, question, plan, LONGEST)
    assert pruned.trace is not None
    console.print(f"all tokens : {full.text}\n{plan} : {pruned.text}\n", markup=False)
    console.print(pruned.trace.table(), highlight=False, markup=False)
    if out.suffix.lower() in PAGES:
        write(out, page(f"vlprune: {question}", body(image, question, full, pruned, processor)))
    else:
        with reporting(out):
            pruned.trace.draw(image, processor=processor).save(out)
    console.print(f"kept tokens drawn to {out}", markup=False)


def body(image: Image.Image, question: str, full: Answer, pruned: Answer, processor: Any) -> str:
    """HTML: the answers, what they cost, and the pictures."""
    trace = pruned.trace
    assert trace is not None
    same = full.text == pruned.text
    verdict = f'<dd class="{"right" if same else "wrong"}">{escape(pruned.text)} <small>({"the same" if same else "another"} answer)</small></dd>'
    answers = (f"<dl><dt>question</dt><dd>{escape(question)}</dd><dt>all {trace.visual} visual tokens</dt><dd>{escape(full.text)}</dd>"
               f"<dt>{escape(trace.plan)}</dt>{verdict}</dl>")  # fmt: skip
    parts = ["<h1>What was kept</h1>",
             f'<p class="setting">{escape(trace.plan)} on {escape(trace.family)}, vlprune {vlprune.__version__}</p>',
             answers, f'<div class="wall">{"".join(pictures(image, trace, processor))}</div>',
             "<h2>What it costs</h2>", costs(trace)]  # fmt: skip
    if len(trace.stages) > 1:
        stages = trace.draw(image, stage="all", processor=processor)
        parts += ["<h2>Stage by stage</h2>", figure(stages, "", "kept tokens after every stage")]
    return "\n".join(parts + (reading(image, pruned, processor) if trace.looks else []))


def pictures(image: Image.Image, trace: vlprune.Trace, processor: Any) -> list[str]:
    """The picture itself, what was kept of it, and whatever else the rule has left to see."""
    out = [figure(image, "<b>The picture</b>", "the picture")]
    for show, caption in DRAWN.items():
        field = {"score": "scores", "merge": "merge"}.get(show)
        ran = [item for stage in trace.stages for item in stage.items]
        if ran and (field is None or any(getattr(item, field) is not None for item in ran)):
            drawn = trace.draw(image, show, processor=processor)
            told = caption.format(kept=trace.kept, visual=trace.visual)
            out.append(figure(drawn, told, f"{show}, on the picture", sheet=drawn.size != image.size))
    return out


def costs(trace: vlprune.Trace) -> str:
    rows = [("all tokens", str(trace.visual), f"{trace.visual:.0f}", f"{trace.kv_bytes_unpruned / 2**20:.2f}", "")]
    choosing = f"{sum(stage.milliseconds for stage in trace.stages):.2f}" if trace.stages else ""
    rows.append((trace.plan, str(trace.kept), f"{trace.layer_average:.0f}", f"{trace.kv_bytes / 2**20:.2f}", choosing))
    header = ("plan", "visual tokens, last layer", "average over layers", "KV cache, MiB", "choosing, ms")
    return table(header, rows, base=1)


def reading(image: Image.Image, pruned: Answer, processor: Any) -> list[str]:
    """The way of a per-step pruner over the page."""
    trace = pruned.trace
    assert trace is not None
    ways = [trace.gazes(run) for run in range(len(trace.pictures))]
    few = sum(sum(len(gaze.kept) for gaze in way.values()) / max(1, len(way)) for way in ways)
    frames = trace.focus(image, pruned.tokens, processor=processor)
    with TemporaryDirectory() as folder:
        film = figure(vlprune.draw.gif(frames, Path(folder) / "focus.gif"), "The line follows the token looked at most.",
                      "a focus moving over the page")  # fmt: skip
    out = ["<h2>Step by step</h2>", f"<p>Nothing leaves the cache: each step reads {few:.0f} of {trace.visual} visual tokens "
           "outside the layers that choose them.</p>", film]  # fmt: skip
    if pruned.text and all(gaze.scores for way in ways for gaze in way.values()):
        maps = trace.words(image, pruned.tokens, processor=processor)
        told = "The attention paid to the page while each word was written."
        out += ["<h2>Word by word</h2>", figure(maps, told, "a heat map for each word")]
    return out
