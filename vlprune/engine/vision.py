"""The vision side: what the tower saw, and stage "encoder" where a pruner chooses once, before the projector.

`generate` encodes pictures before the first forward pass of the model, so nothing may rest on a run being active: what is
recorded rides on the output object of the feature method, which the library hands back into the forward pass.
"""

from __future__ import annotations

import inspect
import math
import threading
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.context import Choose, Context
from vlprune.engine.adapter import Adapter, Item
from vlprune.engine.kept import Cut, Layout, Span, upload
from vlprune.engine.merge import entries_of
from vlprune.engine.tap import Seen, delegate
from vlprune.errors import PruningError
from vlprune.ops import gather_tokens, received_attention
from vlprune.plan import Step
from vlprune.pruner import EncoderPruner
from vlprune.selection import Selection

CARRIER = "vlprune"  # attribute of the feature method's output object
EARLY_FIELDS = frozenset({"early_cls_attention", "early_received_attention"})  # of a block that the pruner names
FINAL_FIELDS = frozenset({"final_cls_attention", "final_keys"})  # of the tower's last block
FEATURE_FIELDS = frozenset(
    {"cls_attention", "received_attention", "encoder_rows", "queries", "keys", "values", "cls_value"}
)
ATTENTION_FIELDS = FEATURE_FIELDS | EARLY_FIELDS | FINAL_FIELDS
ROWS_AT_ONCE = 128  # attention rows of a vision layer that are held while they are summed


@dataclass(eq=False)
class Tape:
    """What one call of the feature method left behind."""

    modality: str
    call: dict[str, Any]  # the method's arguments by name
    items: list[Item] = field(default_factory=list)
    seen: dict[int, list[Seen]] = field(default_factory=dict)  # vision block -> its attention calls
    rows: Tensor | None = None  # [U, Dv] input of the projector, in the tower's order
    shape: tuple[int, ...] = ()  # of U, as the projector's output has it
    selections: dict[int, Selection] = field(default_factory=dict)  # item -> what stage "encoder" left of it
    places: Tensor | None = None  # the row each survivor stands at, where the projector saw survivors only
    leaving: Any = None  # the tokens still in the tower while an EncoderPruner runs
    choosing: bool = False  # a pruner is at work and may call the projector as a function
    memo: dict[str, list[Tensor]] = field(default_factory=dict)  # field -> one tensor per item
    mixed: dict[Choose, list[Tensor]] = field(default_factory=dict)  # rows a pruner chose -> their sum for each item


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
        return inspect.signature(self._method)

    @property
    def _method(self) -> Any:
        core = self.vision.adapter.core
        return getattr(type(core), self.name).__get__(core)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        vision = self.vision
        if vision.tapes.stack:  # the method for videos may call the one for images
            return self._method(*args, **kwargs)
        tape = Tape(self.modality, {**dict(zip(self.__signature__.parameters, args, strict=False)), **kwargs})
        vision.tapes.stack.append(tape)
        try:
            out = self._method(*args, **kwargs)
        finally:
            vision.tapes.stack.pop()
        features = getattr(out, "pooler_output", out)
        parts = [features] if isinstance(features, Tensor) else features
        tokens = sum(f.numel() // f.shape[-1] for f in parts)
        tape.items = tape.items or vision.adapter.items(tape.modality, tape.call, tokens)
        if sum(item.length for item in tape.items) < tokens:
            raise PruningError(f"the {vision.adapter.family} adapter counts {[i.length for i in tape.items]} tokens for pictures "
                               f"that have {tokens}; this checkpoint packs them in a way the adapter does not know")  # fmt: skip
        if not isinstance(out, (tuple, list, Tensor)):
            setattr(out, CARRIER, tape)
        vision.finished(tape)
        return out


@dataclass(eq=False)
class BlockTap:
    """Attention tap on one vision block."""

    vision: Vision
    block: int

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kw: Any
    ) -> Any:
        if self.vision.tapes.stack:
            tape = self.vision.tapes.stack[-1]
            ends = kw.get("cu_seq_lens_q")  # flash: all pictures, frames or windows in one call
            lengths = self.vision.adapter.segments(tape.call) if ends is None else ends.diff().tolist()
            seen = Seen.of(module, query, key, value, mask, kw)
            tape.seen.setdefault(self.block, []).extend(seen.split(lengths) if lengths else [seen])
        return delegate(module, query, key, value, mask, *args, **kw)


