"""Every command of BENCHMARKS.md is one that its program still understands."""

from __future__ import annotations

import argparse
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from vlprune.errors import SpecError
from vlprune.eval import figures
from vlprune.eval.figures import Command, commands

FOUND = commands((Path(__file__).parents[2] / "BENCHMARKS.md").read_text(encoding="utf-8"))


class ParsedError(Exception):
    """The arguments were understood; nothing is run."""


@pytest.mark.parametrize("command", FOUND, ids=lambda c: c.text[:60])
def test_a_command_is_understood(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        parse(self, *args, **kwargs)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    words = [w for w in shlex.split(command.text) if "=" not in w.partition(":")[0] or w.startswith("-")]
    words = ["vlprune.eval." + words[1], *words[2:]] if words[0] == "vlprune" else words[2:]
    with pytest.raises(ParsedError):
        import_module(words[0]).main(words[1:])


def test_commands_are_found_and_joined() -> None:
    text = "# One\n\n    python -m vlprune.eval.bench a \\\n        --plans b\n\nprose `python -m vlprune`\n## Two\n    X=1 vlprune compare c\n"
    assert commands(text) == [
        Command("One", "python -m vlprune.eval.bench a --plans b"),
        Command("Two", "X=1 vlprune compare c"),
    ]
    assert len(FOUND) > 12


def test_they_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "BENCHMARKS.md").write_text("# One\n\n    A=5 python -m vlprune.eval.figures --help\n")
    monkeypatch.chdir(tmp_path)
    figures.main(["1", "--out", "found"])
    assert "commands to run; none lists them" in (tmp_path / "found" / "1.txt").read_text()
    with pytest.raises(SpecError, match="there is no command 2; they are 1 to 1"):
        figures.main(["2"])
