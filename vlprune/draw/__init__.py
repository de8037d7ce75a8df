"""What a pruner did, on top of the picture it did it to. PIL alone."""

from vlprune.draw.focus import gif, pieces
from vlprune.draw.overlay import SHOWS, Fate, overlay
from vlprune.draw.sheet import compare

__all__ = ["SHOWS", "Fate", "compare", "gif", "overlay", "pieces"]
