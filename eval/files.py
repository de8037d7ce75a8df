"""Writing results so that a full disk or a forbidden folder is one clear error, and never half a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlprune.errors import VlpruneError


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
