"""Pages that need nothing but themselves: style and pictures lie in the file, and it tells browsers to fetch nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from PIL import Image

STYLE = """
:root { color-scheme: light; --ink: #1f2328; --muted: #646c76; --rule: #d0d5db; --accent: #0072b2; --bad: #b3401a }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; margin: 0 auto; padding: 2rem 1.5rem 4rem;
       max-width: 80rem; color: var(--ink); background: #fff }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem } h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem }
h3 { font-size: 1rem; margin: 1.8rem 0 .6rem; font-weight: 600 }
p { max-width: 52rem } p.setting { color: var(--muted); font-size: 13px; margin: 0 0 1.4rem }
code, td:first-child { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap }
th { border-bottom: 2px solid var(--ink); font-weight: 600; vertical-align: bottom } th:first-child, td:first-child { text-align: left }
tr.base { background: #f3f5f7 }
.right { color: var(--accent) } .wrong { color: var(--bad) }
.wall { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 1.2rem }
.wall figure:not(.sheet) { max-width: 440px !important } .wall figure:not(.sheet) img { width: 100% }
.wall figure.sheet { grid-column: 1 / -1 }
.strip { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: flex-start }
figure { margin: 0; font-size: 13px } figure img { display: block; max-width: 100%; height: auto; border: 1px solid var(--rule) }
figcaption { margin-top: .4rem; overflow-wrap: anywhere; color: var(--muted) } figcaption b { color: var(--ink); font-weight: 600 }
i.key { display: inline-block; width: .9em; height: .9em; margin: 0 .15em 0 .5em; vertical-align: -.1em; border: 1px solid var(--rule) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.2rem; margin: 1rem 0 }
dt { color: var(--muted); font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px; padding-top: .1rem }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, body: str) -> str:
    """A whole document; `body` is HTML."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def figure(image: Image.Image | Path, caption: str, words: str, width: int | None = None, sheet: bool = False) -> str:
    """A picture, or a file of one, with HTML below it.

    Args:
        words: what a reader hears who does not see it.
        width: shown so wide, in CSS pixels; default: as it is, or smaller where the window is.
        sheet: several pictures in one, which take a row of a wall for themselves.
    """
    own = Image.open(image) if isinstance(image, Path) else image
    shown = width or own.width
    size = f'width="{shown}" height="{round(own.height * shown / own.width)}"'
    kind = ' class="sheet"' if sheet else ""
    return (f'<figure{kind} style="max-width:{shown + 2}px"><img src="{source(image)}" alt="{escape(words)}" {size}>'
            f"<figcaption>{caption}</figcaption></figure>")  # fmt: skip


def source(image: Image.Image | Path) -> str:
    """A picture as a data URI: a file as it is, a small picture without loss, a large one as JPEG."""
    if isinstance(image, Path):
        data, kind = image.read_bytes(), image.suffix.removeprefix(".")
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    file, image = io.BytesIO(), image.convert("RGB")
    kind = "png" if image.width * image.height < 1_500_000 else "jpeg"
    image.save(file, kind, quality=90, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], base: int = 0) -> str:
    """Cells are plain text; the first `base` rows are set off."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = ""
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        body += f'<tr class="base">{cells}</tr>\n' if number < base else f"<tr>{cells}</tr>\n"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'
