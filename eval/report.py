"""What stands above and in a table of results."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from rich.console import Console

import vlprune

WIDE = 260  # columns of a table that does not go to a terminal


def console_for_tables() -> Console:
    """As wide as the terminal, and wide enough for every column where the output goes to a file."""
    return Console() if sys.stdout.isatty() else Console(width=WIDE)


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
