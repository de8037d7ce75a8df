"""Every error vlprune raises on purpose: what was asked, what was found, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class VlpruneError(Exception):
    """Parent of all errors raised by vlprune."""


class SpecError(VlpruneError, ValueError):
    """A plan, a pruner's name or one of its parameters cannot be understood."""


class BudgetError(VlpruneError, ValueError):
    """A budget that names no valid number of tokens."""


class UnsupportedModel(VlpruneError, TypeError):
    """No adapter knows this model class, or the model runs in a way vlprune cannot serve."""


class UnsupportedStage(VlpruneError, ValueError):
    """The model has no such stage, or the stage does not offer what the pruner needs."""


class PruningError(VlpruneError, RuntimeError):
    """A wrapped model was used in a way under which pruning would be wrong or would silently not happen."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean holov?"`` for the closest known names, or an empty string."""
    close = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""
