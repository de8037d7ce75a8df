"""MkDocs hook: notebooks and the pages of the repository's root become pages of the site, and links find them there.

A page in docs/ links to what lies beside or above it in the repository, as readers of the repository need it. Here a target that has
a page on the site becomes a link to that page, and any other file of the repository becomes plain text.
"""

from __future__ import annotations

import base64
import posixpath
import re
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # path in the repository -> path on the site
    "BENCHMARKS.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "kernels/benchmarks/results.md": "kernel_results.md",
}
PAGES |= {f"vlprune/models/{card.parent.name}/README.md": f"models/{card.parent.name}.md"
          for card in sorted(ROOT.glob("vlprune/models/*/README.md"))}  # fmt: skip
PAGES |= {f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in sorted(ROOT.glob("notebooks/*.ipynb"))}
ORIGIN = {site: source for source, site in PAGES.items()}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the lists of notebooks and methods."""
    for entry in config.nav or []:
        if "Notebooks" in entry:
            entry["Notebooks"] = [{_title(source): site} for source, site in PAGES.items() if source.endswith(".ipynb")]
        if "Methods" in entry:
            names = sorted(path.stem for path in (ROOT / "docs/methods").glob("*.md") if path.stem != "index")
            entry["Methods"] += [{name: f"methods/{name}.md"} for name in names]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/."""
    for source, site in PAGES.items():
        if source.endswith(".ipynb"):
            text, pictures = _notebook(ROOT / source)
            for name, data in pictures.items():
                files.append(File.generated(config, f"notebooks/{name}", content=data))
        else:
            text = re.sub(r"\A---\n.*?\n---\n", "", (ROOT / source).read_text(encoding="utf-8"), flags=re.DOTALL)
        files.append(File.generated(config, site, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to where their targets are on the site."""
    here = page.file.src_uri
    source = ORIGIN.get(here, f"docs/{here}")

    def moved(found: re.Match[str]) -> str:
        image, words, target, anchor = found.groups()
        if image or ":" in target:
            return found[0]
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        site = PAGES.get(inside, inside.removeprefix("docs/") if inside.startswith("docs/") else None)
        if site is None:
            if not (ROOT / inside).exists():
                return found[0]  # let MkDocs complain
            return words
        return f"[{words}]({posixpath.relpath(site, posixpath.dirname(here) or '.')}{anchor or ''})"

    return LINK.sub(moved, markdown)


def _title(source: str) -> str:
    first = nbformat.read(ROOT / source, as_version=4).cells[0].source
    return str(first).splitlines()[0].lstrip("# ")


def _notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        parts.append(cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```")
        for output in cell.get("outputs", ()):
            data: Any = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{number}_{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![output of the code above]({name})")
            elif text := output.get("text") or data.get("text/plain"):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts), pictures
