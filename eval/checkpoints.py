"""Opening a checkpoint for evaluation: complete, or one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from vlprune.errors import SpecError
from vlprune.models import embedded
from vlprune.processors import load_processor


def locate(name: str) -> str:
    """What `from_pretrained` takes for a checkpoint folder, a repository ("owner/name") or a shipped checkpoint's name.

    Raises:
        SpecError: none of the three.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SpecError(f"{name} holds no config.json; pass the folder of a checkpoint")
        return name
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return name
    if "/" in name:
        raise SpecError(f"there is no checkpoint folder {name}")
    return str(embedded(name))


def load_model(
    name: str,
    dtype: str | torch.dtype = "auto",
    attention: str | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> Any:
    """The model, ready to answer.

    Raises:
        SpecError: no such checkpoint, no weights in it, or weights missing that would be random.
    """
    place = locate(name)
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            place, dtype=dtype, attn_implementation=attention, revision=revision or "main", output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise SpecError(f"cannot load {name}: {str(error).strip().splitlines()[0]}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise SpecError(
            f"{name} lacks {len(missing)} weights, which would be random: {', '.join(missing[:3])}"
            f"{' ...' if len(missing) > 3 else ''}; download the checkpoint again"
        )
    return model.eval().to(device)


def load(name: str, **options: Any) -> tuple[Any, Any]:
    """(model, processor); options as in `load_model`."""
    model = load_model(name, **options)
    return model, load_processor(locate(name))
