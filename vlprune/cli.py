"""The command line: list, show, demo, bench, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlprune.errors import SpecError, VlpruneError

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Prune the visual tokens of vision-language models.",
                  pretty_exceptions_enable=False)  # fmt: skip
console = Console()

Model = Annotated[str, typer.Option(help="an embedded model's name, a checkpoint folder or a hub repository")]
Out = Annotated[Path, typer.Option(help="folder for what is written")]


PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def load(model: str) -> tuple[Any, Any]:
    """(model, processor): float32 on a CPU, bfloat16 on a GPU."""
    import torch

    from vlprune.eval import checkpoints

    cuda = torch.cuda.is_available()
    dtype, device = (torch.bfloat16, "cuda") if cuda else (torch.float32, "cpu")
    return checkpoints.load(model, dtype=dtype, device=device)


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
    out: Annotated[Path, typer.Option(help="a page (.html), or a picture of the kept tokens")] = Path(
        "vlprune-show.html"
    ),
) -> None:
    """Answer a question about a picture with and without pruning; costs; a page with pictures of the kept tokens."""
    from PIL import Image, UnidentifiedImageError

    from vlprune.eval.show import show as show_page
    from vlprune.plan import Plan

    Plan.parse(plan)  # a slip of the pen costs no loading
    if out.suffix.lower() not in {".html", ".htm", *Image.registered_extensions()}:
        raise SpecError(f"--out {out} is to be a page or a picture; give it an ending such as .html or .png")
    try:
        picture = Image.open(image).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise SpecError(f"{image} cannot be read as a picture: {error}") from error
    loaded, processor = load(model)
    show_page(loaded, processor, picture, prompt, plan, out, console)


@app.command()
def demo(out: Out = Path("demo"), model: Model = "tiny-llava") -> None:
    """Pictures, questions, five pruners at three budgets: answers, accuracy, costs, pictures of kept tokens."""
    from vlprune.eval.demo import run

    loaded, processor = load(model)
    run(loaded, processor, out, console)


@app.command(context_settings=PASS_ON)
def bench(context: typer.Context) -> None:
    """Latency, memory and KV bytes of plans on a checkpoint or a random-weight shape; `vlprune bench --help`."""
    from vlprune.eval.bench import main as measure

    measure(context.args)


@app.command(context_settings=PASS_ON)
def compare(context: typer.Context) -> None:
    """A grid of methods, budgets and tasks: table, plot and report, resumable; `vlprune compare --help`."""
    from vlprune.eval.compare import main as run_grid

    run_grid(context.args)


def main() -> None:
    """Entry point: an error of ours is one message on stderr, not a traceback."""
    try:
        app()
    except VlpruneError as error:
        text = f"[red]{type(error).__name__}[/red]: {escape(str(error))}"  # "vlprune[eval]" is no colour
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
