"""Cache layers that store the kept rows and report the prompt's own length, so that callers need not know."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

from vlprune.engine.kept import Kept
from vlprune.errors import PruningError
from vlprune.ops import gather_cache
from vlprune.releases import QUANTISED


class _Rows:
    """What lies beside the keys of a cache layer and follows its batch rows."""

    kept: Kept | None = None
    fixation: Any = None  # decode-time selection: on the last focal layer

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select_rows(beam_idx)

    def _select_rows(self, rows: Tensor) -> None:
        if self.kept is not None:
            self.kept = self.kept.select_rows(rows)
        if self.fixation is not None:
            self.fixation = self.fixation.select_rows(rows)

    def stored(self) -> int:
        """Rows that hold something."""
        return int(super().get_seq_length())  # type: ignore[misc]

    def _check_crop(self, remove: int) -> None:
        if self.kept is not None and remove > self.stored() - self.kept.slots:
            raise PruningError("this cache was pruned and cannot be cropped into the pruned prompt; start from a "
                               "fresh cache, or unwrap the model before the prompt runs")  # fmt: skip


class _Kept(_Rows):
    """Physical n rows, of which `kept` covers P: the logical length is ``upto + n - P``."""

    def get_seq_length(self) -> int:
        return self.stored() if self.kept is None else self.kept.upto + self.stored() - self.kept.slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.stored():
            rows = len(self.keys) // repeats  # type: ignore[attr-defined]
            self._select_rows(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._select_rows(torch.as_tensor(indices))

    def crop(self, max_length: int) -> None:
        """Cut to a logical length (negative: remove that many tokens). The pruned prefix cannot be cut into."""
        remove = -max_length if max_length <= 0 else self.get_seq_length() - max_length
        if remove <= 0 or not self.stored():
            return
        self._check_crop(remove)
        lay: Any = self
        lay.keys, lay.values = lay.keys[..., :-remove, :], lay.values[..., :-remove, :]

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


class _KeptQuantised(_Kept):
    """Quantises the survivors alone; newer tokens follow as the backend has it."""

    is_croppable = False

    def crop(self, max_length: int) -> None:
        raise PruningError("a quantised cache cannot be cropped, as assisted decoding and prompt lookup do; use the default "
                           "cache")  # fmt: skip


@lru_cache
def _quantised(backend: Any) -> Any:
    """A backend's layer class that reports logical lengths."""
    return type(f"Kept{backend.__name__}", (_KeptQuantised, backend), {})


class KeptStaticLayer(_Rows, StaticLayer):
    """Allocates ``max_len - removed`` slots and reports `max_len`."""

    def __init__(self, logical_max: int, kept: Kept | None) -> None:
        removed = 0 if kept is None else kept.upto - kept.slots
        super().__init__(max_cache_len=logical_max - removed)
        self.logical_max = logical_max
        self.kept = kept

    def get_seq_length(self) -> Any:
        n = super().get_seq_length()
        return n if self.kept is None else n + (self.kept.upto - self.kept.slots)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.logical_max, 0

    def get_max_length(self) -> int:
        return self.logical_max

    get_max_cache_shape = get_max_length  # its name in older releases

    def crop(self, tokens_to_remove: int) -> None:
        """As transformers 5.24 has it; before, a static cache cannot be cropped and nobody asks for it."""
        self._check_crop(abs(tokens_to_remove))
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        logical_max = self.logical_max
        self.__dict__.clear()
        self.__init__(logical_max, None)  # type: ignore[misc]


def layer_of(cache: Cache | None, i: int) -> Any:
    """The cache layer, or None where there is no cache or it has not grown that far."""
    return cache.layers[i] if cache is not None and i < len(cache.layers) else None


def kept_of(cache: Cache | None, i: int) -> Kept | None:
    return getattr(layer_of(cache, i), "kept", None)


def refill(cache: Cache, i: int, kept: Kept, slots: Tensor) -> None:
    """Drop all slots of layer `i` but `slots`, [B, P] or [B, Hkv, P], which `kept` describes; -1 is padding."""
    old: Any = cache.layers[i]
    if isinstance(old, QUANTISED):
        raise PruningError("stage 'cache' drops rows of the key-value cache, and those of a quantised cache are packed; prune at "
                           "stage 'projector' or before a decoder layer, or use the default cache")  # fmt: skip
    old.prefetch()  # an offloaded cache has sent them away
    slots = slots.to(old.keys.device)
    if slots.dim() == 2:
        (keys,), (values,) = gather_cache([old.keys], [old.values], slots)
    else:
        index = slots.clamp(min=0)[..., None]
        keys = old.keys.gather(2, index.expand(-1, -1, -1, old.keys.shape[3]))
        values = old.values.gather(2, index.expand(-1, -1, -1, old.values.shape[3]))
    if isinstance(old, StaticLayer):
        cache.layers[i] = KeptStaticLayer(getattr(old, "logical_max", old.max_cache_len), kept)
        cache.layers[i].update(keys, values)
    else:
        new = install(cache, i, kept)
        new.keys, new.values = keys, values
    if cache.offloading:
        cache.offload(i, cache.only_non_sliding)


def logical_end(layer: Any, upto: int) -> int:
    """Logical tokens the keys of a layer stand for once `upto` are in: a static layer has room for more."""
    return getattr(layer, "logical_max", layer.max_cache_len) if isinstance(layer, StaticLayer) else upto


def written(cache: Cache | None, i: int, upto: int) -> int | None:
    """Slots of layer `i` that hold something once `upto` logical tokens are in; None if that is all of them."""
    layer = layer_of(cache, i)
    if not isinstance(layer, StaticLayer):
        return None
    kept = kept_of(cache, i)
    return upto if kept is None else kept.slots + upto - kept.upto


def install(cache: Cache, i: int, kept: Kept | None) -> Any:
    """Make layer `i` hold `kept` (None: everything, but able to carry a fixation).

    Raises PruningError for cache layers that cannot report a length of their own.
    """
    while len(cache.layers) <= i and cache.layer_class_to_replicate is not None:  # DynamicCache() without a config
        cache.layers.append(cache.layer_class_to_replicate())
    old = cache.layers[i]
    if isinstance(old, QUANTISED) and not isinstance(old, _Kept):
        cache.layers[i] = object.__new__(_quantised(type(old)))  # type: ignore[arg-type]
        vars(cache.layers[i]).update(vars(old))  # what it holds is the backend's own affair
        old = cache.layers[i]
    if isinstance(old, _Kept):
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
    elif type(old) in (StaticLayer, KeptStaticLayer):
        new = KeptStaticLayer(getattr(old, "logical_max", old.max_cache_len), kept)
        if old.is_initialized and int(old.get_seq_length()):
            if new.max_cache_len != old.max_cache_len:
                raise PruningError("a static cache that already holds tokens cannot be pruned; allocate a new one")
            vars(new).update({**vars(old), "logical_max": new.logical_max, "kept": kept})
        cache.layers[i] = new
        return new
    else:
        raise PruningError(f"cache layer {type(old).__name__} cannot be pruned; use the default cache, "
                           "DynamicCache or StaticCache")  # fmt: skip
    if old.is_initialized:
        new.lazy_initialization(old.keys, old.values)
        new.keys, new.values, new.device = old.keys, old.values, old.device  # an offloaded cache brings them back to it
    new.kept = kept
    cache.layers[i] = new
    return new
