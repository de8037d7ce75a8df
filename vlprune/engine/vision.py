"""The vision side: what the tower saw, and dropping tokens before the projector.

`generate` encodes pictures before the first forward pass of the model, so nothing may rest on a run being active: what is
recorded rides on the output object of the feature method, which the library hands back into the forward pass.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.context import Context
from vlprune.engine.adapter import Adapter, Item
from vlprune.engine.tap import Seen, delegate
from vlprune.errors import PruningError
from vlprune.plan import Step
from vlprune.pruner import EncoderPruner
from vlprune.selection import Selection

CARRIER = "vlprune"  # attribute of the feature method's output object
ATTENTION_FIELDS = frozenset({"cls_attention", "received_attention", "queries", "keys", "values", "cls_value"})


@dataclass(eq=False)
class Tape:
    """What one call of the feature method left behind."""

    modality: str
    call: dict[str, Any]
    seen: dict[int, list[Seen]] = field(default_factory=dict)  # vision block -> its attention calls
    projector_inputs: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)  # per item, as handed to the language model
    items: list[Item] = field(default_factory=list)
    selections: list[Selection] = field(default_factory=list)  # stage "encoder", per item; empty: nothing was dropped
    milliseconds: float | None = None
    dropping: Dropping | None = None

    def order(self, features: Any) -> list[int]:
        """Which item each of these features is: beams repeat the tensors of an item by reference."""
        if isinstance(features, Tensor):
            return list(range(len(self.items)))
        known = {id(f): i for i, f in enumerate(self.features)}
        if any(id(f) not in known for f in features):
            return list(range(len(self.items))) if len(features) == len(self.items) else []
        return [known[id(f)] for f in features]


@dataclass(eq=False)
class Dropping:
    """Tokens still in the tower while an EncoderPruner runs. Rows are right-padded and masked where counts differ."""

    kept: list[Tensor]  # per image [n] int64 patch numbers
    states: list[Any]
    mask: Tensor | None = None  # [images, 1, 1, n] additive


class _Tapes(threading.local):
    def __init__(self) -> None:
        self.stack: list[Tape] = []

    def __deepcopy__(self, memo: Any) -> _Tapes:
        return _Tapes()

    def __reduce__(self) -> Any:
        return _Tapes, ()


@dataclass(eq=False)
class FeatureMethod:
    """Stands in the instance's `get_image_features` or the like; records one tape per call."""

    vision: Vision
    modality: str
    name: str

    @property
    def __signature__(self) -> inspect.Signature:
        """`generate` reads it to tell which inputs to hand over."""
        core = self.vision.adapter.core
        return inspect.signature(getattr(type(core), self.name).__get__(core))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        core = self.vision.adapter.core
        tape = Tape(self.modality, {**dict(enumerate(args)), **kwargs})
        self.vision.tapes.stack.append(tape)
        try:
            out = getattr(type(core), self.name)(core, *args, **kwargs)
        finally:
            self.vision.tapes.stack.pop()
        features = getattr(out, "pooler_output", out)
        tape.features = [features] if isinstance(features, Tensor) else list(features)
        tape.items = self.vision.adapter.items(self.modality, tape.call, tape.features)
        if not isinstance(out, (tuple, list, Tensor)):
            setattr(out, CARRIER, tape)
        self.vision.finished(tape)
        return out


@dataclass(eq=False)
class BlockTap:
    """Attention tap on one vision block."""

    vision: Vision
    block: int

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kw: Any) -> Any:
        if self.vision.tapes.stack:
            calls = self.vision.tapes.stack[-1].seen.setdefault(self.block, [])
            calls.append(Seen.of(module, query, key, value, mask, kw))
        return delegate(module, query, key, value, mask, *args, **kw)


@dataclass(eq=False)
class BlockHook:
    """Before one vision block: ask the pruner about the block that has just run."""

    vision: Vision
    block: int

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return self.vision.before_block(self.block, args, kwargs)


