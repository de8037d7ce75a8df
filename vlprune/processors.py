"""Opening a model's processor, also where torchvision is missing."""

from __future__ import annotations

import os
from typing import Any

from transformers import PROCESSOR_MAPPING, AutoConfig, AutoProcessor, ProcessorMixin
from transformers.utils import is_torchvision_available


def load_processor(path_or_repo: str | os.PathLike[str]) -> Any:
    """AutoProcessor, or without torchvision the same processor for pictures alone.

    transformers has video processors on torchvision only, so AutoProcessor cannot open the Qwen-VL, LLaVA-OneVision,
    SmolVLM and InternVL families without it, though their picture part needs none. The class found by
    `config.model_type` is then opened without its video part. It keeps its name: what it saves is a standard folder.

    Raises:
        OSError, ImportError, AttributeError: whatever AutoProcessor raised, when torchvision is not what is missing.
    """
    try:
        return AutoProcessor.from_pretrained(path_or_repo)
    except (OSError, ImportError, AttributeError):
        if is_torchvision_available():
            raise
        cls = _processor_class(path_or_repo)
        if cls is None or "video_processor" not in cls.get_attributes():
            raise
        return image_only(cls).from_pretrained(path_or_repo)


def _processor_class(path_or_repo: str | os.PathLike[str]) -> type[ProcessorMixin] | None:
    return PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(path_or_repo)), None)


def image_only(cls: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A processor class of the same name that never touches video and needs no torchvision."""
    attributes = [name for name in cls.get_attributes() if name != "video_processor"]
    members = {"__module__": cls.__module__, "get_attributes": classmethod(lambda _: attributes)}
    return type(cls.__name__, (cls,), members)
