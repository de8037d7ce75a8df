"""What pictures are made of: photographs of things, pages of manuals and fonts that others made, split by source.

    apt-get install --no-install-recommends tuxpaint-stamps-default poppler-utils debian-reference-en \
        developers-reference maint-guide debian-policy debian-faq fonts-liberation fonts-dejavu-core fonts-lato \
        fonts-open-sans fonts-comic-neue
    python -m vlprune.eval.smol.sources

collects them, scaled down, into a folder: the bank. Nothing of it is part of this package.

| source | what of it | licence |
|---|---|---|
| tuxpaint-stamps-default | cut-outs with a transparent ground, by the folder they lie in | GPL-2 |
| the manuals | rendered pages, and every word with its box | GPL-2+, and policy's: GPL-2+ |
| the fonts | as files | SIL OFL 1.1 (Lato, Comic Neue), Apache-2.0 (Open Sans), GPL-2 with exceptions (Liberation), Bitstream Vera (DejaVu) |

Training sees the split "train", held-out tasks the split "held-out". No stamp, manual or typeface is in both: manuals and
fonts are listed by split below; of each kind of stamps, those three in ten whose file names have the lowest SHA-256 are held out.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont
from rich.progress import track

from vlprune.errors import VlpruneError
from vlprune.eval.files import output_folder, write
from vlprune.eval.tiny.drawing import Box

BANK_VARIABLE = "VLPRUNE_SMOL_BANK"
SPLITS = ("train", "held-out")
HELD_OUT = 0.3  # share of the stamps of a kind
STAMP_SIDE = 128  # pixels, the longer side
DPI = 110  # of the pages
PAGES = {"train": 40, "held-out": 12}  # of each manual
POINTS = 72  # an inch
INDEX = "bank.json"
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")
PRINTABLE = "".join(map(chr, range(33, 127)))
PLAIN = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "‐": "-", "…": "...", "ﬁ": "fi", "ﬂ": "fl"}
)

STAMPS = Path("usr/share/tuxpaint/stamps")
KINDS = {  # what a thing is called -> folders of stamps
    "bird": ("animals/birds",),
    "building": ("town/houses",),
    "coin": (
        "symbols/money/euro/coins",
        "symbols/money/us/coins",
        "symbols/money/canadian/coins",
        "symbols/money/japanese",
    ),
    "fish": ("animals/fish",),
    "flower": ("plants/flowers",),
    "fruit": ("food/fruit",),
    "insect": ("animals/insects",),
    "instrument": ("hobbies/music",),
    "mammal": ("animals/mammals",),
    "planet": ("space/planets",),
    "tool": ("household/tools",),
    "vegetable": ("food/vegetables",),
    "vehicle": ("vehicles",),
}
PLURALS = {kind: {"fish": "fish", "fruit": "fruits"}.get(kind, f"{kind}s") for kind in KINDS}
# words of a caption that name something else than the folder does
OTHERS = ("tux", "penguins are", "lobster", "shrimp", "slug", "snail", "spider", "woodlouse", "wings", "sun.", "wheel",
          "emblem", "sign", "bear.", "cave", "paintbrush", "core")  # fmt: skip
TEDDIES = ("teddy bear.", "edward bear.")

MANUALS = {
    "train": (
        "usr/share/debian-reference/debian-reference.en.pdf",
        "usr/share/developers-reference/developers-reference.pdf",
        "usr/share/doc/maint-guide/maint-guide.en.pdf",
    ),
    "held-out": (
        "usr/share/doc/debian-policy/policy.pdf.gz",
        "usr/share/doc/debian/FAQ/debian-faq.en.pdf.gz",
    ),
}
FONTS = {
    "train": (
        "usr/share/fonts/truetype/liberation/LiberationSans-Regular.ttf",
        "usr/share/fonts/truetype/liberation/LiberationSans-Bold.ttf",
        "usr/share/fonts/truetype/liberation/LiberationSans-Italic.ttf",
        "usr/share/fonts/truetype/liberation/LiberationSerif-Regular.ttf",
        "usr/share/fonts/truetype/liberation/LiberationSerif-Bold.ttf",
        "usr/share/fonts/truetype/liberation/LiberationMono-Regular.ttf",
        "usr/share/fonts/truetype/dejavu/DejaVuSans.ttf",
        "usr/share/fonts/truetype/dejavu/DejaVuSans-Bold.ttf",
        "usr/share/fonts/truetype/dejavu/DejaVuSerif.ttf",
        "usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf",
        "usr/share/fonts/truetype/lato/Lato-Regular.ttf",
        "usr/share/fonts/truetype/lato/Lato-Bold.ttf",
    ),
    "held-out": (
        "usr/share/fonts/truetype/open-sans/OpenSans-Regular.ttf",
        "usr/share/fonts/opentype/comic-neue/ComicNeue-Regular.otf",
    ),
}


class Word(NamedTuple):
    text: str
    box: Box


@dataclass(frozen=True, eq=False)
class Stamp:
    """A thing cut out: [H, W, 4] uint8, the last channel its coverage."""

    kind: str
    name: str
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Page:
    """[H, W] uint8, dark on light, with blocks of lines of words."""

    manual: str
    pixels: NDArray[np.uint8]
    blocks: list[list[list[Word]]]


@dataclass(frozen=True, eq=False)
class Bank:
    """One split of the sources."""

    stamps: dict[str, list[Stamp]]  # by kind
    pages: list[Page]
    fonts: list[Path]

    def font(self, number: int, size: int) -> ImageFont.FreeTypeFont:
        return _font(str(self.fonts[number]), size)

    @cached_property
    def lines(self) -> list[list[str]]:
        """The words of all lines that a keyboard can type."""
        spelt = (
            [word.text.translate(PLAIN) for word in line] for page in self.pages for b in page.blocks for line in b
        )
        return [line for line in spelt if line and set("".join(line)) <= set(PRINTABLE)]

    @staticmethod
    def open(split: str, folder: str | Path | None = None) -> Bank:
        """Read a split, "train" or "held-out".

        Args:
            folder: where `collect` wrote it; default: `bank_folder()`.
        Raises:
            VlpruneError: nothing was collected there.
        """
        return _open(split, Path(folder or bank_folder()).resolve())


@cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def bank_folder() -> Path:
    """The environment variable VLPRUNE_SMOL_BANK, else a folder of the user's cache."""
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlprune" / "smol-bank"
    return Path(os.environ.get(BANK_VARIABLE) or cached)


