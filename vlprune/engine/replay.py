"""Prefill and decode without launching kernels one by one, for small batches, where launching takes longer than computing.

The prompt runs as always up to the layer where tokens leave: the tower, the choice, the layers before it. From there on
shapes are fixed, so the rest of the prefill and a decode step are recorded once as CUDA graphs and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from vlprune.engine.cache import KeptStaticLayer
from vlprune.engine.kept import Kept
from vlprune.engine.run import Reached
from vlprune.errors import PruningError, UnsupportedModel, UnsupportedStage
from vlprune.releases import CACHE

if TYPE_CHECKING:
    from vlprune.engine.engine import Engine

WARM = 2  # eager runs before a recording, in which libraries set themselves up


class Replay:
    """One wrapped model, one shape of prompts, greedy decoding with a static cache.

    Args:
        wrapped: the engine that the model has at the time, if any.
        inputs: of a prompt; later ones have the same shapes, and as many tokens that are no pictures.
        new_tokens: room in the cache behind the prompt.
    Raises:
        UnsupportedStage: the plan removes tokens at several layers, or in the cache. UnsupportedModel: positions of several
        dimensions, sliding windows or features added behind decoder layers. PruningError: rows with padding.
    """

    def __init__(self, wrapped: Callable[[], Any], inputs: Mapping[str, Any], new_tokens: int) -> None:
        engine = wrapped()
        if engine is None:
            raise PruningError("this model is not wrapped; vlprune.wrap(model, ...) does that")
        self.wrapped, self.room = wrapped, new_tokens
        self.model: Any = engine.model
        self.text, self.layers, self.plan = engine.text, list(engine.layers), str(engine.plan)
        self.start = _only_layer(engine)
        layers = self.layers
        self.length = inputs["input_ids"].shape[1]
        end = self.length + max(new_tokens, WARM)
        self.early = Cache(layers=[StaticLayer(max_cache_len=end) for _ in layers[: self.start]])
        with torch.inference_mode():
            found, self.kept = self._eager(inputs)
            self.shape = found.hidden.shape
            late = [KeptStaticLayer(end, self.kept) for _ in layers[self.start :]]
            self.cache = Cache(layers=[*self.early.layers, *late])
            self.slots = late[0].max_cache_len
            self.given = [t.clone() for t in _tensors(found, self.slots)]
            self.token = torch.zeros(len(found.hidden), 1, dtype=torch.int64, device=found.hidden.device)
            head: Any = self.model.lm_head
            self.logits = found.hidden.new_zeros(len(found.hidden), head.out_features)
            self._finish = self._record(lambda: self._late_layers(found.arguments))
            self._next = self._record(self._step)

    # ---- running

    @torch.inference_mode()
    def prefill(self, inputs: Mapping[str, Any]) -> Tensor:
        """Logits of the last token [B, V]. The tensor is the same at every call, and so is the memory of the cache."""
        found, kept = self._eager(inputs)
        if found.hidden.shape != self.shape or kept.upto != self.kept.upto:
            raise PruningError(f"this replay was made for prompts of {self.kept.upto} tokens of which {self.shape[1]} are left; this "
                               f"one has {kept.upto}, of which {found.hidden.shape[1]} are left. Make another one")  # fmt: skip
        for mine, new in zip(self.given, _tensors(found, self.slots), strict=True):
            mine.copy_(new)
        self.kept.index.copy_(kept.index)
        self._finish()
        return self.logits

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Logits [B, V] behind `token` [B, 1], which holds the likeliest next token unless something else was written there."""
        self._next()
        return self.logits

    @torch.inference_mode()
    def generate(self, inputs: Mapping[str, Any], new_tokens: int | None = None) -> Tensor:
        """[B, new] greedy tokens. It does not stop at an end token: asking for one would wait at every step."""
        new = self.room if new_tokens is None else new_tokens
        if not 1 <= new <= self.room:
            raise PruningError(f"this replay has room for {self.room} new tokens, {new} were asked for")
        self.prefill(inputs)
        tokens = [self.token.clone()]
        for _ in range(new - 1):
            self.step()
            tokens.append(self.token.clone())
        return torch.cat(tokens, 1)

    # ---- the parts

    def _eager(self, inputs: Mapping[str, Any]) -> tuple[Reached, Kept]:
        """Run a prompt up to the layer that it enters shortened."""
        engine = self.wrapped()
        if engine is None or str(engine.plan) != self.plan:
            raise PruningError(f"this replay was made for a model wrapped with {self.plan}, and it no longer is; wrap it so again, "
                               "or make another replay")  # fmt: skip
        mask = inputs.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise PruningError(
                "a replay takes rows without padding; group prompts of one length, or use model.generate"
            )
        for lay in self.early.layers:
            lay.cumulative_length.zero_()  # type: ignore[attr-defined]
        runs = engine.runs
        runs.until = self.start
        given = {k: v for k, v in inputs.items() if k != "attention_mask"}
        try:
            self.model(**given, **{CACHE: self.early}, use_cache=True, logits_to_keep=1)
        except Reached as reached:
            found = reached
        finally:
            runs.until = None
        if found.kept is None:
            raise PruningError("no tokens leave this prompt: it holds no pictures, or the budget keeps all of them")
        if not found.kept.dense:
            raise PruningError("rows keep different numbers of tokens; a replay takes rows of one length")
        return found, found.kept

    def _late_layers(self, arguments: dict[str, Any]) -> None:
        """From the layer where tokens left to the next token, on the tensors of `given`."""
        x, cos, sin, *mask = self.given
        for lay in self.cache.layers[self.start :]:
            if lay.is_initialized:
                lay.cumulative_length.zero_()  # type: ignore[attr-defined]
        own = {
            "position_embeddings": (cos, sin),
            "attention_mask": mask[0] if mask else None,
            CACHE: self.cache,
        }
        given = {k: v for k, v in arguments.items() if k != "hidden_states"} | own
        for layer in self.layers[self.start :]:
            x = layer(x, **given)
        self._choose(self.model.lm_head(self.text.norm(x[:, -1:])))

    def _step(self) -> None:
        self._choose(self.model(input_ids=self.token, use_cache=True, **{CACHE: self.cache}).logits)

    def _choose(self, logits: Tensor) -> None:
        self.logits.copy_(logits[:, -1])
        self.token.copy_(self.logits.argmax(-1, keepdim=True))

    def _record(self, run: Callable[[], None]) -> Callable[[], None]:
        """`run` as a CUDA graph; itself where there is none."""
        if not self.token.is_cuda:
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


