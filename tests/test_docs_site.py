"""The site builds without a warning, from nothing but what is in the repository, and needs no other server."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from snippets import ROOT

from vlprune import PRUNERS
from vlprune.pruner import find


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("mkdocs") is None:
        pytest.skip("needs mkdocs: pip install 'vlprune[docs]'")
    out = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr  # a dead link is a warning, and a warning is an error
    return out


def test_every_page_is_on_the_site(site: Path) -> None:
    find("uniform")  # registers the built-in pruners
    assert {f"{name}.html" for name in PRUNERS} <= {p.name for p in (site / "methods").iterdir()}
    assert {p.stem for p in (ROOT / "notebooks").glob("*.ipynb")} == {
        p.stem for p in (site / "notebooks").glob("*.html")
    }
    assert "make docs" in (site / "contributing.html").read_text(encoding="utf-8")


def test_notebooks_come_with_their_pictures(site: Path) -> None:
    for page in (site / "notebooks").glob("*.html"):
        for source in re.findall(r'<img[^>]* src="([^"]+)"', page.read_text(encoding="utf-8")):
            assert (page.parent / source).is_file(), f"{page.name} shows {source}"
    assert list((site / "notebooks").glob("*.png"))


def test_links_lead_to_pages_of_the_site(site: Path) -> None:
    text = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="benchmarks.html"' in text and 'href="notebooks/01_first_steps.html"' in text
    assert ".ipynb" not in text and "BENCHMARKS.md" not in text


def test_pages_need_no_other_server(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|link|img)[^>]* (?:src|href)="(?:https?:)?//[^"]*"', text), page.name
