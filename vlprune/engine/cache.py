"""Cache layers that store the kept rows and report the prompt's own length, so that callers need not know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from vlprune.engine.kept import Kept
from vlprune.errors import PruningError


class _Kept:
    """Physical n rows, of which `kept` covers P: the logical length is ``upto + n - P``."""

    kept: Kept | None = None

    def stored(self) -> int:
        return int(DynamicLayer.get_seq_length(self))  # type: ignore[arg-type]

    def get_seq_length(self) -> int:
        return self.stored() if self.kept is None else self.kept.upto + self.stored() - self.kept.slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        if self.kept is not None:
            self.kept = self.kept.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.kept is not None:
            self.kept = self.kept.select_rows(torch.arange(len(self.kept.index)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        if self.kept is not None:
            self.kept = self.kept.select_rows(torch.as_tensor(indices))

    def crop(self, max_length: int) -> None:
        """Cut to a logical length (negative: remove that many tokens). The pruned prefix cannot be cut into."""
        remove = -max_length if max_length <= 0 else self.get_seq_length() - max_length
        if remove <= 0 or not self.stored():
            return
        if self.kept is not None and remove > self.stored() - self.kept.slots:
            raise PruningError("this cache was pruned and cannot be cropped into the pruned prompt; start from a "
                               "fresh cache, or unwrap the model before the prompt runs")  # fmt: skip
        self.keys, self.values = self.keys[..., :-remove, :], self.values[..., :-remove, :]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.kept = None


class KeptLayer(_Kept, DynamicLayer):
    """A growing cache layer."""


class KeptSlidingLayer(_Kept, DynamicLayer):
    """Keeps every survivor; the window is enforced by the mask, which knows logical distances."""

    is_sliding = True

    def activate_past_recording(self) -> None:
        """Nothing to do: past states are never trimmed here."""


class KeptStaticLayer(StaticLayer):
    """Allocates ``max_len - removed`` slots and reports `max_len`."""

    def __init__(self, logical_max: int, kept: Kept) -> None:
        super().__init__(max_cache_len=logical_max - (kept.upto - kept.slots))
        self.logical_max = logical_max
        self.kept: Kept | None = kept

    def get_seq_length(self) -> Any:
        n = super().get_seq_length()
        return n if self.kept is None else n + (self.kept.upto - self.kept.slots)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.logical_max, 0

    def reset(self) -> None:
        raise PruningError("a static cache that was pruned cannot be reset; allocate a new one for the next prompt")


def layer_of(cache: Cache | None, i: int) -> Any:
    """The cache layer, or None where there is no cache or it has not grown that far."""
    return cache.layers[i] if cache is not None and i < len(cache.layers) else None


def kept_of(cache: Cache | None, i: int) -> Kept | None:
    return getattr(layer_of(cache, i), "kept", None)


def install(cache: Cache, i: int, kept: Kept) -> Any:
    """Make layer `i` hold `kept`. Raises PruningError for cache layers that cannot report a length of their own."""
    while len(cache.layers) <= i and cache.layer_class_to_replicate is not None:  # DynamicCache() without a config
        cache.layers.append(cache.layer_class_to_replicate())
    old = cache.layers[i]
    if isinstance(old, (_Kept, KeptStaticLayer)):
        old.kept = kept
        return old
    new: Any
    if type(old) is DynamicLayer:
        new = KeptLayer()
    elif type(old) is DynamicSlidingWindowLayer:
        if old.is_initialized and old.cumulative_length >= old.sliding_window:
            raise PruningError("a second picture cannot be pruned on a sliding-window cache that was already trimmed; "
                               "start from a fresh cache")  # fmt: skip
        new = KeptSlidingLayer()
    elif type(old) is StaticLayer:
        if old.is_initialized and int(old.get_seq_length()):
            raise PruningError("a static cache that already holds tokens cannot be pruned; allocate a new one")
        new = KeptStaticLayer(old.max_cache_len, kept)
        cache.layers[i] = new
        return new
    else:
        raise PruningError(f"cache layer {type(old).__name__} cannot be pruned; use the default cache, "
                           "DynamicCache or StaticCache")  # fmt: skip
    if old.is_initialized:
        new.lazy_initialization(old.keys, old.values)
        new.keys, new.values = old.keys, old.values
    new.kept = kept
    cache.layers[i] = new
    return new
