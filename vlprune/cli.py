"""The command line: list, show, demo, bench, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vlprune.errors import VlpruneError

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Prune the visual tokens of vision-language models.",
                  pretty_exceptions_enable=False)  # fmt: skip
console = Console()

Model = Annotated[str, typer.Option(help="an embedded model's name, a checkpoint folder or a hub repository")]
Out = Annotated[Path, typer.Option(help="folder for what is written")]


def load(model: str, dtype: str = "auto") -> tuple[Any, Any]:
    """(model, processor) of an embedded model's name, a folder or a hub repository."""
    import torch
    from transformers import AutoModelForImageTextToText

    from vlprune.models import embedded
    from vlprune.processors import load_processor

    source: str | Path = model if "/" in model or Path(model).is_dir() else embedded(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind: Any = (torch.float32 if device == "cpu" else torch.bfloat16) if dtype == "auto" else getattr(torch, dtype)
    loaded = AutoModelForImageTextToText.from_pretrained(source, dtype=kind)
    return loaded.to(device).eval(), load_processor(source)


@app.command("list")
def list_pruners(
    model: Annotated[str | None, typer.Option(help="only what fits this family, such as llava or qwen2_5_vl")] = None,
) -> None:
    """Every pruner: where it acts, what it needs, how close it is to its authors' code."""
    from vlprune.support import rows

    table = Table("pruner", "paper", "stage", "fidelity", "needs", *(["fits at"] if model else []))
    for row in rows(model):
        table.add_row(*row)
    console.print(table)


@app.command()
def show(
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a picture")],
    prompt: Annotated[str, typer.Option(help="the question")],
    plan: Annotated[str, typer.Option(help="how to prune")] = "visionzip:keep=0.111",
    model: Model = "tiny-llava",
    out: Out = Path("vlprune-show.png"),
) -> None:
    """Answer a question about a picture with and without pruning; table of costs; picture of the kept tokens."""
    from PIL import Image

    from vlprune.eval.demo import ask

    loaded, processor = load(model)
    picture = Image.open(image).convert("RGB")
    full = ask(loaded, processor, picture, prompt)
    pruned = ask(loaded, processor, picture, prompt, plan)
    assert pruned.trace is not None
    console.print(f"all tokens : {full.text}\n{plan} : {pruned.text}\n")
    console.print(pruned.trace.table(), highlight=False)
    pruned.trace.draw(picture).save(out)
    console.print(f"kept tokens drawn to {out}")


@app.command()
def demo(out: Out = Path("demo"), model: Model = "tiny-llava") -> None:
    """Pictures, questions, five pruners at three budgets: answers, accuracy, costs, pictures of kept tokens."""
    from vlprune.eval.demo import run

    loaded, processor = load(model)
    run(loaded, processor, out, console)


def main() -> None:
    """Entry point: an error of ours is one message on stderr, not a traceback."""
    try:
        app()
    except VlpruneError as error:
        Console(stderr=True).print(f"[red]{type(error).__name__}[/red]: {error}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