class Vision:
    """Hooks of the vision side and the stage "encoder". `step` is the plan's step there, if any."""

    def __init__(self, adapter: Adapter, step: Step | None, needs: frozenset[str]) -> None:
        self.adapter, self.step, self.needs = adapter, step, needs
        self.tapes = _Tapes()
        self.on_tape: Any = None  # the engine's callback for a tape finished inside a forward pass
        self.handles: list[Any] = []

    @property
    def progressive(self) -> bool:
        return self.step is not None and isinstance(self.step.pruner, EncoderPruner)

    def attach(self, tap: Any) -> None:
        a = self.adapter
        for modality, name in a.encoders.items():
            object.__setattr__(a.core, name, FeatureMethod(self, modality, name))
        if self.progressive:
            for i in range(a.feature_block + 1):
                tap(a.block_attention(a.blocks[i]), BlockTap(self, i))
                hook = BlockHook(self, i)
                self.handles.append(a.blocks[i].register_forward_pre_hook(hook, with_kwargs=True))
        elif self.needs & ATTENTION_FIELDS:
            tap(a.block_attention(a.blocks[a.feature_block]), BlockTap(self, a.feature_block))
        if self.step is not None or "encoder_features" in self.needs:
            self.handles.append(a.projector.register_forward_pre_hook(self._before_projector))
        if self.step is not None:
            self.handles.append(a.projector.register_forward_hook(self._after_projector))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        for name in self.adapter.encoders.values():
            self.adapter.core.__dict__.pop(name, None)

    def finished(self, tape: Tape) -> None:
        if self.on_tape is not None:
            self.on_tape(tape)

    # ---- fields of a Context

    def fields(self, tape: Tape, item: int, names: frozenset[str]) -> dict[str, Any]:
        """Context fields of the vision block the projector reads, for one item, over its N patches."""
        out: dict[str, Any] = {}
        if "encoder_features" in names:
            out["encoder_features"] = tape.projector_inputs[0][item]
        wanted = names & ATTENTION_FIELDS
        if wanted:
            out |= self.attention_fields(tape.seen[self.adapter.feature_block][0].row(item), wanted)
        return out

    def attention_fields(self, seen: Seen, names: frozenset[str], patches: int | None = None) -> dict[str, Any]:
        """`seen` holds one image; its first `patches` patches count (all by default)."""
        cls = self.adapter.cls_tokens
        span = slice(cls, None if patches is None else cls + patches)
        out: dict[str, Any] = {}
        if "cls_attention" in names:
            out["cls_attention"] = seen.attention(slice(0, 1))[0, :, 0, span]
        if "received_attention" in names:
            from vlprune.ops import received_attention

            out["received_attention"] = received_attention(seen.query, seen.key, scale=seen.scale, heads="none")[0, :, span]
        for name, tensor in (("queries", seen.query), ("keys", seen.key), ("values", seen.value)):
            if name in names:
                out[name] = tensor[0, :, span]
        if "cls_value" in names:
            out["cls_value"] = seen.value[0, :, 0]
        return out

    # ---- stage "encoder"

    def _before_projector(self, module: nn.Module, args: Any) -> Any:
        if not self.tapes.stack:
            return None
        tape, x = self.tapes.stack[-1], args[0]
        if self.step is None:
            tape.projector_inputs.append(x.detach())
            return None
        tape.projector_inputs.append(x.detach())
        if tape.dropping is not None:
            n = self._patches
            keep = self.step.budget.count(n)
            chosen = [Selection(k).check(n, keep, self.step.pruner.adaptive) for k in tape.dropping.kept]
            tape.selections = chosen if keep < n else []
            return None
        n, keep = x.shape[1], self.step.budget.count(x.shape[1])
        pruner = self.step.pruner
        for i in range(len(x)):
            fields = self.fields(tape, i, frozenset(pruner.needs) - {"encoder_features"})
            ctx = self._context(tape, keep, x[i].detach(), fields)
            tape.selections.append(pruner.select(ctx).check(n, keep, pruner.adaptive))
        if keep == n and all(s.merge is None for s in tape.selections):
            tape.selections = []
            return None
        if len({len(s.kept) for s in tape.selections}) != 1:
            raise PruningError(f"{pruner.name} kept different counts of the pictures of one call; run them one by one")
        return (torch.stack([s.apply(row) for s, row in zip(tape.selections, x, strict=True)]), *args[1:])

    def _after_projector(self, module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        """Zeros where tokens were dropped: placeholder counts and packing stay as the model knows them."""
        if not self.tapes.stack or not self.tapes.stack[-1].selections:
            return None
        kept = torch.stack([s.kept for s in self.tapes.stack[-1].selections])
        full = out.new_zeros(out.shape[0], self._patches, out.shape[-1])
        return full.scatter(1, kept[..., None].expand(-1, -1, out.shape[-1]), out)

    @property
    def _patches(self) -> int:
        return self.adapter.bare_item(0).length

    def _context(self, tape: Tape, keep: int, features: Tensor, fields: dict[str, Any], **more: Any) -> Context:
        grid = self.adapter.bare_item(0).grid
        names = frozenset(self.step.pruner.needs) if self.step else frozenset()
        if "encoder_features" in names:
            fields["encoder_features"] = features
        if "project" in names:
            fields["project"] = self.adapter.projector
        if "generator" in names:
            fields["generator"] = torch.Generator().manual_seed(0)
        return Context(keep=keep, grids=(grid,), features=features, **fields, **more)

    def before_block(self, block: int, args: Any, kwargs: dict[str, Any]) -> Any:
        if not self.tapes.stack or self.step is None:
            return None
        tape, cls = self.tapes.stack[-1], self.adapter.cls_tokens
        x = args[0] if args else kwargs["hidden_states"]
        if block == 0:
            patches = torch.arange(x.shape[1] - cls, device=x.device)
            tape.dropping = Dropping([patches] * len(x), [self.step.pruner.start() for _ in x])  # type: ignore[attr-defined]
            return None
        drop = tape.dropping
        assert drop is not None
        seen = tape.seen.pop(block - 1)[-1]
        x, changed = self._drop(drop, block - 1, seen, x)
        if not changed and drop.mask is None:
            return None
        mask = drop.mask if drop.mask is None else drop.mask.expand(-1, -1, x.shape[1], -1)
        if args:
            return (x, mask, *args[2:]), kwargs
        return args, {**kwargs, "hidden_states": x, "attention_mask": mask}

    def _drop(self, drop: Dropping, block: int, seen: Seen, x: Tensor) -> tuple[Tensor, bool]:
        assert self.step is not None
        cls, pruner = self.adapter.cls_tokens, self.step.pruner
        assert isinstance(pruner, EncoderPruner)
        tape = self.tapes.stack[-1]
        keep = self.step.budget.count(self._patches)
        rows, changed = [], False
        for b in range(len(x)):
            n = len(drop.kept[b])
            fields = self.attention_fields(seen.row(b), frozenset(pruner.needs) & ATTENTION_FIELDS, n)
            ctx = self._context(tape, keep, x[b, cls : cls + n].detach(), fields, layer=block,
                                layers=len(self.adapter.blocks), index=drop.kept[b])  # fmt: skip
            chosen, drop.states[b] = pruner.step(ctx, drop.states[b])
            row = x[b, : cls + n]
            if chosen is not None and len(chosen.kept) < n:
                drop.kept[b] = drop.kept[b][chosen.kept]
                row = torch.cat([row[:cls], row[cls:][chosen.kept]])
                changed = True
            rows.append(row)
        if not changed:
            return x, False
        lengths = [len(r) for r in rows]
        width = max(lengths)
        drop.mask = None
        if min(lengths) < width:  # pictures lose different numbers: pad, and let nobody look at the padding
            drop.mask = torch.zeros(len(rows), 1, 1, width, dtype=x.dtype, device=x.device)
            for b, n in enumerate(lengths):
                drop.mask[b, ..., n:] = torch.finfo(x.dtype).min
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), True