class Vision:
    """Hooks of the vision side. `step` is the plan's step at stage "encoder", if any; `early` a block of the tower."""

    def __init__(self, adapter: Adapter, step: Step | None, needs: frozenset[str], early: int = 0) -> None:
        self.adapter, self.step, self.needs, self.early = adapter, step, needs, early
        self.tapes = _Tapes()
        self.on_tape: Any = None  # the engine's callback for a tape finished inside a forward pass
        self.handles: list[Any] = []

    def attach(self, tap: Any) -> None:
        from vlprune.engine.tower import Tower

        a = self.adapter
        for modality, name in a.encoders.items():
            object.__setattr__(a.core, name, FeatureMethod(self, modality, name))
        if self.step is not None and isinstance(self.step.pruner, EncoderPruner):
            self.handles += Tower(self, self.step).attach(tap)
        else:
            for block in sorted({self._block(name) for name in self.needs & ATTENTION_FIELDS}):
                tap(a.block_attention(a.blocks[block]), BlockTap(self, block))
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

    def fields(self, tape: Tape, item: int, names: frozenset[str], device: torch.device) -> dict[str, Any]:
        """Context fields of the vision block the projector reads, for one item, over its N tokens, brought to `device`.

        Where several patches make one token they are averaged. Separators have NaN attention, and zeros elsewhere.
        """
        tensors = names - {"encoder_rows"}
        for name in tensors - tape.memo.keys():
            tape.memo[name] = self._field(tape, name)
        fields: dict[str, Any] = {name: tape.memo[name][item].to(device) for name in tensors}
        return fields | ({"encoder_rows": partial(self._rows, tape, item, device)} if "encoder_rows" in names else {})

    def _block(self, name: str) -> int:
        """The block whose attention a field is made of."""
        if name in EARLY_FIELDS:
            return self.early
        return len(self.adapter.blocks) - 1 if name in FINAL_FIELDS else self.adapter.feature_block

    def _field(self, tape: Tape, name: str) -> list[Tensor]:
        a = self.adapter
        if name == "encoder_features":
            assert tape.rows is not None
            return [t.nan_to_num(nan=0.0) for t in a.tokens(tape.call, tape.items, tape.rows.detach())]
        calls = tape.seen[self._block(name)]
        if name == "cls_value":
            return [value[:, 0] for seen in calls for value in seen.value]
        patches = torch.cat([of_patches(seen, name, a.cls_tokens) for seen in calls], 1)  # [R, P, H] or [R, P, H, d]
        fields = self._per_item(tape, patches)
        return fields if name.endswith("attention") else [f.nan_to_num(nan=0.0) for f in fields]

    def _per_item(self, tape: Tape, patches: Tensor) -> list[Tensor]:
        """[R, P, H] or [R, P, H, d], of the tower, as [H, N] or [H, N, d] of every item."""
        a = self.adapter
        tokens = a.tokens(tape.call, tape.items, a.pool(tape.call, patches.flatten(2)))
        return [t.unflatten(1, patches.shape[2:]).transpose(0, 1) for t in tokens]

    def _rows(self, tape: Tape, item: int, device: torch.device, choose: Choose) -> Tensor:
        """The field `encoder_rows` of one item, worked out for all of the tape."""
        if choose not in tape.mixed:
            calls = tape.seen[self._block("encoder_rows")]
            patches = torch.cat([summed_rows(seen, choose, self.adapter.cls_tokens) for seen in calls], 1)
            tape.mixed[choose] = self._per_item(tape, patches)
        return tape.mixed[choose][item].to(device)

    def context(self, keep: int, item: Item, fields: dict[str, Any], **more: Any) -> Context:
        """The Context of one item at stage "encoder"."""
        needs = frozenset(self.step.pruner.needs) if self.step else frozenset()
        if "project" in needs:
            fields["project"] = self.adapter.project
        if "generator" in needs:
            fields["generator"] = torch.Generator().manual_seed(0)
        newline = item.newline
        if newline is not None:
            newline = newline.to(fields["features"].device, non_blocking=True)
        return Context(keep=keep, grids=item.grids, newline=newline, **fields, **more)

    # ---- stage "encoder", chosen once

    def _before_projector(self, module: nn.Module, args: Any) -> Any:
        if not self.tapes.stack or self.tapes.stack[-1].choosing:
            return None
        tape, x = self.tapes.stack[-1], args[0]
        if tape.leaving is not None:
            return (tape.leaving.finish(tape, x), *args[1:])
        tape.rows = x.reshape(-1, x.shape[-1] * self.adapter.group)
        tape.shape = (*x.shape[:-2], x.shape[-2] // self.adapter.group)
        if self.step is None:
            return None
        tape.items = self.adapter.items(tape.modality, tape.call, len(tape.rows))
        tape.choosing = True
        try:
            self._choose(tape, self.step)
        finally:
            tape.choosing = False
        short = self._survivors(tape)
        return None if short is None else (short.view(*[1] * (x.dim() - 2), -1, x.shape[-1]), *args[1:])

    def _choose(self, tape: Tape, step: Step) -> None:
        pruner = step.pruner
        assert tape.rows is not None
        device = tape.rows.device
        batches: dict[Any, list[tuple[int, Context]]] = {}  # pictures of one size are chosen from together
        for i, item in enumerate(tape.items):
            keep = step.budget.count(item.length)
            if keep == item.length:
                continue
            names = frozenset(pruner.needs) & (ATTENTION_FIELDS | {"encoder_features"})
            fields = self.fields(tape, i, names, device)
            fields |= {"features": self.fields(tape, i, frozenset({"encoder_features"}), device)["encoder_features"]}
            batches.setdefault((item.length, item.grids), []).append((i, self.context(keep, item, fields)))
        for members in batches.values():
            with torch.no_grad():
                selections = pruner.select_many([ctx for _, ctx in members])
            for (i, ctx), chosen in zip(members, selections, strict=True):
                item = tape.items[i]
                if chosen.merge is not None and item.rows is None:
                    raise PruningError(f"{pruner.name} merges tokens before the projector, but this picture is resampled behind "
                                       "it; use stage 'projector'")  # fmt: skip
                tape.selections[i] = chosen.check(item.length, ctx.keep, pruner.adaptive)

    def _survivors(self, tape: Tape) -> Tensor | None:
        """The rows that surviving tokens are made of, merged as the pruner says; None: all rows go on."""
        assert tape.rows is not None
        if not tape.selections or any(item.rows is None for item in tape.items):
            return None
        device = tape.rows.device
        at = upload(torch.cat([item.rows for item in tape.items if item.rows is not None]), device)
        x = tape.rows.index_select(0, at.clamp(min=0))
        if any(item.newline is not None for item in tape.items):
            x = x.masked_fill((at < 0)[:, None], 0.0)
        ends = list(accumulate((item.length for item in tape.items), initial=0))
        spans = tuple(
            Span(first, item.length, i) for i, (first, item) in enumerate(zip(ends, tape.items, strict=False))
        )
        before = Layout((spans,), ends[-1])
        kept = {(0, i): s.kept for i, s in tape.selections.items()}
        slots, after = Cut.make(before, {key: len(k) for key, k in kept.items()}, device).fill(before, kept, 0)
        tape.places = at.index_select(0, slots[0])
        parts = [(s, before.item(0, i).start, after.item(0, i).start) for i, s in tape.selections.items()]
        return gather_tokens(x[None], slots, merge=entries_of(parts, device))[0]

    def _after_projector(self, module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        """Zeros where tokens were dropped: placeholder counts and packing stay as the model knows them."""
        if not self.tapes.stack or self.tapes.stack[-1].choosing:
            return None
        tape = self.tapes.stack[-1]
        return None if tape.places is None else spread(out, tape.places, tape.shape)


def spread(out: Tensor, places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[..., n, D] -> [*shape, D]: row `places[i]` is the i-th of `out`, -1 goes nowhere, the others are zero."""
    total = math.prod(shape)
    full = out.new_zeros(total + 1, out.shape[-1])
    at = torch.where(places < 0, total, places).to(out.device)
    full = full.index_copy(0, at, out.reshape(-1, out.shape[-1]))
    return full[:total].view(*shape, out.shape[-1])


def of_patches(seen: Seen, name: str, cls: int) -> Tensor:
    """One field of an attention call, a row per patch: [B, P, H] or [B, P, H, d]."""
    if name == "final_cls_attention":  # queries and keys of all heads as one of that many dimensions
        q, k = seen.query[:, :, 0].flatten(1).float(), seen.key.transpose(1, 2).flatten(2).float()
        return ((k @ q[..., None]) / q.shape[1] ** 0.5).softmax(dim=1)[:, cls:]
    name = name.removeprefix("early_").removeprefix("final_")
    if name == "cls_attention":
        return seen.attention(slice(0, 1))[:, :, 0, cls:].transpose(1, 2)
    if name == "received_attention":
        return received(seen, "none")[:, :, cls:].transpose(1, 2)
    tensor = {"queries": seen.query, "keys": seen.key, "values": seen.value}[name]
    return tensor[:, :, cls:].transpose(1, 2)


def received(seen: Seen, heads: str) -> Tensor:
    """Column means of an attention call: [B, H, L], or [B, L] where `heads` are reduced."""
    mask = seen.mask
    if mask is not None and mask.dim() == 2:  # flash
        mask = mask[:, None, None].bool()
    return received_attention(seen.query, seen.key, scale=seen.scale, mask=mask, heads=heads)


def summed_rows(seen: Seen, choose: Choose, cls: int) -> Tensor:
    """The rows of patches that a rule chooses by what these receive, times its weights, a few at a time: [B, P, H]."""
    rows, weights = choose(received(seen, "mean")[:, cls:])  # [B, R]
    total = torch.zeros_like(seen.query[..., 0], dtype=torch.float32)[..., cls:]  # [B, H, P]
    for some, weight in zip(rows.split(ROWS_AT_ONCE, 1), weights.split(ROWS_AT_ONCE, 1), strict=True):
        attention = seen.attention(some + cls)[..., cls:]  # [B, H, r, P]
        total = total + (attention * weight[:, None, :, None]).sum(dim=2)
    return total.transpose(1, 2)
