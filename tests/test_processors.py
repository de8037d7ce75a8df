"""load_processor opens every family's processor, with torchvision and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.utils import is_torchvision_available

from vlprune.processors import image_only, load_processor

QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
ONEVISION_TOKENS = {"image_token": "<image>", "video_token": "<video>"}
FAMILIES = {
    "Qwen2VL": QWEN_TOKENS,
    "Qwen2_5_VL": QWEN_TOKENS,
    "Qwen3VL": QWEN_TOKENS,
    "LlavaOnevision": ONEVISION_TOKENS,
}


def tokenizer(tokens: dict[str, str]) -> Any:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<end>", *tokens.values()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(["a few words are enough"], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<end>", pad_token="<end>", extra_special_tokens=tokens
    )


def save_folder(family: str, folder: Path) -> Any:
    """A config and a processor as a hub folder holds them; no weights."""
    getattr(transformers, f"{family}Config")().save_pretrained(folder)
    if family == "LlavaOnevision":
        images = transformers.LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28})
        options = {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}
    else:
        images = transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
        options = {}
    cls = image_only(getattr(transformers, f"{family}Processor"))
    processor = cls(image_processor=images, tokenizer=tokenizer(FAMILIES[family]), chat_template="-", **options)
    processor.save_pretrained(folder)
    return processor


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_video_open(family: str, tmp_path: Path) -> None:
    saved = save_folder(family, tmp_path)
    loaded = load_processor(tmp_path)
    assert type(loaded).__name__ == f"{family}Processor"
    assert isinstance(loaded, getattr(transformers, f"{family}Processor"))
    text, picture = f"{FAMILIES[family]['image_token']} a few words", Image.new("RGB", (56, 84), "red")
    one, other = (p(images=[picture], text=[text], return_tensors="pt") for p in (saved, loaded))
    assert one["input_ids"].tolist() == other["input_ids"].tolist()
    assert one["input_ids"].shape[1] > 3
    assert one["pixel_values"].shape == other["pixel_values"].shape


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_folder_names_the_official_class(family: str, tmp_path: Path) -> None:
    save_folder(family, tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == f"{family}Processor"


@pytest.mark.skipif(is_torchvision_available(), reason="needs an environment without torchvision")
def test_auto_processor_alone_fails_without_torchvision(tmp_path: Path) -> None:
    save_folder("Qwen2_5_VL", tmp_path)
    with pytest.raises((OSError, ImportError, AttributeError)):
        transformers.AutoProcessor.from_pretrained(tmp_path)


def test_other_errors_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="missing-folder"):
        load_processor(tmp_path / "missing-folder")

    def broken(_: Any) -> None:
        raise OSError("the tokenizer is damaged")

    save_folder("Qwen2_5_VL", tmp_path)
    monkeypatch.setattr("vlprune.processors.AutoProcessor.from_pretrained", broken)
    monkeypatch.setattr("vlprune.processors.is_torchvision_available", lambda: True)
    with pytest.raises(OSError, match="the tokenizer is damaged"):
        load_processor(tmp_path)


def test_without_video_part_the_error_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.LlavaConfig().save_pretrained(tmp_path)  # a folder without a tokenizer
    with pytest.raises((OSError, ValueError)):
        load_processor(tmp_path)
