"""Code blocks of Markdown pages: found by a Markdown parser, Python run in one namespace a page, commands checked.

A fence says what it holds: `python` is run, `python notest` needs a model hub and is only compiled, `sh` are commands,
`plans` are plans as a shell splits them, `toml` is parsed, `text` is no code. A comment `<!-- setup` holds Python that runs
unseen before the first block. Outside docs/ an indented block holds commands too.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import typer
from markdown_it import MarkdownIt

from vlprune import Plan
from vlprune.cli import app

ROOT = Path(__file__).parents[1]
HAND_WRITTEN = ("git", "cd", "source")  # commands of a shell, not ours to check


@dataclass(frozen=True)
class Block:
    """A block of a page; `line` is that of its first line of code."""

    kind: str
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    found = []
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        start = 0 if token.map is None else token.map[0]
        if token.type == "fence":
            found.append(Block(token.info.strip(), token.content, start + 2))
        elif token.type == "code_block":
            found.append(Block("", token.content, start + 1))
        elif token.type == "html_block" and token.content.startswith("<!-- setup"):
            found.append(Block("python", token.content.partition("\n")[2].rpartition("-->")[0], start + 2))
    return found


def run_python(page: Path, folder: Path) -> dict[str, Any]:
    """Run a page's Python from top to bottom in one namespace; the code lies in a file, so that it has a source."""
    name = f"page_{page.stem.replace('-', '_')}"
    lines: list[str] = []
    for block in blocks(page):
        if block.kind == "python":
            lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
    path = folder / f"{name}.py"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")  # on the same lines as in the page
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return vars(module)


def commands(block: Block) -> Iterator[list[str]]:
    for line in block.code.replace("\\\n", " ").splitlines():
        if not block.kind and line.startswith("("):  # a remark among the commands of an indented block
            continue
        words = shlex.split(line, comments=True)
        if words:
            yield words


class Parsed(Exception):
    """Raised in place of running a command whose arguments were understood."""


def check_command(words: list[str]) -> None:
    """Raise unless the program that would be run takes these arguments and the plans in them are plans."""
    while re.fullmatch(r"\w+=\S*", words[0]):  # variables of the environment
        words = words[1:]
    program, rest = words[0], words[1:]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), f"make {rest}: the Makefile has {targets}"
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for asked in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
            assert set(asked.split(",")) <= extras.keys(), f"pyproject.toml has no extra {asked}"
    elif program == "python":
        assert rest[0] == "-m" or (ROOT / rest[0]).is_file(), f"python {rest}: no such file"
        if rest[0] == "-m":
            _check_module(rest[1], rest[2:])
    elif program == "vlprune":
        _check_vlprune(rest)
    elif program == "lmms-eval":
        model, given = _option(rest, "--model"), _option(rest, "--model_args")
        assert model.startswith("vlprune"), f"lmms-eval --model {model} is not ours"
        Plan.parse(dict(pair.split("=", 1) for pair in given.split(","))["plan"])
    else:
        assert program in HAND_WRITTEN, f"no test knows the command {program!r}"


def _option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def _check_vlprune(rest: list[str]) -> None:
    group = typer.main.get_command(app)
    command = group.commands[rest[0]]  # type: ignore[attr-defined]
    if command.context_settings.get("ignore_unknown_options"):  # handed on to a parser of its own
        _check_module(f"vlprune.eval.{rest[0]}", rest[1:])
        return
    with mock.patch("os.stat", return_value=Path(__file__).stat()), mock.patch("os.access", return_value=True):
        context = command.make_context(rest[0], rest[1:])  # as if the pictures it names were there
    if "plan" in context.params:
        Plan.parse(context.params["plan"])


def _check_module(name: str, rest: list[str]) -> None:
    """Parse the arguments as the module's own `main` would, and stop there."""
    module = importlib.import_module(name)
    if not hasattr(module, "main"):
        assert not rest, f"python -m {name} takes no arguments, got {rest}"
        return
    real = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *args: Any, **kw: Any) -> Any:
        options = vars(real(self, *args, **kw))
        raise Parsed(options)

    try:
        with mock.patch.object(argparse.ArgumentParser, "parse_args", parse), mock.patch("sys.argv", [name, *rest]):
            module.main(*([rest] if inspect.signature(module.main).parameters else []))
    except Parsed as done:
        for text in [p for p in (done.args[0].get("plans") or []) if isinstance(p, str) and p != "all"]:
            Plan.parse(text, None if "keep=" in text else 0.5)
        return
    raise AssertionError(f"{name} took no arguments apart")
