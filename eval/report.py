"""What stands above and in a table of results."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers

import vlprune


def setting(device: torch.device, dtype: str, command: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": f"{device.type} {name}", "dtype": dtype, "torch": torch.__version__, "cuda": torch.version.cuda,
        "transformers": transformers.__version__, "vlprune": vlprune.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "command": command,
    }  # fmt: skip


def markdown(head: dict[str, Any], titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The setting, one item a line, and a table; the first column is text, the others are numbers."""
    lines = [f"- {k}: {v}" for k, v in head.items() if v is not None] + [""]
    lines += [f"| {' | '.join(titles)} |", f"|{'|'.join([':--'] + ['--:'] * (len(titles) - 1))}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
