"""The embedded checkpoint: it opens offline through the ordinary classes, and it answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlprune.errors import SpecError
from vlprune.eval.tiny import item, items
from vlprune.eval.tiny.evaluate import Record, answer, edit_distance, evaluate, main, score
from vlprune.models import embedded
from vlprune.processors import load_processor


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, info = AutoModelForImageTextToText.from_pretrained(
        embedded(), dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval(), AutoProcessor.from_pretrained(embedded(), local_files_only=True)


def test_checkpoint_is_a_llava_of_at_most_25_mib(loaded: tuple[Any, Any]) -> None:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    model, processor = loaded
    assert isinstance(model, LlavaForConditionalGeneration)
    assert isinstance(processor, LlavaProcessor)
    assert model.config.image_seq_length == 576
    assert sum(path.stat().st_size for path in embedded().iterdir()) <= 25 * 2**20
    assert type(load_processor(embedded())) is LlavaProcessor


def test_unknown_checkpoint_names_the_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean tiny-llava"):
        embedded("tiny-lava")


def test_it_answers(loaded: tuple[Any, Any]) -> None:
    records = evaluate(*loaded, tasks=["color", "shape"], items=5, seed=40)
    assert sum(record.exact for record in records) >= 9
    assert [(r.task, r.index, r.seed) for r in records] == [(t, i, 40) for t in ("color", "shape") for i in range(5)]


def test_it_reads(loaded: tuple[Any, Any]) -> None:
    records = answer(*loaded, [*items("kv", 3, 41), item("page", 0, 41)], batch=4)
    assert sum(record.exact for record in records[:3]) >= 2
    assert records[3].character_errors < 0.1 * len(records[3].answer)


def test_batch_does_not_change_answers(loaded: tuple[Any, Any]) -> None:
    mixed = [item(task, 0, 42) for task in ("relation", "sign", "kv")]
    assert answer(*loaded, mixed, batch=1) == answer(*loaded, mixed, batch=3)


def test_scores() -> None:
    records = [Record("kv", i, 0, "?", "ABCD", output) for i, output in enumerate(["ABCD", "ABXD"])]
    result = score(records)["kv"]
    assert (result.items, result.exact, result.character_error) == (2, 0.5, 1 / 8)
    assert [edit_distance(a, b) for a, b in (("", "ab"), ("abc", "abc"), ("kitten", "sitting"))] == [2, 0, 3]


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["tiny-llava", "--items", "1", "--seed", "3", "--tasks", "letter,sign"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["tiny-llava", "task", "letter", "sign"]
