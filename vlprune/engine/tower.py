"""Stage "encoder" for pruners that drop tokens step by step, between the blocks of the vision tower.

With `device_map` blocks may lie on several devices: what is still there, and what a pruner is shown, stays on the first
block's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.engine.kept import upload
from vlprune.engine.tap import Seen
from vlprune.engine.vision import ATTENTION_FIELDS, BlockTap, Tape, Vision, of_patches, spread
from vlprune.plan import Step
from vlprune.pruner import EncoderPruner
from vlprune.selection import Selection


@dataclass(eq=False)
class Stack:
    """Pictures of one size, stacked. Where they lose different numbers their rows are padded on the right and masked."""

    cls: int
    size: int  # patches of a picture before any left
    head: int  # rows in front of the patches: `cls` inside the tower, none at the projector
    tokens: list[Tensor]  # per item [n] int64, the patches still there, ascending
    mask: Tensor | None = None  # as the blocks take it

    def features(self, x: Tensor, item: int) -> Tensor:
        return x[item, self.head : self.head + len(self.tokens[item])]

    def field(self, calls: list[Seen], name: str, item: int) -> Tensor:
        """[H, n] or [H, n, d]"""
        seen = calls[0].row(item).head(self.cls + len(self.tokens[item]))
        return seen.value[0, :, 0] if name == "cls_value" else of_patches(seen, name, self.cls)[0].transpose(0, 1)

    def shorten(self, x: Tensor, chosen: dict[int, Tensor], implementation: str) -> Tensor:
        rows = []
        for i, tokens in enumerate(self.tokens):
            row = x[i, : self.head + len(tokens)]
            if i in chosen:
                row = torch.cat([row[: self.head], row[self.head :].index_select(0, chosen[i].to(x.device))])
                self.tokens[i] = tokens.index_select(0, chosen[i])
            rows.append(row)
        lengths = [len(row) for row in rows]
        self.mask = None
        if min(lengths) < max(lengths):
            there = torch.arange(max(lengths), device=x.device) < upload(lengths, x.device)[:, None]
            self.mask = there if "flash" in implementation else _additive(there, x.dtype)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def arguments(self, x: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = self.mask if self.mask is None or self.mask.dim() == 2 else self.mask.expand(-1, -1, x.shape[1], -1)
        if args:
            return (x, mask, *args[2:]), kwargs
        return args, {**kwargs, "hidden_states": x, "attention_mask": mask}

    def places(self) -> Tensor:
        """The row each slot of the tower's output stands for, -1 a pad."""
        rows = [tokens + i * self.size for i, tokens in enumerate(self.tokens)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).flatten()


