"""Every family vlprune knows. Adding one touches its file and this list."""

from __future__ import annotations

from vlprune.adapters.base import Adapter
from vlprune.adapters.llava import Llava

FAMILIES: tuple[type[Adapter], ...] = (Llava,)
