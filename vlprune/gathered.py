"""What a whole answer looked at: attention over all layers, heads and steps, to guide another model's pruning (SGL)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.api import adapter_of, guided, pruning, trace
from vlprune.engine.chunk import columns_of
from vlprune.engine.tap import Seen, TapConfig, delegate
from vlprune.errors import PruningError, UnsupportedModel
from vlprune.releases import cache_of
from vlprune.trace import ItemTrace

ROWS_AT_ONCE = 64  # attention rows that are held while they are summed


@dataclass(eq=False)
class Gathered:
    """Attention paid to every visual token of one prompt and its answer, in sum; see `gathered_attention`."""

    ends: list[int]  # ids of tokens that end an answer
    visual_ids: list[int]
    last_visual_row: bool
    pictures: list[ItemTrace] = field(default_factory=list)
    visual: Tensor | None = None  # [B, T] bool, of the prompt
    total: Tensor | None = None  # [B, T] float32
    weight: Tensor | None = None  # [B, L] float32: which rows of this call count
    alive: Tensor | None = None  # [B] bool: the answer goes on
    start: int = 0  # the first row of this call that counts anywhere
    cache: Any = None  # what beams would reorder

    @property
    def scores(self) -> list[Tensor]:
        """For every picture, in the prompt's order, [N] float32: what `vlprune.guided` takes."""
        if self.total is None or self.visual is None or not self.pictures:
            raise PruningError("no prompt with a picture was run inside gathered_attention")
        rows = [t[v] for t, v in zip(self.total, self.visual, strict=True)]
        taken = [0] * len(rows)
        found = []
        for p in self.pictures:
            found.append(rows[p.row][taken[p.row] : taken[p.row] + p.tokens])
            taken[p.row] += p.tokens
        return found

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before the core runs: which rows of this call count."""
        ids: Tensor | None = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise PruningError("gathered_attention tells pictures from text by input_ids; pass them")
        if ids.shape[1] > 1:
            cache = cache_of(kwargs)
            self._begin_prompt(ids, columns_of(kwargs.get("attention_mask"), cache, ids.shape[1]))
            if cache is not None:
                self.cache, cache.reorder_cache = cache, _no_beams  # type: ignore[method-assign]
            return
        assert self.alive is not None
        ended = torch.isin(ids[:, 0], torch.tensor(self.ends, device=ids.device, dtype=ids.dtype))
        self.alive = self.alive & ~ended  # only fed again where other rows of the batch go on
        self.weight, self.start = self.alive[:, None].float(), 0

    def _begin_prompt(self, ids: Tensor, real: Tensor | None) -> None:
        length, device = ids.shape[1], ids.device
        self.visual = torch.isin(ids, torch.tensor(self.visual_ids, device=device))
        at = torch.arange(length, device=device)
        first = torch.where(self.visual, at, -1).amax(dim=1) + (not self.last_visual_row)  # [B]
        counts = (at >= first[:, None]) & self.visual.any(dim=1, keepdim=True)
        if real is not None:
            counts = counts & (real[:, -length:].to(device) != 0)
        self.weight, self.start = counts.float(), max(int(first.amin()), 0)
        self.total = torch.zeros(ids.shape, device=device)
        self.alive = torch.ones(len(ids), dtype=torch.bool, device=device)

    def look(self, seen: Seen) -> None:
        """Add one layer's rows."""
        assert self.total is not None and self.weight is not None
        for rows in torch.arange(self.start, self.weight.shape[1], device=self.total.device).split(ROWS_AT_ONCE):
            a = seen.attention(rows)[..., : self.total.shape[1]]  # [B, H, R, T]
            self.total += torch.einsum("bhrt,br->bt", a.to(self.total.device), self.weight[:, rows])


def _no_beams(beam_idx: Tensor) -> None:
    raise PruningError(
        "gathered_attention follows one answer for each prompt; decode greedily or sample, without beams"
    )


@dataclass(eq=False)
class _Tap:
    gathered: Gathered

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kw: Any) -> Any:  # fmt: skip
        self.gathered.look(Seen.of(module, query, key, value, mask, kw))
        return delegate(module, query, key, value, mask, *args, **kw)


