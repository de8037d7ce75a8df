"""Every family vlprune knows. Adding one touches its file and this list."""

from __future__ import annotations

from vlprune.adapters.base import Adapter
from vlprune.adapters.gemma3 import Gemma3
from vlprune.adapters.idefics3 import Idefics3, SmolVLM
from vlprune.adapters.internvl import InternVL
from vlprune.adapters.llava import Llava
from vlprune.adapters.llava_next import LlavaNext
from vlprune.adapters.llava_onevision import LlavaOnevision
from vlprune.adapters.mistral3 import Mistral3
from vlprune.adapters.paligemma import PaliGemma
from vlprune.adapters.qwen2_5_vl import Qwen2_5VL
from vlprune.adapters.qwen2_vl import Qwen2VL
from vlprune.adapters.qwen3_vl import Qwen3VL

FAMILIES: tuple[type[Adapter], ...] = (
    Llava, LlavaNext, LlavaOnevision, Qwen2VL, Qwen2_5VL, Qwen3VL, InternVL, Idefics3, SmolVLM, Gemma3, PaliGemma, Mistral3,
)  # fmt: skip
