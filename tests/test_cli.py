"""The command line, as a person types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from vlprune import cli
from vlprune.cli import app
from vlprune.errors import VlpruneError
from vlprune.eval.tiny import items


def test_list_names_every_pruner_and_filters_by_family() -> None:
    everything = CliRunner().invoke(app, ["list"], env={"COLUMNS": "300"}).output
    assert all(name in everything for name in ("fastv", "visionzip", "holov", "fastocr"))
    fits = CliRunner().invoke(app, ["list", "--model", "qwen2_5_vl"], env={"COLUMNS": "300"}).output
    assert "divprune" in fits
    assert "fits at" in fits


def test_show_answers_and_draws(tmp_path: Path) -> None:
    item = items("color", 1, seed=3)[0]
    picture, out = tmp_path / "picture.png", tmp_path / "kept.png"
    item.image.save(picture)
    result = CliRunner().invoke(
        app, ["show", str(picture), "--prompt", item.question, "--plan", "uniform:keep=0.5", "--out", str(out)],
        env={"COLUMNS": "200"},
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"all tokens : {item.answer}" in result.output
    assert "576 -> 288" in result.output
    assert Image.open(out).size == item.image.size


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "README.md", "--prompt", "?", "--plan", "holo:keep=0.5"], "did you mean"),
        (["show", "README.md", "--prompt", "?"], "cannot be read as a picture"),
        (["show", "README.md", "--prompt", "?", "--out", "kept"], "--out kept is to be a page or a picture"),
        (["list", "--model", "qwen9"], "no adapter is called"),
        (["compare", "no-such-model"], "no embedded model"),
    ],
)
def test_errors_are_one_message(arguments: list[str], says: str) -> None:
    code = "import sys; from vlprune.cli import main; sys.argv = ['vlprune', *sys.argv[1:]]; main()"
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120,
                         cwd=Path(__file__).parents[1])  # fmt: skip
    assert run.returncode == 2
    assert says in " ".join(run.stderr.split())
    assert "Traceback" not in run.stderr


def test_brackets_of_a_message_are_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise VlpruneError("this needs scipy: pip install 'vlprune[eval]'")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "pip install 'vlprune[eval]'" in capsys.readouterr().err
