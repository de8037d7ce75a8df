"""The least that a pruned prefill can take: the same numbers of tokens in every layer, and nothing chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import vlprune
from vlprune.api import adapter_of
from vlprune.eval.shapes import Prompt
from vlprune.eval.timing import Marks, prefill, synchronise
from vlprune.releases import CACHE


@dataclass(frozen=True)
class Lengths:
    """Tokens of a row: in every decoder layer while the prompt runs, and in every layer's cache behind it."""

    layers: tuple[int, ...]
    slots: tuple[int, ...]


@dataclass(eq=False)
class Floors:
    """For one model and one prompt size. A pruned run with the same lengths cannot be faster."""

    model: Any  # unwrapped
    prompt: Prompt
    new: int  # decode steps

    @torch.inference_mode()
    def native(self, lengths: Lengths) -> dict[str, float]:
        """The bare language model on embeddings that were short from the start; "language_floor", "decode_floor"."""
        device, text = self.model.device, adapter_of(self.model).text
        shape = self.prompt.batch, lengths.layers[0], text.get_input_embeddings().embedding_dim
        embeds = torch.randn(shape, device=device, dtype=self.model.dtype)
        one = embeds[:, :1].contiguous()
        cache, marks = DynamicCache(config=text.config), Marks(device)
        given = {}
        if "attention_mask" in self.prompt.inputs:  # the library looks whether all of it is one
            given["attention_mask"] = torch.ones(shape[:2], dtype=torch.int64, device=device)
        with cut(text.layers, lengths, lengths.layers[0]):
            synchronise(device)
            marks.set("start")
            out = text(inputs_embeds=embeds, use_cache=True, **{CACHE: cache}, **given)
            self.model.lm_head(out.last_hidden_state[:, -1:])
            marks.set("prefilled")
            for layer, n in zip(cache.layers, lengths.slots, strict=True):
                layer.keys, layer.values = layer.keys[:, :, :n].contiguous(), layer.values[:, :, :n].contiguous()
            synchronise(device)
            marks.set("decode")
            for _ in range(self.new):
                out = text(inputs_embeds=one, use_cache=True, **{CACHE: cache})
                self.model.lm_head(out.last_hidden_state).argmax(-1)
            marks.set("end")
        return {"language_floor": marks.milliseconds("start", "prefilled"),
                "decode_floor": marks.milliseconds("decode", "end") / self.new}  # fmt: skip

    @torch.inference_mode()
    def whole(self, lengths: Lengths) -> dict[str, float]:
        """The unpruned model on the prompt, tower included; decoder layers take the first tokens of their input."""
        text = adapter_of(self.model).text
        if hasattr(text, "_deepstack_process"):  # adds to tokens that are no longer there
            return {}
        whole = len(self.prompt.inputs["input_ids"][0])
        marks = Marks(self.model.device)
        with cut(text.layers, lengths, whole):
            prefill(self.model, self.prompt.inputs, marks)
        return {"prefill_floor": marks.milliseconds("start", "end")}


def prefill_lengths(prompt: Prompt, trace: vlprune.Trace, layers: int) -> tuple[int, ...]:
    """Tokens of a row in every decoder layer while the prompt runs; a "cache" stage acts only afterwards."""
    cuts = {0 if s.stage in ("encoder", "projector") else int(s.stage): s.kept
            for s in trace.stages if s.stage not in ("cache", "decode")}  # fmt: skip
    left, lengths = trace.visual, []
    for layer in range(layers):
        left = cuts.get(layer, left)
        lengths.append(math.ceil(left / prompt.batch) + prompt.text)
    return tuple(lengths)


def decoder_flops(config: Any, lengths: Sequence[int], batch: int) -> float:
    """Operations of the decoder layers for a prompt; a multiply-add counts as two, norms and activations as none.

        sum_l  2 n_l (2 D H d + 2 D Hkv d + 3 D F) + 2 n_l^2 H d

    n_l: tokens of a row in layer l; D, F: widths of the model and of its MLP. The last term is Q K^T and A V, of which
    a causal model needs half.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    d = getattr(config, "head_dim", None) or width // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    weights = 2 * width * heads * d + 2 * width * kv_heads * d + 3 * width * config.intermediate_size
    return float(batch * sum(2 * n * weights + 2 * n * n * heads * d for n in lengths))


@contextmanager
def cut(layers: nn.ModuleList, lengths: Lengths, given: int) -> Iterator[None]:
    """Slice what enters each decoder layer to its first tokens: the least that any removal must do.

    given: tokens of a row that the decoder is called with.
    """

    def hook(i: int) -> Callable[..., Any]:
        def shorten(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            new, mask, n = dict(kwargs), kwargs.get("attention_mask"), lengths.layers[i]
            if x.shape[1] > 1:  # the prompt
                x, columns = x[:, :n], n
                new["position_embeddings"] = tuple(t[..., :n, :] for t in kwargs["position_embeddings"])
                new["position_ids"] = None
            else:
                columns = kwargs[CACHE].layers[i].keys.shape[2] + 1
            if isinstance(mask, Tensor):
                new["attention_mask"] = mask[..., : x.shape[1], :columns]
            if args:
                return (x, *args[1:]), new
            return args, {**new, "hidden_states": x}

        return shorten

    shorter = [i for i, n in enumerate(lengths.layers) if n < given or lengths.slots[i] != lengths.slots[0]]
    handles = [layers[i].register_forward_pre_hook(hook(i), with_kwargs=True) for i in shorter]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
