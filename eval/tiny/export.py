"""Trained weights to a standard Hugging Face folder.

From the command line:

    python -m vlprune.eval.tiny.export RUN/checkpoint.pt --out FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .codec import TOKENIZER, Codec
from .drawing import PATCH
from .net import NetConfig, TinyLlava
from .synth import SIDE

MAX_POSITIONS = 2048
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER:{% if loop.first %} {% endif %}"
    "{% if m['content'] is string %}{{ '\\n' + m['content'] }}{% else %}"
    "{% for c in m['content'] if c['type'] == 'image' %}<image>{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ '\\n' + c['text'] }}{% endfor %}{% endif %} "
    "{% else %}ASSISTANT: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}{% endif %}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def hf_config(c: NetConfig, codec: Codec) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=c.vision_dim,
        intermediate_size=c.vision_mlp,
        num_hidden_layers=c.vision_layers,
        num_attention_heads=c.vision_heads,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=c.vision_dim,
    )
    text = LlamaConfig(
        vocab_size=c.vocabulary,
        hidden_size=c.dim,
        intermediate_size=c.mlp,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.heads,
        rms_norm_eps=c.eps,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        bos_token_id=codec.bos,
        eos_token_id=codec.eos,
        pad_token_id=codec.pad,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=codec.image,
        image_seq_length=c.tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def hf_model(net: TinyLlava, codec: Codec) -> LlavaForConditionalGeneration:
    """The same weights in transformers' class, float32, on the CPU.

    Raises:
        RuntimeError: a parameter has no counterpart.
    """
    model = LlavaForConditionalGeneration(hf_config(net.config, codec))
    model.load_state_dict({name: tensor.detach().float().cpu() for name, tensor in net.state_dict().items()})
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id, generation.pad_token_id = codec.bos, codec.eos, codec.pad
    return model.eval()


def hf_processor() -> LlavaProcessor:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(TOKENIZER),
        model_max_length=MAX_POSITIONS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the CLS token
        chat_template=CHAT_TEMPLATE,
    )


def save(net: TinyLlava, codec: Codec, folder: Path) -> None:
    """Write config, bfloat16 weights, tokenizer, image processor and chat template."""
    hf_model(net, codec).to(torch.bfloat16).save_pretrained(folder)
    hf_processor().save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlprune.eval.tiny.export", description="Export a model.")
    parser.add_argument("checkpoint", type=Path, help="checkpoint.pt of a training run")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    stored = torch.load(options.checkpoint, map_location="cpu", weights_only=True)
    net = TinyLlava(NetConfig(**stored["config"]))
    net.load_state_dict(stored["net"])
    save(net, Codec(), options.out)
    for path in sorted(options.out.iterdir()):
        print(f"{path.stat().st_size:>10}  {path.name}")


if __name__ == "__main__":
    main()
