"""The commands behind the figures of BENCHMARKS.md, by number; run any of them again.

python -m vlprune.eval.figures                          # list them
python -m vlprune.eval.figures 1 4 7 --out figures      # run these; their output goes to figures/1.txt and so on
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vlprune.errors import SpecError
from vlprune.eval.files import output_folder

BENCHMARKS = Path("BENCHMARKS.md")
STARTS = re.compile(r"    (\w+=\S+ )*(python -m vlprune|vlprune )")


@dataclass(frozen=True)
class Command:
    """One command as a shell takes it, and the heading it stands under."""

    section: str
    text: str

    @property
    def words(self) -> list[str]:
        """For this Python; `env` takes the settings in front."""
        own = {"python": [sys.executable], "vlprune": [sys.executable, "-m", "vlprune.cli"]}
        return ["env", *[part for word in shlex.split(self.text) for part in own.get(word, [word])]]


def commands(text: str) -> list[Command]:
    """Indented lines that start a program, joined where they end with a backslash."""
    found, section, open_line = [], "", ""
    for line in text.splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        elif open_line or STARTS.match(line):
            open_line += line.strip()
            if open_line.endswith("\\"):
                open_line = open_line[:-1]
                continue
            found.append(Command(section, open_line))
            open_line = ""
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlprune.eval.figures", description=__doc__.partition("\n")[0])
    parser.add_argument("numbers", nargs="*", type=int, help="commands to run; none lists them")
    parser.add_argument("--out", default="figures", help="folder for what they print")
    options = parser.parse_args(arguments)
    if not BENCHMARKS.is_file():
        raise SpecError(f"{BENCHMARKS} is not here; run this in a clone of the repository")
    known = dict(enumerate(commands(BENCHMARKS.read_text(encoding="utf-8")), 1))
    unknown = [n for n in options.numbers if n not in known]
    if unknown:
        raise SpecError(f"there is no command {unknown[0]}; they are 1 to {len(known)}")
    console = Console()
    if not options.numbers:
        table = Table("", "section", "command")
        for number, command in known.items():
            table.add_row(str(number), command.section, command.text)
        console.print(table)
        return
    folder = output_folder(options.out)
    for number in options.numbers:
        started, path = time.perf_counter(), folder / f"{number}.txt"
        console.print(known[number].text, markup=False)
        with path.open("w", encoding="utf-8") as file:
            code = subprocess.run(known[number].words, stdout=file, stderr=subprocess.STDOUT).returncode
        console.print(f"exit {code} after {time.perf_counter() - started:.0f} s, output in {path}", markup=False)


if __name__ == "__main__":
    main()