def _additive(there: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(there, dtype=dtype).masked_fill(~there, torch.finfo(dtype).min)[:, None, None]


@dataclass(eq=False)
class Pack:
    """Pictures of any size in one sequence, cut into windows or frames by `cu_seqlens`. A token is `group` patches."""

    group: int
    rows: list[Tensor]  # per item [N] int64, the row behind each of its tokens
    tokens: list[Tensor]  # per item [n] int64, the tokens still there, ascending
    alive: Tensor  # [U'] int64, the rows still there, ascending
    total: int  # U, the rows before any left
    memo: dict[Any, Any] = field(default_factory=dict)  # what all blocks until the next drop share

    def _at(self, item: int) -> Tensor:
        return torch.searchsorted(self.alive, self.rows[item].index_select(0, self.tokens[item]))

    def features(self, x: Tensor, item: int) -> Tensor:
        return x.view(len(self.alive), -1).index_select(0, self._at(item).to(x.device))

    def field(self, calls: list[Seen], name: str, item: int) -> Tensor:
        """[H, n] or [H, n, d], averaged over the patches of a token"""
        key = ("field", name)
        if key not in self.memo:
            patches = torch.cat([of_patches(seen, name, 0)[0] for seen in calls])  # [L', H] or [L', H, d]
            self.memo[key] = patches.unflatten(0, (-1, self.group)).mean(1)
        return self.memo[key].index_select(0, self._at(item).to(self.memo[key].device)).transpose(0, 1)

    def shorten(self, x: Tensor, chosen: dict[int, Tensor], implementation: str) -> Tensor:
        for i, kept in chosen.items():
            self.tokens[i] = self.tokens[i].index_select(0, kept)
        before = self.alive
        rows = [r.index_select(0, t) for r, t in zip(self.rows, self.tokens, strict=True)]
        self.alive = torch.cat(rows).sort().values
        self.memo = {}
        left = torch.searchsorted(before, self.alive).to(x.device)
        return x.view(len(before), -1).index_select(0, left).view(-1, x.shape[-1])

    def arguments(self, x: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        cu = kwargs["cu_seqlens"]
        if id(cu) not in self.memo:  # windows shrink, and those left empty vanish
            left = torch.zeros(self.total + 1, dtype=torch.int64, device=x.device)
            left = left.index_fill(0, self.alive.to(x.device) + 1, self.group).cumsum(0)
            ends = left.index_select(0, cu.to(x.device).long() // self.group).unique_consecutive()
            self.memo[id(cu)] = cu, ends.to(cu)  # the key lives as long as its id is used
        kwargs["cu_seqlens"] = self.memo[id(cu)][1]
        if kwargs.get("max_seqlen") is not None:
            kwargs["max_seqlen"] = None  # the block derives it
        if kwargs.get("position_embeddings") is not None:
            if "rope" not in self.memo:
                self.memo["rope"] = tuple(
                    t.unflatten(0, (self.total, -1)).index_select(0, self.alive.to(t.device)).flatten(0, 1)
                    for t in kwargs["position_embeddings"]
                )
            kwargs["position_embeddings"] = self.memo["rope"]
        if args:
            return (x, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": x}

    def places(self) -> Tensor:
        return self.alive


@dataclass(eq=False)
class Leaving:
    """One call of the feature method while its tokens leave."""

    tower: Tower
    held: Stack | Pack
    shape: tuple[int, ...]  # of the rows before any left
    states: list[Any]
    shortened: bool = False

    def finish(self, tape: Tape, x: Tensor) -> Tensor:
        """The tower has run, and x is what the projector would get: the last chance to leave."""
        if isinstance(self.held, Stack):
            self.held.head = 0
        x = self.tower.ask(tape, self.tower.vision.adapter.feature_block, x)
        tape.shape = self.shape
        if self.shortened:
            tape.places = self.held.places()
        budget, pruner = self.tower.step.budget, self.tower.step.pruner
        for i, (item, kept) in enumerate(zip(tape.items, self.held.tokens, strict=True)):
            keep = budget.count(item.length)
            if keep < item.length or len(kept) < item.length:
                tape.selections[i] = Selection(kept).check(item.length, keep, pruner.adaptive)
        return x


@dataclass(eq=False)
class BlockHook:
    tower: Tower
    block: int

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return self.tower.before_block(self.block, args, kwargs)


@dataclass(eq=False)
class SideHook:
    """Behind a projector of an inner block (deepstack): zeros where tokens have left already."""

    tower: Tower

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        stack = self.tower.vision.tapes.stack
        if not stack or stack[-1].leaving is None or not stack[-1].leaving.shortened:
            return None
        leaving = stack[-1].leaving
        return spread(out, leaving.held.places(), leaving.shape)


@dataclass(eq=False)
class Tower:
    """Runs an EncoderPruner: before every block it is asked about the block that has just run."""

    vision: Vision
    step: Step

    def attach(self, tap: Any) -> list[Any]:
        a, handles = self.vision.adapter, []
        for i in range(a.feature_block + 1):
            tap(a.block_attention(a.blocks[i]), BlockTap(self.vision, i))
            handles.append(a.blocks[i].register_forward_pre_hook(BlockHook(self, i), with_kwargs=True))
        return handles + [side.register_forward_hook(SideHook(self)) for side in a.side_projectors]

    def before_block(self, block: int, args: Any, kwargs: dict[str, Any]) -> Any:
        if not self.vision.tapes.stack:
            return None
        tape = self.vision.tapes.stack[-1]
        x = args[0] if args else kwargs["hidden_states"]
        if block == 0:
            tape.leaving = self._enter(tape, x)
            return None
        x = self.ask(tape, block - 1, x)
        leaving: Leaving = tape.leaving
        return leaving.held.arguments(x, args, kwargs) if leaving.shortened else None

    def ask(self, tape: Tape, block: int, x: Tensor) -> Tensor:
        """x: the tower's tokens behind `block`, which has just run."""
        leaving: Leaving = tape.leaving
        chosen = self._choose(leaving, tape, tape.seen.pop(block), block, x)
        if not chosen:
            return x
        leaving.shortened = True
        return leaving.held.shorten(x, chosen, self.vision.adapter.tower.config._attn_implementation)

    def _enter(self, tape: Tape, x: Tensor) -> Leaving:
        a = self.vision.adapter
        held: Stack | Pack
        if x.dim() == 3:
            size = x.shape[1] - a.cls_tokens
            shape: tuple[int, ...] = (len(x), size)
            tape.items = a.items(tape.modality, tape.call, len(x) * size)
            held = Stack(a.cls_tokens, size, a.cls_tokens, [torch.arange(size, device=x.device)] * len(x))
        else:
            shape = (len(x) // a.group,)
            tape.items = a.items(tape.modality, tape.call, *shape)
            rows = [upload(item.rows, x.device) for item in tape.items if item.rows is not None]
            alive = torch.arange(*shape, device=x.device)
            held = Pack(a.group, rows, [torch.arange(len(r), device=x.device) for r in rows], alive, *shape)
        pruner = self.step.pruner
        assert isinstance(pruner, EncoderPruner)
        return Leaving(self, held, shape, [pruner.start() for _ in tape.items])

    def _choose(self, leaving: Leaving, tape: Tape, calls: list[Seen], block: int, x: Tensor) -> dict[int, Tensor]:
        """Item -> which of its tokens go on, where some leave."""
        pruner, held = self.step.pruner, leaving.held
        assert isinstance(pruner, EncoderPruner)
        chosen = {}
        for i, item in enumerate(tape.items):
            home = held.tokens[i].device
            seen = frozenset(pruner.needs) & ATTENTION_FIELDS
            fields: dict[str, Any] = {name: held.field(calls, name, i).to(home) for name in seen}
            fields |= {"features": held.features(x, i).detach().to(home), "index": held.tokens[i], "layer": block}
            ctx = self.vision.context(
                self.step.budget.count(item.length), item, fields, layers=len(self.vision.adapter.blocks)
            )
            with torch.no_grad():
                selection, leaving.states[i] = pruner.step(ctx, leaving.states[i])
            if selection is not None and len(selection.kept) < len(held.tokens[i]):
                chosen[i] = selection.kept
        return chosen
