"""Look at queries, keys and values after RoPE without eager attention and without touching a class.

One attention module's `config` is replaced by a view whose attention implementation resolves to our function. It reads
what it came for and delegates to the real sdpa, flash or eager function; the text model's own config, from which masks
are built, stays as it is.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from vlprune.ops import attention_rows


class _Delegating(threading.local):
    depth = 0


_delegating = _Delegating()


class TapConfig:
    """A transparent view of a config, except for the name of the attention function."""

    def __init__(self, base: Any, fn: Callable[..., Any]) -> None:
        object.__setattr__(self, "_base", base)
        object.__setattr__(self, "_fn", fn)

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__"):  # copy and pickle ask before __init__ ran
            raise AttributeError(key)
        return getattr(object.__getattribute__(self, "_base"), key)

    def __setattr__(self, key: str, value: Any) -> None:
        setattr(self._base, key, value)

    @property
    def _attn_implementation(self) -> str:
        base = self._base._attn_implementation or "eager"
        if _delegating.depth:  # the flash glue picks its kernel by this name
            return str(base)
        name = f"vlprune|{base}"  # "flash" stays readable inside: towers choose their variable-length branch by it
        if name not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(name, _tapped)  # adds a name of ours; no existing one changes
        return name


def _tapped(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *args: Any,
            **kwargs: Any) -> Any:  # fmt: skip
    config: Any = module.config
    return config._fn(module, query, key, value, attention_mask, *args, **kwargs)


def delegate(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The attention the module would have run without the tap."""
    config: Any = module.config
    base = config._base._attn_implementation or "eager"
    if base in ALL_ATTENTION_FUNCTIONS:
        fn = ALL_ATTENTION_FUNCTIONS[base]
    else:  # eager is no registry entry: every modeling file has its own
        fn = sys.modules[type(module).__module__].eager_attention_forward
    _delegating.depth += 1
    try:
        return fn(module, *args, **kwargs)
    finally:
        _delegating.depth -= 1


@dataclass(frozen=True, eq=False)
class Seen:
    """What one attention call was given. Holds references, computes rows on demand."""

    query: Tensor  # [B, H, Lq, d] after RoPE
    key: Tensor  # [B, Hkv, Lk, d], cached rows included
    value: Tensor  # [B, Hkv, Lk, d]
    mask: Tensor | None  # whatever the model built: 4-D bool or additive, 2-D for flash, None
    scale: float
    causal: bool
    window: int | None = None  # keys a query sees, itself included, where no mask says so (flash)

    @staticmethod
    def of(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]) -> Seen:
        scale = kwargs.get("scaling")
        causal = kwargs.get("is_causal")
        causal = bool(getattr(module, "is_causal", False)) if causal is None else bool(causal)
        mask = mask.detach() if isinstance(mask, Tensor) else None
        q, k, v = query.detach(), key.detach(), value.detach()
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        return Seen(q, k, v, mask, scale, causal and q.shape[2] > 1, kwargs.get("sliding_window"))

    @property
    def past(self) -> int:
        """Keys in front of this call's own."""
        return self.key.shape[2] - self.query.shape[2]

    def row(self, b: int) -> Seen:
        """One batch row alone."""
        mask = None if self.mask is None else self.mask if self.mask.shape[0] == 1 else self.mask[b : b + 1]
        one = slice(b, b + 1)
        return replace(self, query=self.query[one], key=self.key[one], value=self.value[one], mask=mask)

    def head(self, length: int) -> Seen:
        """The first `length` positions, where no other is visible to them."""
        q, k, v = (t[:, :, :length] for t in (self.query, self.key, self.value))
        return Seen(q, k, v, None, self.scale, self.causal)

    def split(self, lengths: list[int]) -> list[Seen]:
        """A call over packed sequences as one call for each of them."""
        parts = zip(*(t.split(lengths, 2) for t in (self.query, self.key, self.value)), strict=True)
        return [Seen(q, k, v, None, self.scale, self.causal) for q, k, v in parts]

    def attention(self, rows: Tensor | slice, columns: tuple[int, int] | None = None) -> Tensor:
        """Softmax rows over all keys, cut to `columns`: [B, H, R, L] float32. `rows`: a slice, [R] or [B, R] indices."""
        q = self.query
        batch, heads, length, width = q.shape
        at = torch.arange(length, device=q.device)[rows] if isinstance(rows, slice) else rows.to(q.device)
        at = at.expand(batch, -1)  # [B, R]
        if isinstance(rows, slice):
            q = q[:, :, rows]
        else:
            q = q.gather(2, at[:, None, :, None].expand(-1, heads, -1, width))
        keys = self.key.shape[2]
        mask, limit = self.mask, None
        if mask is not None and mask.dim() == 4:
            mask = mask.expand(batch, *mask.shape[1:])[..., :keys]
            if mask.shape[2] > 1:
                mask = mask.gather(2, at[:, None, :, None].expand(-1, mask.shape[1], -1, keys))
            mask = mask.expand(-1, -1, at.shape[1], -1)
        else:
            last = at + self.past
            if self.causal:
                limit = last
            if mask is not None:  # flash: [B, keys], or more where a window has trimmed the cache
                mask = mask[:, None, None, -keys:].bool().expand(batch, 1, at.shape[1], keys)
            if self.window is not None and self.window < keys:
                near = (torch.arange(keys, device=q.device) > (last - self.window)[..., None])[:, None]
                mask = near if mask is None else mask & near
        return attention_rows(q, self.key, scale=self.scale, mask=mask, limit=limit, columns=columns)
