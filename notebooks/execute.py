"""Run the notebooks, each in a kernel of its own, and keep their outputs.

    python notebooks/execute.py        # all of them
    python notebooks/execute.py 01 05  # those whose names start like this

Outputs are kept without timestamps, the kernel's version, and stderr, where libraries draw progress bars and warn of missing
widgets. An output that names a folder of this machine is an error.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
LIMIT = 600  # seconds a cell may take, on a machine that does other things as well
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebooks(starts: list[str] | None = None) -> list[Path]:
    return [p for p in sorted(FOLDER.glob("*.ipynb")) if not starts or p.name.startswith(tuple(starts))]


def execute(path: Path, folder: str | Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, run in `folder`; nbclient.exceptions.CellExecutionError at the first error."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=LIMIT,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    return clean(notebook)


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without stderr and what the kernel says about itself; pieces of one stream joined."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
        if cell.cell_type != "code":
            continue
        kept: list[nbformat.NotebookNode] = []
        for output in cell.outputs:
            if output.get("name") == "stderr":  # an error is no stream; it has stopped the run
                continue
            if kept and kept[-1].output_type == output.output_type == "stream" and kept[-1].name == output.name:
                kept[-1].text += output.text
            else:
                kept.append(output)
        cell.outputs = kept
    return notebook


def texts(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """Everything the outputs say in words."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            yield output.get("text", "")
            yield from (str(v) for k, v in output.get("data", {}).items() if k.startswith("text/"))
            yield from output.get("traceback", ())


def leaks(notebook: nbformat.NotebookNode) -> list[str]:
    """Lines of the outputs that name a folder of this machine."""
    places = {str(FOLDER.parent), str(Path.home()), tempfile.gettempdir(), sys.prefix}
    return [line for text in texts(notebook) for line in text.splitlines() if any(p in line for p in places)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the notebooks and keep their outputs.")
    parser.add_argument("starts", nargs="*", help="names begin with one of these; default: all")
    chosen = notebooks(parser.parse_args().starts)
    if not chosen:
        sys.exit("no notebook has such a name")
    for path in chosen:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, folder)
        if found := leaks(notebook):
            sys.exit(f"{path.name} would keep folders of this machine: {found}")
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