def _tensors(found: Reached, slots: int) -> list[Tensor]:
    """What the layers read that changes with the prompt: hidden states, cos, sin and, if there is one, the mask.

    The mask gets a column for every slot of the layers' caches: those that are still empty are hidden.
    """
    mask = found.arguments.get("attention_mask")
    if mask is not None and mask.dim() == 4:
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = nn.functional.pad(mask[..., :slots], (0, max(0, slots - mask.shape[-1])), value=hidden)
    return [found.hidden, *found.arguments["position_embeddings"], *([] if mask is None else [mask])]


def _only_layer(engine: Engine) -> int:
    """The layer at which a plan removes tokens."""
    stages = [s.stage for s in engine.plan.steps]
    layers = {0 if s.name == "encoder" else s.layer for s in stages}
    if len(layers) != 1 or None in layers or engine.plan.positions != "original":
        raise UnsupportedStage(f"{engine.plan}: a replay takes plans that remove tokens at one stage before or inside the decoder "
                               "and keep their positions")  # fmt: skip
    if len({p.device for p in engine.model.parameters()}) > 1:
        raise UnsupportedModel("a replay records the work of one device, and this model lies on several devices; use model.generate, "
                               "or load the model without device_map")  # fmt: skip
    kind = engine.adapter.family
    if engine.adapter.mrope or any(engine.sliding) or hasattr(engine.text, "_deepstack_process"):
        raise UnsupportedModel(f"a replay cannot serve this {kind}: positions of several dimensions, sliding windows and features "
                               "added behind decoder layers change from step to step; use model.generate")  # fmt: skip
    return next(i for i in layers if i is not None)