@cache
def _open(split: str, folder: Path) -> Bank:
    if not (folder / INDEX).is_file():
        raise VlpruneError(
            f"there are no pictures in {folder}: python -m vlprune.eval.smol.sources collects them from Debian packages, and "
            f"{BANK_VARIABLE} names another folder"
        )
    index = json.loads((folder / INDEX).read_text())[split]
    stamps: dict[str, list[Stamp]] = {kind: [] for kind in KINDS}
    for entry in index["stamps"]:
        with Image.open(folder / entry["file"]) as image:
            stamps[entry["kind"]].append(Stamp(entry["kind"], entry["name"], np.array(image.convert("RGBA"))))
    pages = []
    for entry in index["pages"]:
        with Image.open(folder / entry["file"]) as image:
            pixels = np.array(image.convert("L"))
        blocks = [[[Word(w[0], Box(*w[1:])) for w in line] for line in block] for block in entry["blocks"]]
        pages.append(Page(entry["manual"], pixels, blocks))
    return Bank(stamps, pages, [folder / name for name in index["fonts"]])


# ---- collecting


def collect(
    folder: str | Path, root: str | Path = "/", watch: Callable[[Sequence[Any], str], Iterator[Any]] | None = None
) -> Path:
    """Write both splits into a folder; the same sources give the same bank.

    Args:
        root: where the packages are installed.
        watch: shows progress through a list of work, under a title.
    Raises:
        VlpruneError: a source is missing; all of them are named.
    """
    root, watch = Path(root), watch or (lambda work, title: iter(work))
    missing = [str(path) for path in _wanted(root) if not path.exists()]
    missing += [] if shutil.which("pdftoppm") else ["pdftoppm"]
    if missing:
        raise VlpruneError(
            f"{len(missing)} sources are missing: {', '.join(missing)}; install the Debian packages that "
            "`python -m vlprune.eval.smol.sources --help` names"
        )
    out = output_folder(folder)
    index: dict[str, dict[str, Any]] = {split: {"stamps": [], "pages": [], "fonts": []} for split in SPLITS}
    for kind, path, split, caption in watch(list(_stamps(root / STAMPS)), "stamps"):
        name = f"stamp-{kind}-{path.stem}.webp".replace(" ", "_")
        write(out / name, _stamp(path))
        index[split]["stamps"].append({"file": name, "kind": kind, "name": caption})
    work = [(split, root / manual) for split in SPLITS for manual in MANUALS[split]]
    for split, manual in watch(work, "manuals"):
        for page in _pages(manual, PAGES[split], out):
            index[split]["pages"].append(page)
    for split in SPLITS:
        for font in FONTS[split]:
            name = Path(font).name
            write(out / name, (root / font).read_bytes())
            index[split]["fonts"].append(name)
    write(out / INDEX, json.dumps(index))
    return out


