"""Build the stored assets: the glyph atlas and the tokenizers.

    python -m vlprune.eval.tiny.build_assets --out FOLDER

Needs matplotlib for the DejaVu fonts it ships. Everything else in this package reads the stored files, so that
pictures depend neither on a font renderer nor on its version.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .codec import CHATS, Chat
from .vocabulary import ASSETS, CHARACTERS, COLORS, SHAPES, all_questions

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold")
SIZES = (12, 13, 14, 15, 16, 18, 20, 22, 24, 28, 32, 40)


def build_atlas(path: Path) -> None:
    """All characters of one font and size side by side, with their advances and that of a space."""
    import matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    data: dict[str, Any] = {"sizes": np.array(SIZES)}
    for number, name in enumerate(FONTS):
        for size in SIZES:
            font = ImageFont.truetype(fonts / f"{name}.ttf", size, layout_engine=ImageFont.Layout.BASIC)
            boxes = [font.getbbox(c, anchor="ls") for c in CHARACTERS]
            top, bottom = int(min(box[1] for box in boxes)), int(max(box[3] for box in boxes))
            cells = []
            for character in CHARACTERS:
                cell = Image.new("L", (round(font.getlength(character)), bottom - top))
                ImageDraw.Draw(cell).text((0, -top), character, fill=255, font=font, anchor="ls")
                cells.append(np.asarray(cell))
            data[f"g{number}_{size}"] = np.concatenate(cells, axis=1)
            data[f"w{number}_{size}"] = np.array([cell.shape[1] for cell in cells], np.int16)
            data[f"s{number}_{size}"] = np.array(round(font.getlength(" ")), np.int16)
    np.savez_compressed(path, **data)


def build_tokenizer(chat: Chat, path: Path) -> None:
    """Byte-level BPE with merges for the words of questions and answers; upper-case text stays a token a character."""
    words = {word for question in all_questions() for word in question.replace("?", " ").replace(".", " ").split()}
    words |= {*COLORS, *SHAPES, "yes", "no", "user", "assistant"}
    ordered = sorted(word for word in words if not word.isdigit())
    tokenizer = Tokenizer(models.BPE(unk_token=chat.specials[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = [chr(code) for code in range(33, 127)] + ["\u0120", "\u010a"]  # the last two: space and line break
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=1,
        special_tokens=[*chat.specials, *chat.roles],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator((ordered + [f" {word}" for word in ordered]) * 4, trainer)
    if chat.bos is not None:
        start = chat.bos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", pair=f"{start} $A $B", special_tokens=[(start, tokenizer.token_to_id(start))]
        )
    tokenizer.add_tokens([AddedToken(role, normalized=False, special=False) for role in chat.roles])
    tokenizer.save(str(path))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlprune.eval.tiny.build_assets", description="Build the assets.")
    parser.add_argument("--out", type=Path, default=ASSETS)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    build_atlas(options.out / "glyphs.npz")
    for chat in CHATS.values():
        build_tokenizer(chat, options.out / chat.tokenizer.name)


if __name__ == "__main__":
    main()
