"""A small bank of drawn things, lines and one typeface, and a random language model of SmolLM2's width."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vlprune.eval.smol.language import END, START, Language
from vlprune.eval.smol.sources import INDEX, KINDS, SPLITS, Bank

TONE = 40  # of the ink on the toy page
LINES = (
    "alpha beta gamma delta",
    "one two three four five",
    "the quick brown fox",
    "jumps over a lazy dog",
    "and so on it goes",
)


def color_of(kind: str) -> tuple[int, int, int]:
    """A tone of its own for each kind, more colourful than any ground; a little brighter, it still fits a byte."""
    number = list(KINDS).index(kind)
    return 200, 8 * number, 200 - 8 * number


def toy_bank(folder: Path) -> Path:
    """Every kind has one stamp, a filled rectangle 100 x 60; both splits hold the same."""
    font = ImageFont.load_default(18)
    (folder / "toy.ttf").write_bytes(font.path.getvalue())  # type: ignore[union-attr]
    page = Image.new("L", (900, 400), 250)
    draw, blocks = ImageDraw.Draw(page), []
    for row, line in enumerate(LINES):
        words, left = [], 60
        for word in line.split():
            right = left + round(font.getlength(word))
            draw.text((left, 50 + 30 * row), word, fill=TONE, font=font)
            words.append([word, left, 50 + 30 * row, right + 1, 50 + 30 * row + 24])
            left = right + 8
        blocks.append(words)
    draw.text((500, 52), "beside", fill=0, font=font)  # no word of any line
    page.save(folder / "page.png")
    stamps = []
    for kind in KINDS:
        pixels = np.full((60, 100, 4), 255, np.uint8)
        pixels[..., :3] = color_of(kind)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        (folder / f"{kind}.png").write_bytes(stream.getvalue())
        stamps.append({"file": f"{kind}.png", "kind": kind, "name": f"A {kind}."})
    split = {
        "stamps": stamps,
        "pages": [{"file": "page.png", "manual": "toy", "blocks": [blocks]}],
        "fonts": ["toy.ttf"],
    }
    (folder / INDEX).write_text(json.dumps(dict.fromkeys(SPLITS, split)))
    return folder


def open_toy_bank(folder: Path) -> Bank:
    folder.mkdir(parents=True, exist_ok=True)
    return Bank.open("train", toy_bank(folder))


def toy_language(raw: bool = False) -> Language:
    """Two layers, 576 wide, 9 query and 3 key heads; a byte-level tokenizer with SmolLM2's special tokens.

    `raw` is as a package would have it, without `<image>`.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(["what is at the top left? how many are there? read line 2."] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=576, intermediate_size=64, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        rms_norm_eps=1e-5, max_position_embeddings=2048, bos_token_id=None, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    return Language(model, tokenizer) if raw else Language.of(model, tokenizer)
