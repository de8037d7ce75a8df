"""Prune the visual tokens of vision-language models: one call wraps a Hugging Face model, one call restores it."""

from vlprune import draw
from vlprune.api import (
    guided,
    image_sizes,
    plan_of,
    pruning,
    recording,
    replay,
    supported,
    trace,
    unwrap,
    why_unsupported,
    wrap,
)
from vlprune.context import Context, Grid
from vlprune.errors import BudgetError, PruningError, SpecError, UnsupportedModel, UnsupportedStage, VlpruneError
from vlprune.gathered import gathered_attention
from vlprune.plan import Budget, Plan, Stage, Step
from vlprune.pruner import PRUNERS, CachePruner, DecodePruner, EncoderPruner, Pruner, Scorer, Source, register
from vlprune.selection import Heads, Merge, Selection, top
from vlprune.trace import Trace

__version__ = "0.1.0"
__all__ = [
    "PRUNERS",
    "Budget",
    "BudgetError",
    "CachePruner",
    "Context",
    "DecodePruner",
    "EncoderPruner",
    "Grid",
    "Heads",
    "Merge",
    "Plan",
    "Pruner",
    "PruningError",
    "Scorer",
    "Selection",
    "Source",
    "SpecError",
    "Stage",
    "Step",
    "Trace",
    "UnsupportedModel",
    "UnsupportedStage",
    "VlpruneError",
    "draw",
    "gathered_attention",
    "guided",
    "image_sizes",
    "plan_of",
    "pruning",
    "recording",
    "register",
    "replay",
    "supported",
    "top",
    "trace",
    "unwrap",
    "why_unsupported",
    "wrap",
]  # fmt: skip
