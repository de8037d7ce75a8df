"""The embedded checkpoints: they open offline through the ordinary classes, and they answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vlprune.errors import SpecError
from vlprune.eval.tiny import item, items
from vlprune.eval.tiny.evaluate import Record, answer, edit_distance, evaluate, main, prompt, score
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


# ---- tiny-qwen2.5-vl

QWEN = "tiny-qwen2.5-vl"


@pytest.fixture(scope="module")
def qwen() -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(
        embedded(QWEN), dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval(), load_processor(embedded(QWEN))


def test_qwen_checkpoint_is_standard_and_at_most_25_mib(qwen: tuple[Any, Any]) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    model, processor = qwen
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    assert isinstance(processor, Qwen2_5_VLProcessor)
    assert sum(path.stat().st_size for path in embedded(QWEN).iterdir()) <= 25 * 2**20
    assert (embedded(QWEN) / "README.md").is_file()


def test_qwen_folder_describes_a_video_processor() -> None:
    """Without one, transformers cannot open the folder where torchvision is installed; no video was trained on."""
    described = json.loads((embedded(QWEN) / "processor_config.json").read_text())
    assert described["video_processor"]["video_processor_type"] == "Qwen2VLVideoProcessor"
    assert described["video_processor"]["size"] == described["image_processor"]["size"]


def test_qwen_sees_a_token_per_28_pixels(qwen: tuple[Any, Any]) -> None:
    inputs = prompt(qwen[1], [item("document", 2, 1)])
    assert inputs["image_grid_thw"].tolist() == [[1, 80, 56]]
    assert int((inputs["input_ids"] == qwen[0].config.image_token_id).sum()) == 1120


def test_qwen_answers(qwen: tuple[Any, Any]) -> None:
    records = evaluate(*qwen, tasks=["color", "kv"], items=4, seed=40, size=(448, 336))
    assert sum(record.exact for record in records) >= 7


def test_qwen_reads_a_sheet(qwen: tuple[Any, Any]) -> None:
    (record,) = answer(*qwen, [item("document", 4, 6)])
    assert record.character_errors <= 0.05 * len(record.answer)


def test_exported_weights_are_the_shipped_ones(tmp_path: Path) -> None:
    """The training twin takes the folder over and writes it again, byte for byte, model card aside."""
    from vlprune.eval.tiny import export
    from vlprune.eval.tiny.codec import Codec
    from vlprune.eval.tiny.qwen import QwenConfig, TinyQwen

    net = TinyQwen(QwenConfig())
    export.load(net, embedded(QWEN))
    export.save(net, Codec("qwen"), tmp_path)
    for path in embedded(QWEN).iterdir():
        if path.suffix in (".safetensors", ".jinja") or path.name in ("tokenizer.json", "processor_config.json"):
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
