"""The support table is what the code says, and the code says the truth."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

import vlprune
from vlprune import SpecError
from vlprune.support import FILE, STAGES, fits, rows, table, variants

ROOT = Path(__file__).parent.parent


def test_the_page_is_current():
    assert (ROOT / FILE).read_text(encoding="utf-8") == table(), (
        "run `python -m vlprune.support` in the repository's root"
    )


def test_tiny_models_are_served_as_standard_checkpoints():
    for family, make in tiny.FAMILIES.items():
        model = make()[0]
        for text, pruner in variants():
            for stage in STAGES:
                plan = vlprune.Plan((vlprune.Step(pruner, vlprune.Stage(stage), vlprune.Budget(0.5)),))
                assert vlprune.supported(model, plan) == (stage in fits(pruner, family)), f"{text}@{stage} on {family}"


def test_rows_of_the_command_line():
    every, here = rows(), rows("qwen2_5_vl")
    assert {row[0] for row in every} >= {"fastv", "visionzip", "visionzip:attention=received", "debias(fastv)"}
    assert {row[0]: row[-1] for row in here}["fastv"] == "k, cache"
    assert "visionzip" not in {row[0] for row in here}
    with pytest.raises(SpecError, match="did you mean qwen2_5_vl"):
        rows("qwen25_vl")
