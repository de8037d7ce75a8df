"""What has other names in other releases of transformers 5. Looked up by what a release has, never by its number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import cache_utils
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE = next(
    f.name for f in fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values")
)  # from, up to 5.23
QUANTISED: Any = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)  # the base of all backends
HOOKS_RUN_TWICE = "__call__" in vars(GradientCheckpointingLayer)  # when gradients are checkpointed


def cache_of(given: Mapping[str, Any]) -> Cache | None:
    """The key-value cache among a call's arguments or a model's outputs, where callers may still use its old name."""
    found = given.get(CACHE)
    return found if found is not None or CACHE == "past_key_values" else given.get("past_key_values")
