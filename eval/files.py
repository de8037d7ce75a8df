"""Reading and writing for evaluation: what goes wrong is one clear error, never half a file or a silent zero."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from vlprune.errors import VlpruneError

T = TypeVar("T")
UNREADABLE = (OSError, SyntaxError, ValueError)  # what PIL raises on a broken picture


def installed(*packages: str) -> None:
    """Say before anything is measured which packages are missing. VlpruneError names them and the extra that has them."""
    missing = [p for p in packages if find_spec(p) is None]
    if missing:
        raise VlpruneError(f"this needs {' and '.join(missing)}: pip install 'vlprune[eval]'")


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a VlpruneError that names the path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise VlpruneError(f"cannot write {path}: {reason}; free some space or choose another output folder") from error


def output_folder(folder: str | Path) -> Path:
    """Create a folder and prove that files can be written to it."""
    out = Path(folder)
    with reporting(out):
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".vlprune"
        probe.write_text("")
        probe.unlink()
    return out


def write(path: Path, content: str | bytes) -> Path:
    """Replace a file as a whole: readers see the old content or the new one."""
    part = path.with_name(path.name + ".part")
    with reporting(path):
        try:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return path


def read_all(readers: Iterable[tuple[str, Callable[[], T]]]) -> list[T]:
    """Call every named reader. If any fails on a broken picture, name and count all that do.

    Raises:
        VlpruneError: pictures that cannot be read. They are never scored as wrong answers.
    """
    read: list[T] = []
    broken: list[str] = []
    for name, reader in readers:
        try:
            read.append(reader())
        except UNREADABLE as error:
            broken.append(f"{name} ({error})")
    if broken:
        named = "; ".join(broken[:10]) + (" ..." if len(broken) > 10 else "")
        raise VlpruneError(f"{len(broken)} of {len(broken) + len(read)} pictures cannot be read: {named}")
    return read
