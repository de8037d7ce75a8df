"""Generated pages are what the code says, and say it in full."""

from __future__ import annotations

import dataclasses
import re

import pytest
from PIL import Image
from snippets import ROOT

from vlprune import PRUNERS, DecodePruner
from vlprune.eval import docs
from vlprune.pruner import find
from vlprune.support import families


@pytest.fixture(scope="module")
def pages():
    find("uniform")  # registers the built-in pruners
    return docs.pages(ROOT)


def test_pages_are_current(pages):
    old = [
        str(path) for path, text in pages.items() if not (ROOT / path).is_file() or (ROOT / path).read_text() != text
    ]
    assert not old, f"run `make docs`: {', '.join(old)}"
    written = {path.relative_to(ROOT) for path in (ROOT / docs.METHODS).glob("*.md")}
    assert written <= pages.keys(), f"no method has these pages any more: {written - pages.keys()}"


def test_every_method_has_a_page_with_its_parts(pages):
    for name, cls in PRUNERS.items():
        text = pages[docs.METHODS / f"{name}.md"]
        assert text.startswith("# ") and "## Rule\n\n" in text
        for field in dataclasses.fields(cls):
            assert field.name == "inner" or f"| `{field.name}` |" in text, f"{name}: {field.name} is missing"
        assert cls.source.paper.removeprefix("arXiv:") in text and cls.source.code in text


def test_measured_rows_are_those_of_the_benchmarks(pages):
    """Each number on a page stands in BENCHMARKS.md in the same row."""
    rows = [cells(line) for line in (ROOT / docs.BENCHMARKS).read_text().splitlines()]
    shown = 0
    for name in PRUNERS:
        part = pages[docs.METHODS / f"{name}.md"].partition("## Measured here")[2].partition("\n## ")[0]
        for line in part.splitlines():
            if line.startswith("|") and "---" not in line:
                assert cells(line) in rows, f"{name}: {line}"
                shown += 1
    assert shown > 50
    fastv = pages[docs.METHODS / "fastv.md"]
    assert "| fastv@4:keep=0.111 |" in fastv and "| unpruned |" in fastv and "| random:keep=0.111 |" in fastv
    assert "| divprune" not in fastv.partition("## Measured here")[2]


def test_published_rows_name_their_table(pages):
    text = pages[docs.METHODS / "divprune.md"].partition("## Published")[2]
    assert (
        "RESTORE, Table 1" in text
        and "| 576 | Unpruned |" in text
        and "None of these numbers was measured here" in text
    )


def test_pictures_are_there():
    """One per method that removes tokens; `make docs` draws them."""
    for name, cls in PRUNERS.items():
        if not issubclass(cls, DecodePruner):
            with Image.open(ROOT / docs.METHODS / f"{name}.jpg") as image:
                assert image.width > 3 * image.height, name


def test_readme_counts(pages):
    assert f"{len(families())} model families, {len(PRUNERS)} methods" in pages[docs.README]
    named = pages[docs.README].partition("## Families\n\n")[2].partition(". ")[0]
    assert named.split(", ") == families()


def test_first_screen_of_the_readme_keeps_to_the_benchmarks():
    """Its table rounds the prefill times and ratios that BENCHMARKS.md has in full."""
    readme, benchmarks = (ROOT / docs.README).read_text(), (ROOT / docs.BENCHMARKS).read_text()
    screen = [cells(line) for line in readme.partition("## Install")[0].splitlines() if line.startswith("|")]
    table = [cells(line) for line in benchmarks.splitlines() if line.startswith("|")]
    head = next(i for i, row in enumerate(table) if {"whole prefill (p20 - p80)", "speed-up", "KV MiB"} <= set(row))
    columns = [table[head].index(name) for name in ("whole prefill (p20 - p80)", "speed-up", "KV MiB")]
    for shown in screen[2:]:
        name = re.split(r"[`, ]+", shown[0].strip("`"))[0]
        row = next(row for row in table[head:] if row[0].partition(":")[0] == name)
        prefill, faster, kv = (float(row[i].split()[0]) for i in columns)
        assert shown[1] == f"{prefill:.0f}", f"{shown} against {row}"
        assert shown[2] == ("" if name == "unpruned" else f"{faster:.1f} x"), f"{shown} against {row}"
        assert shown[3] == f"{kv * 2**20 / 1e9:.1f} GB", f"{shown} against {row}"


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