def _wanted(root: Path) -> list[Path]:
    folders = [STAMPS / folder for kind in KINDS.values() for folder in kind]
    files = [Path(file) for split in SPLITS for file in (*MANUALS[split], *FONTS[split])]
    return [root / path for path in (*folders, *files)]


def _stamps(root: Path) -> Iterator[tuple[str, Path, str, str]]:
    """(kind, file, split, caption) of every stamp that is what its folder says."""
    for kind, folders in KINDS.items():
        found = []
        for folder in folders:
            for path in sorted((root / folder).rglob("*.png")):
                caption = path.with_suffix(".txt")
                lines = caption.read_text(errors="replace").splitlines() if caption.is_file() else []
                if lines and not _other(kind, lines[0]):
                    found.append((path, lines[0].strip()))
        order = sorted(found, key=lambda f: hashlib.sha256(f[0].name.encode()).digest())  # no order of theirs
        held = round(len(order) * HELD_OUT)
        for number, (path, caption_text) in enumerate(order):
            yield kind, path, SPLITS[number < held], caption_text


def _other(kind: str, caption: str) -> bool:
    text = caption.lower()
    if kind == "mammal":
        return text.strip() in TEDDIES
    return any(word in text for word in OTHERS)


def _stamp(path: Path) -> bytes:
    """Cut to what is covered, and scaled down."""
    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 * (a > 20)).getbbox()
    image = image.crop(box) if box else image
    scale = STAMP_SIDE / max(image.size)
    if scale < 1:
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=88, method=4)
    return stream.getvalue()


def _pages(manual: Path, count: int, out: Path) -> Iterator[dict[str, Any]]:
    """`count` pages spread over a manual, those with the most text of their neighbourhood."""
    with tempfile.TemporaryDirectory() as temporary:
        pdf = Path(temporary) / "manual.pdf"
        stored = manual.read_bytes()
        pdf.write_bytes(gzip.decompress(stored) if manual.suffix == ".gz" else stored)
        text = subprocess.run(
            ["pdftotext", "-bbox-layout", pdf, "-"], check=True, capture_output=True, text=True
        ).stdout
        pages = [_blocks(page) for page in _parse(text).iter("page")]
        first, step = len(pages) // 10, 0.85 * len(pages) / count  # behind the tables of contents
        for i in range(count):
            near = range(int(first + i * step), min(len(pages), int(first + (i + 1) * step)))
            if not near:
                continue
            number = max(near, key=lambda n: sum(len(line) for block in pages[n] for line in block))
            stem = manual.name.partition(".")[0]
            subprocess.run(
                ["pdftoppm", "-r", str(DPI), "-gray", "-f", str(number + 1), "-l", str(number + 1), "-singlefile", "-png",
                 pdf, Path(temporary) / "page"], check=True,
            )  # fmt: skip
            name = f"page-{stem}-{number + 1}.png"
            with Image.open(Path(temporary) / "page.png") as image:
                stream_out = io.BytesIO()
                image.convert("L").quantize(16).save(stream_out, "PNG")
            write(out / name, stream_out.getvalue())
            blocks = [[[[w.text, *w.box] for w in line] for line in block] for block in pages[number]]
            yield {"file": name, "manual": stem, "blocks": blocks}


def _parse(text: str) -> ET.Element:
    """pdftotext's XHTML without its name space, and without the control characters that XML forbids."""
    clean = CONTROL.sub("", text.replace(' xmlns="http://www.w3.org/1999/xhtml"', ""))
    return ET.fromstring(clean[clean.index("<html") :])


def _blocks(page: ET.Element) -> list[list[list[Word]]]:
    scale = DPI / POINTS

    def box(word: ET.Element) -> Box:
        left, top, right, bottom = (float(word.attrib[k]) * scale for k in ("xMin", "yMin", "xMax", "yMax"))
        return Box(int(left), int(top), int(right) + 1, int(bottom) + 1)

    return [
        [[Word(word.text or "", box(word)) for word in line.iter("word")] for line in block.iter("line")]
        for block in page.iter("block")
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vlprune.eval.smol.sources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", nargs="?", default=bank_folder(), help=f"default: {BANK_VARIABLE} or the user's cache"
    )
    parser.add_argument("--root", default="/", help="where the packages are installed")
    options = parser.parse_args(arguments)
    out = collect(options.folder, options.root, lambda work, title: iter(track(work, title, transient=True)))
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size / 2**20:.1f} MiB")
    for split in SPLITS:
        bank = Bank.open(split, out)
        stamps = ", ".join(f"{len(found)} {PLURALS[kind]}" for kind, found in bank.stamps.items())
        print(f"{split}: {len(bank.pages)} pages, {len(bank.fonts)} fonts; {stamps}")


if __name__ == "__main__":
    main()