@contextmanager
def gathered_attention(model: nn.Module, last_visual_row: bool = True) -> Iterator[Gathered]:
    """Watch where a model looks while it answers one batch of prompts, without eager attention and without a map in memory.

        I_v = sum over layers, heads and rows t of A[t, v]

    t: the prompt's rows behind the last picture and those of every new token. The model runs unpruned meanwhile, bit
    for bit. With a small model's `scores` a large one of the same family prunes what the small one did not need:

        with vlprune.gathered_attention(small) as seen:
            draft = small.generate(**inputs)
        vlprune.wrap(large, "sgl@9:keep=0.2")
        with vlprune.guided(large, seen.scores):
            answer = large.generate(**inputs)

    Args:
        last_visual_row: count the last visual token's own row, as the authors' code does.
    Raises:
        UnsupportedModel: no adapter, or layers with a sliding window, whose keys move. PruningError: beams.
    Source: SGL, arXiv:2412.03324; NUS-HPC-AI-Lab/SGL@7e76fd2 (no licence; written from the formula).
    """
    adapter = adapter_of(model)
    if any(adapter.sliding):
        raise UnsupportedModel(f"gathered_attention adds up columns of layers that see the whole prompt; {adapter.family} has "
                               "layers with a sliding window")  # fmt: skip
    generation: Any = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    found = Gathered(ends, list(adapter.visual_ids.values()), last_visual_row)
    attentions: list[Any] = [adapter.layer_attention(layer) for layer in adapter.layers]
    with pruning(model, "random", 1.0):  # keeps all, and counts the tokens of every picture
        configs = [a.config for a in attentions]
        handle = adapter.core.register_forward_pre_hook(found.begin, with_kwargs=True)
        for attention in attentions:
            attention.config = TapConfig(attention.config, _Tap(found))
        try:
            yield found
            if found.total is not None:
                found.pictures = trace(model).pictures
        finally:
            handle.remove()
            if found.cache is not None:
                vars(found.cache).pop("reorder_cache", None)
            for attention, config in zip(attentions, configs, strict=True):
                attention.config = config


def confidence(logits: Sequence[Tensor]) -> Tensor:
    """Geometric mean of the likeliest tokens' probabilities, [B]; from S tensors [B, V] of ``generate(output_logits=True)``.

    Source: SGL, arXiv:2412.03324.
    """
    return torch.stack([step.double().log_softmax(-1).amax(-1) for step in logits]).mean(dim=0).exp()


@torch.no_grad()
def consistency(
    model: nn.Module, inputs: Mapping[str, Any], answer: Tensor, scores: Sequence[Tensor], keep: float | int = 0.05
) -> Tensor:
    """How likely a model finds its own answer when it sees the best `keep` of the visual tokens alone, [B].

    The product of the answer's probabilities, not their mean, as in the authors' code; they print it beside
    `confidence` and leave to the user from which values on the large model need not be asked.

    Args:
        inputs: the prompts, all of one length or padded at the left. answer: [B, S] new token ids.
        scores: of `gathered_attention` on the same prompts.
    Source: SGL, arXiv:2412.03324.
    """
    ids = inputs["input_ids"]
    longer = {"input_ids": torch.cat([ids, answer.to(ids)], 1)}
    for name, value in inputs.items():  # masks and kinds of tokens go on like the prompt's text
        if name != "input_ids" and isinstance(value, Tensor) and value.shape == ids.shape:
            tail = torch.ones_like if name == "attention_mask" else torch.zeros_like
            longer[name] = torch.cat([value, tail(answer.to(value))], 1)
    with pruning(model, "sgl", keep, stage="projector"), guided(model, scores):
        logits = model(**{**inputs, **longer}, use_cache=False).logits
    return sequence_probability(logits, answer)


def sequence_probability(logits: Tensor, answer: Tensor) -> Tensor:
    """Product of the probabilities of [B, S] answer ids, which end the sequence that [B, T, V] logits were made of: [B]."""
    steps = answer.shape[1]
    probabilities = logits[:, -steps - 1 : -1].double().softmax(-1)
    return probabilities.gather(-1, answer.to(logits.device)[..., None])[..., 0].prod(dim=-1)
