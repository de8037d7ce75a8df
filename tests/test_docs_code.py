"""Every code block of README.md and docs/ does what it says."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
import typer
from snippets import ROOT, blocks, check_command, commands, run_python

from vlprune import PRUNERS, Plan, SpecError
from vlprune.adapters import families
from vlprune.pruner import find

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "BENCHMARKS.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "vlprune" / "models").glob("*/README.md"))
KINDS = ("python", "python notest", "sh", "plans", "toml", "text", "")
UsageError = typer.BadParameter.__bases__[0]  # typer has click, or its own copy of it
NOT_RUN = {"docs/quickstart.md": 1}  # blocks that need a model hub


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def having(*kinds: str) -> list[object]:
    return [pytest.param(p, id=name(p)) for p in PAGES if any(b.kind in kinds for b in blocks(p))]


@pytest.mark.parametrize("page", having("python"))
def test_python(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pages write files
    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES)
    find("uniform")  # registers the built-in pruners, which stay
    before, environment = dict(PRUNERS), dict(os.environ)
    try:
        run_python(page, tmp_path)
    finally:
        PRUNERS.clear()
        PRUNERS.update(before)
        os.environ.clear()
        os.environ.update(environment)


@pytest.mark.parametrize("page", having("sh", ""))
def test_commands_are_understood(page):
    for block in blocks(page):
        for words in commands(block) if block.kind in ("sh", "") else ():
            check_command(words)


@pytest.mark.parametrize("page", having("plans", "toml"))
def test_plans_and_tables_are_read(page):
    for block in blocks(page):
        if block.kind == "toml":
            assert tomllib.loads(block.code)
        for words in commands(block) if block.kind == "plans" else ():
            for text in words:
                assert str(Plan.parse(str(Plan.parse(text)))) == str(Plan.parse(text))


@pytest.mark.parametrize("page", [pytest.param(p, id=name(p)) for p in PAGES])
def test_every_block_says_what_it_is(page):
    for block in blocks(page):
        assert block.kind in KINDS, f"{name(page)}, line {block.line}: no test knows blocks of kind {block.kind!r}"
        assert block.kind or "docs" not in page.parts, f"{name(page)}, line {block.line}: fence this block"


def test_blocks_that_cannot_run_offline_are_these():
    skipped = {name(p): [b for b in blocks(p) if b.kind == "python notest"] for p in PAGES}
    for found in skipped.values():
        for block in found:
            compile(block.code, "page", "exec")
    assert {page: len(found) for page, found in skipped.items() if found} == NOT_RUN


@pytest.mark.parametrize(
    "words",
    ["vlprune show a.png --promt hello", "vlprune list --modle llava", "make nothing", "pip install .[nothing]",
     "vlprune compare tiny-llava --plan divprune --nonsense 1", "python -m vlprune.eval.suites OUT --itms 3",
     "frobnicate", "vlprune show a.png --prompt hello --plan divprun:keep=0.5"],
)  # fmt: skip
def test_mistakes_are_found(words):
    """The checks above can fail."""
    with pytest.raises((AssertionError, SystemExit, SpecError, UsageError)):
        check_command(words.split())
