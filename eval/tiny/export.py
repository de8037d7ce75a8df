"""Trained weights to a standard Hugging Face folder.

From the command line:

    python -m vlprune.eval.tiny.export RUN/checkpoint.pt --out FOLDER
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from vlprune.errors import VlpruneError
from vlprune.eval.checkpoints import load_model
from vlprune.processors import image_only

from .codec import Codec
from .drawing import PATCH
from .net import NetConfig, TinyLlava, TinyNet
from .qwen import MERGE, QwenConfig, TinyQwen
from .synth import SIDE

MAX_POSITIONS = {"llava": 2048, "qwen": 4096}
PIXELS = (112 * 112, 1344 * 1008)  # of a Qwen picture; others are scaled
LLAVA_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER:{% if loop.first %} {% endif %}"
    "{% if m['content'] is string %}{{ '\\n' + m['content'] }}{% else %}"
    "{% for c in m['content'] if c['type'] == 'image' %}<image>{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ '\\n' + c['text'] }}{% endfor %}{% endif %} "
    "{% else %}ASSISTANT: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}{% endif %}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


QWEN_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def twin(config: NetConfig) -> TinyNet:
    """A network with random weights."""
    return TinyQwen(config) if isinstance(config, QwenConfig) else TinyLlava(config)


def llava_config(c: NetConfig, codec: Codec) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=c.vision_dim,
        intermediate_size=c.vision_mlp,
        num_hidden_layers=c.vision_layers,
        num_attention_heads=c.vision_heads,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=c.vision_dim,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_text_config(c, codec)),
        image_token_index=codec.image,
        image_seq_length=c.tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def qwen_config(c: QwenConfig, codec: Codec) -> Qwen2_5_VLConfig:
    vision = {
        "depth": c.vision_layers, "hidden_size": c.vision_dim, "intermediate_size": c.vision_mlp,
        "num_heads": c.vision_heads, "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2,
        "window_size": c.window * PATCH, "out_hidden_size": c.dim, "fullatt_block_indexes": list(c.full_layers),
        "in_channels": 3,
    }  # fmt: skip
    text = _text_config(c, codec)
    text["rope_parameters"]["mrope_section"] = list(c.sections)
    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text | {"hidden_act": "silu"},
        image_token_id=codec.image,
        video_token_id=codec.token("<|video_pad|>"),
        vision_start_token_id=codec.token("<|vision_start|>"),
        vision_end_token_id=codec.token("<|vision_end|>"),
    )


def _text_config(c: NetConfig, codec: Codec) -> dict[str, Any]:
    return {
        "vocab_size": c.vocabulary, "hidden_size": c.dim, "intermediate_size": c.mlp, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "rms_norm_eps": c.eps,
        "max_position_embeddings": MAX_POSITIONS[c.family],
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "bos_token_id": codec.bos, "eos_token_id": codec.eos, "pad_token_id": codec.pad,
    }  # fmt: skip


def hf_model(net: TinyNet, codec: Codec) -> LlavaForConditionalGeneration | Qwen2_5_VLForConditionalGeneration:
    """The same weights in transformers' class, float32, on the CPU.

    Raises:
        RuntimeError: a parameter has no counterpart.
    """
    if isinstance(net.config, QwenConfig):
        model = Qwen2_5_VLForConditionalGeneration(qwen_config(net.config, codec))
    else:
        model = LlavaForConditionalGeneration(llava_config(net.config, codec))
    model.load_state_dict({name: tensor.detach().float().cpu() for name, tensor in net.state_dict().items()})
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id, generation.pad_token_id = codec.bos, codec.eos, codec.pad
    return model.eval()


def hf_processor(codec: Codec) -> LlavaProcessor | Qwen2_5_VLProcessor:
    """For pictures alone: neither needs torchvision."""
    chat = codec.chat
    named = {"image_token": chat.image} | ({"video_token": "<|video_pad|>"} if codec.family == "qwen" else {})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(chat.tokenizer),
        model_max_length=MAX_POSITIONS[codec.family],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        eos_token=chat.end,
        unk_token=chat.specials[0],
        pad_token=chat.pad,
        extra_special_tokens=named,
        **({} if chat.bos is None else {"bos_token": chat.bos}),
    )
    if codec.family == "qwen":
        pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": PIXELS[0], "longest_edge": PIXELS[1]})
        processor = image_only(Qwen2_5_VLProcessor)
        return processor(image_processor=pictures, tokenizer=tokenizer, chat_template=QWEN_TEMPLATE)
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the CLS token
        chat_template=LLAVA_TEMPLATE,
    )


def save(net: TinyNet, codec: Codec, folder: Path) -> None:
    """Write config, bfloat16 weights, tokenizer, image processor and chat template."""
    hf_model(net, codec).to(torch.bfloat16).save_pretrained(folder)
    hf_processor(codec).save_pretrained(folder)
    if codec.family == "qwen":
        _describe_videos(folder / "processor_config.json")


def _describe_videos(path: Path) -> None:
    """Where torchvision is installed, transformers opens this family with a video processor or not at all."""
    described = json.loads(path.read_text())
    sizes = {key: value for key, value in described["image_processor"].items() if key != "image_processor_type"}
    described["video_processor"] = {**sizes, "video_processor_type": "Qwen2VLVideoProcessor"}
    path.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def load(net: TinyNet, folder: Path) -> None:
    """Take over the weights of a folder that `save` wrote.

    Raises:
        VlpruneError: a checkpoint of another family or of other sizes.
    """
    weights = load_model(str(folder), dtype=torch.float32).state_dict()
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise VlpruneError(f"{folder} does not fit a network of {net.config}: {error}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlprune.eval.tiny.export", description="Export a model.")
    parser.add_argument("checkpoint", type=Path, help="checkpoint.pt of a training run")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    stored = torch.load(options.checkpoint, map_location="cpu", weights_only=True)
    kind = {config.family: config for config in (NetConfig, QwenConfig)}[stored["family"]]
    net = twin(kind(**stored["config"]))
    net.load_state_dict(stored["net"])
    save(net, Codec(stored["family"]), options.out)
    for path in sorted(options.out.iterdir()):
        print(f"{path.stat().st_size:>10}  {path.name}")


if __name__ == "__main__":
    main()
