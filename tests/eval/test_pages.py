"""Pages hold all they show: nothing is fetched, every picture decodes, what is told in colour is told in words too."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from vlprune.eval import html
from vlprune.eval.checkpoints import load
from vlprune.eval.show import show
from vlprune.eval.tiny import items

ITEM = items("letter", 1, 7)[0]
QUIET = Console(file=io.StringIO())


class Reader(HTMLParser):
    """Tags with their attributes, text, and whether every tag that opens is closed."""

    EMPTY = frozenset({"meta", "img", "br", "!doctype", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def pictures(text: str) -> list[tuple[Image.Image, dict[str, str | None]]]:
    """Every picture of a page that fetches nothing, decoded."""
    page = Reader(text)
    assert not page.open
    out = []
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "poster", "data", "action"):
                assert (value or "").startswith("data:image/"), value
        if tag == "img":
            kind, _, data = (attributes["src"] or "").removeprefix("data:image/").partition(";base64,")
            image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            image.load()
            assert (image.format or "").lower() == kind
            assert attributes["alt"]
            out.append((image, attributes))
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.S))
    assert "url(" not in style
    assert "@import" not in style
    assert re.search(r"https?://", text) is None
    assert html.POLICY in text
    return out


@cache
def tiny_llava() -> Any:
    return load("tiny-llava", dtype="float32")


def shown(tmp_path: Path, plan: str, question: str = ITEM.question, name: str = "page.html") -> str:
    model, processor = tiny_llava()
    show(model, processor, ITEM.image, question, plan, tmp_path / name, QUIET)
    return (tmp_path / name).read_text() if name.endswith("html") else ""


def test_show_writes_one_page_with_all_pictures(tmp_path: Path) -> None:
    text = shown(tmp_path, "visionzip:keep=64")
    drawn = pictures(text)
    assert [image.size for image, _ in drawn] == [ITEM.image.size] * 4  # the picture, kept, score, merge
    assert len({image.tobytes() for image, _ in drawn}) == 4
    told = Reader(text).text
    assert ITEM.question in told
    assert "64 of 576" in told
    assert re.search(r"\((the same|another) answer\)", told)
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_show_of_several_stages_and_of_a_path(tmp_path: Path) -> None:
    stages = pictures(shown(tmp_path, "uniform:keep=0.5+fastv@4:keep=0.2"))
    assert any(image.width > 2 * ITEM.image.width for image, _ in stages)
    reading = pictures(shown(tmp_path, "fastocr:keep=0.05:least=0"))
    film = [image for image, _ in reading if image.format == "GIF"]
    assert len(film) == 1
    assert film[0].n_frames >= 1  # type: ignore[attr-defined]


def test_what_people_type_is_text_not_markup(tmp_path: Path) -> None:
    text = shown(tmp_path, "uniform:keep=64", question='what <b>letter</b> & "sign"? <img src=x onerror=alert(1)>')
    pictures(text)
    assert "<b>letter" not in text
    assert "onerror=alert(1)>" in Reader(text).text


def test_other_endings_give_the_picture_alone(tmp_path: Path) -> None:
    shown(tmp_path, "uniform:keep=64", name="kept.png")
    assert Image.open(tmp_path / "kept.png").size == ITEM.image.size


def test_large_pictures_travel_as_jpeg_and_small_ones_unchanged() -> None:
    small, large = Image.effect_noise((40, 30), 50), Image.effect_noise((1600, 1200), 5)
    assert html.source(small).startswith("data:image/png;base64,")
    assert html.source(large).startswith("data:image/jpeg;base64,")
    (image, attributes), = pictures(html.page("t", html.figure(small, "a & b", 'say "x"', width=20)))  # fmt: skip
    assert image.tobytes() == small.convert("RGB").tobytes()
    assert (attributes["width"], attributes["height"], attributes["alt"]) == ("20", "15", 'say "x"')


@pytest.mark.slow
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    """Rendered by a real browser: nothing lies beyond the window's right edge, and the pictures are painted."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium or google-chrome on the path")
    shown(tmp_path, "visionzip:keep=64")
    for width in (1280, 420):
        shot = tmp_path / f"{width}.png"
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},1600",
                   f"--screenshot={shot}", (tmp_path / "page.html").as_uri()]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=tmp_path)
        image = Image.open(shot).convert("RGB")
        assert image.width == width
        edge = image.crop((width - 8, 0, width, 1600))
        assert edge.getextrema() == ((255, 255),) * 3  # the margin is empty
        assert len(image.resize((200, 250)).getcolors(1 << 16) or []) > 1000  # photographs, not placeholders
