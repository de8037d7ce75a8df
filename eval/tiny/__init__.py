"""The tiny benchmark: pictures drawn from a seed, questions with exact evidence, and the model trained on them."""

from .synth import Item, item, items
from .vocabulary import TASKS

__all__ = ["TASKS", "Item", "item", "items"]
