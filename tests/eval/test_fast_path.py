"""The timing of replays: three ways, nothing timed that disagrees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vlprune
from vlprune.errors import PruningError
from vlprune.eval import shapes
from vlprune.eval.fast import agreement, main


def test_three_ways_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--visual", "64", "--text", "8", "--new", "3", "--dtype", "float32", "--device", "cpu", "--repeats", "2"]
    main(["tiny", "--plan", "fastv@2:keep=0.25", *options, "--warmup", "0", "--output", str(tmp_path)])
    data = json.loads((tmp_path / "fast.json").read_text())
    assert list(data["times"]) == ["unpruned", "fastv@2:keep=0.25", "fastv@2:keep=0.25, replayed"]
    assert all(part["median"] > 0 for way in data["times"].values() for part in way.values())
    assert data["agreement"]["equal"] == 1
    assert data["agreement"]["error"] < 1e-4
    assert "100% of tokens equal" in capsys.readouterr().out


def test_a_wrong_replay_is_not_timed() -> None:
    model: Any = shapes.load("tiny", torch.float32, "sdpa", torch.device("cpu")).model
    prompt = shapes.random_prompt(model, 1, 64, 8)
    vlprune.wrap(model, "uniform:keep=0.25")
    fast = vlprune.replay(model, prompt.inputs, 4)
    assert agreement(model, fast, prompt, 3)["equal"] == 1
    step = fast._next

    def forget() -> None:
        for layer in fast.cache.layers:
            layer.values.zero_()
        step()

    fast._next = forget
    with pytest.raises(PruningError, match="of their size away"):
        agreement(model, fast, prompt, 3)
