"""Trained checkpoints that ship with the package: standard Hugging Face folders, opened without a network."""

from __future__ import annotations

from pathlib import Path

from vlprune.errors import SpecError, nearest


def embedded(name: str = "tiny-llava") -> Path:
    """The folder of a shipped checkpoint, for `from_pretrained`.

    Raises:
        SpecError: no checkpoint of that name is shipped.
    """
    folders = {path.parent.name: path.parent for path in Path(__file__).parent.glob("*/config.json")}
    if (Path(__file__).parent / name / "tower.json").is_file():
        raise SpecError(f"{name} is shipped without its language model; put it together with `python -m vlprune.eval.smol.assemble "
                        "FOLDER` and name that folder")  # fmt: skip
    if name not in folders:
        known = ", ".join(sorted(folders))
        raise SpecError(f"no embedded model is called {name!r}{nearest(name, folders)} (shipped: {known})")
    return folders[name]
