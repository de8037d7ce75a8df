"""Chat text straight to token ids, many times faster than a tokenizer and equal to it (tests compare the two)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .scenes import Turn
from .vocabulary import ASSETS, CHARACTERS, SCENE_TASKS

READ_ANSWER, SCENE_ANSWER = 1, 2  # what an answer's tokens are marked with
LOOKED_AT = (*SCENE_TASKS, "locate")  # tasks whose answers are a word or two; the others are read off


@dataclass(frozen=True)
class Chat:
    """How a family spells a conversation: prefix [image] first question ask answer end later question ask answer end ...

    `specials` are the tokenizer's first ids in order, `roles` whole words that it never splits.
    """

    tokenizer: Path
    specials: tuple[str, ...]
    roles: tuple[str, ...]
    bos: str | None
    end: str
    pad: str
    image: str
    prefix: str
    first: str
    later: str
    ask: str
    lead: str  # before the answer


CHATS = {
    "llava": Chat(
        tokenizer=ASSETS / "tokenizer.json",
        specials=("<unk>", "<s>", "</s>", "<pad>", "<image>"),
        roles=("USER:", "ASSISTANT:"),
        bos="<s>", end="</s>", pad="<pad>", image="<image>",
        prefix="<s>USER: ", first="\n", later="USER:\n", ask=" ASSISTANT:", lead=" ",
    ),
    "qwen": Chat(
        tokenizer=ASSETS / "tokenizer_qwen.json",
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
                  "<|video_pad|>"),
        roles=(),
        bos=None, end="<|im_end|>", pad="<|endoftext|>", image="<|image_pad|>",
        prefix="<|im_start|>user\n<|vision_start|>", first="<|vision_end|>", later="\n<|im_start|>user\n",
        ask="<|im_end|>\n<|im_start|>assistant\n", lead="",
    ),
}  # fmt: skip


class Codec:
    """Ids of prompts and answers in the chat format of a family."""

    def __init__(self, family: str = "llava") -> None:
        self.family, self.chat = family, CHATS[family]
        self.tokenizer = Tokenizer.from_file(str(self.chat.tokenizer))
        self.eos, self.pad, self.image = self.encode(self.chat.end + self.chat.pad + self.chat.image)
        self.bos = None if self.chat.bos is None else self.encode(self.chat.bos)[0]
        self.vocabulary = -(-self.tokenizer.get_vocab_size() // 8) * 8  # rounded up to a multiple of 8
        self.prefix = self.encode(self.chat.prefix)
        self._lead = self.encode(self.chat.lead)  # one token a character: only the words of the questions have merges
        self._characters = {character: self.encode(character)[0] for character in CHARACTERS + " \n"}
        self.question = cache(self._question)
        self._word = cache(self.encode)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def token(self, text: str) -> int:
        """The id of a special token."""
        (number,) = self.encode(text)
        return number

    def _question(self, question: str, first: bool) -> list[int]:
        return self.encode(f"{self.chat.first if first else self.chat.later}{question}{self.chat.ask}")

    def answer(self, answer: str) -> list[int]:
        if answer[:1].islower():
            return [*self._word(f"{self.chat.lead}{answer}"), self.eos]
        return [*self._lead, *(self._characters[character] for character in answer), self.eos]

    def pack(self, turns: Sequence[Turn], ids: NDArray[Any], marks: NDArray[np.uint8]) -> None:
        """As `pack`, by whether an answer is seen or read."""
        pack(self, turns, ids, marks, lambda task: SCENE_ANSWER if task in LOOKED_AT else READ_ANSWER)


class Speaks(Protocol):
    """What packing asks of a codec."""

    @property
    def pad(self) -> int: ...

    def question(self, question: str, first: bool) -> list[int]: ...

    def answer(self, answer: str) -> list[int]: ...


def pack(
    codec: Speaks, turns: Sequence[Turn], ids: NDArray[Any], marks: NDArray[np.uint8], mark: Callable[[str], int]
) -> None:
    """Write the turns that fit into one row of ids; `mark` of its task stands at the tokens of an answer, else 0."""
    ids[:], marks[:] = codec.pad, 0
    used = 0
    for turn in turns:
        question, answer = codec.question(turn.question, used == 0), codec.answer(turn.answer)
        start, stop = used + len(question), used + len(question) + len(answer)
        if stop > len(ids):
            continue
        ids[used:start], ids[start:stop] = question, answer
        marks[start:stop] = mark(turn.task)
        used = stop
