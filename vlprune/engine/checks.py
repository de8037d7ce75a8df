"""Whether a model can serve a plan, asked before anything is changed."""

from __future__ import annotations

from vlprune.engine.adapter import Adapter
from vlprune.engine.contexts import TOWER_FIELDS
from vlprune.engine.evict import takes_all
from vlprune.engine.vision import ATTENTION_FIELDS, EARLY_FIELDS
from vlprune.errors import UnsupportedModel, UnsupportedStage
from vlprune.plan import Plan, Step
from vlprune.pruner import CachePruner, DecodePruner, EncoderPruner


def early_block(plan: Plan, adapter: Adapter) -> int:
    """The block of the tower that the fields ``early_...`` are of."""
    blocks = len(adapter.blocks)
    asked = {s.pruner.early_block(blocks) for s in plan.steps if frozenset(s.pruner.needs) & EARLY_FIELDS} or {0}
    if len(asked) > 1 or not 0 <= min(asked) < blocks:
        raise UnsupportedStage(f"{plan} looks at block {', '.join(map(str, sorted(asked)))} of a tower with blocks 0 to "
                               f"{blocks - 1}; it can look at one of them")  # fmt: skip
    return min(asked)


def check_plan(plan: Plan, adapter: Adapter) -> None:
    """Refuse at wrap time what this model cannot serve, and name what fits."""
    early_block(plan, adapter)
    depth = len(adapter.layers)
    for step in plan.steps:
        stage, pruner = step.stage, step.pruner
        if stage.layer is not None and stage.layer >= depth:
            raise UnsupportedStage(
                f"{step} cuts before decoder layer {stage.layer}, but this model has layers 0 to {depth - 1}"
            )
        reason = adapter.why_not(stage)
        if not reason and isinstance(pruner, EncoderPruner) and stage.name == "encoder":
            reason = adapter.why_not_in_tower()
        if reason:
            raise UnsupportedStage(f"{step}: {reason}")
        kinds = {EncoderPruner: "encoder", CachePruner: "cache", DecodePruner: "decode"}
        only = next((name for kind, name in kinds.items() if isinstance(pruner, kind)), None)
        if only and stage.name != only:
            raise UnsupportedStage(f"{pruner.name} acts at stage {only!r} only, not at {str(stage)!r}")
        if not only and stage.name == "decode":
            raise UnsupportedStage(
                f"{pruner.name} chooses once per prompt; stage 'decode' takes per-step pruners such as fastocr"
            )
        if (stage.name in ("encoder", "decode") or takes_all(step)) and step.budget.scope == "prompt":
            raise UnsupportedStage(
                f"{step}: pictures are handled one by one at stage {stage}; use scope=image, or another stage"
            )
        if stage.name == "decode" and any(s.stage.name == "cache" for s in plan.steps):
            raise UnsupportedStage(f"{plan}: stage 'decode' chooses among all tokens of a picture, which stage 'cache' drops; use "
                                   "one of the two")  # fmt: skip
        if pruner.merges and (stage.name == "cache" or step.budget.scope == "prompt"):
            what = "cached keys cannot be merged" if stage.name == "cache" else "pictures cannot share its budget"
            raise UnsupportedStage(
                f"{step}: {pruner.name} merges tokens, and {what}; use another stage and scope=image"
            )
        offered = adapter.offers(stage)
        inside = next((s for s in plan.steps if isinstance(s.pruner, EncoderPruner) and s is not step), None)
        if inside is not None:  # the tower's attention then covers other tokens than the pictures had
            offered = offered - TOWER_FIELDS - (ATTENTION_FIELDS if stage.layer == 0 else frozenset())
        missing = frozenset(pruner.needs) - offered
        if missing:
            raise UnsupportedStage(_missing(step, missing, offered, adapter))
    if plan.positions == "compact":
        late = [s for s in plan.steps if s.stage.layer not in (0, None) or s.stage.name in ("cache", "decode")]
        if late or adapter.mrope or any(adapter.sliding):
            what = "this model has layers with a sliding window, which is measured in original positions"
            if late or adapter.mrope:
                what = (
                    f"{late[0]} removes tokens later" if late else f"{adapter.family} has multi-dimensional positions"
                )
            raise UnsupportedStage(f"positions='compact' renumbers the prompt before the language model; {what}. "
                                   "Use positions='original'")  # fmt: skip
    implementation = getattr(adapter.text.config, "_attn_implementation", None)
    if implementation == "flex_attention":
        raise UnsupportedModel("flex_attention builds block masks that cannot be pruned; load the model with "
                               "attn_implementation='sdpa'")  # fmt: skip


def _missing(step: Step, missing: frozenset[str], offered: frozenset[str], adapter: Adapter) -> str:
    from vlprune.pruner import PRUNERS

    fits = sorted(n for n, p in PRUNERS.items() if isinstance(p.needs, frozenset) and p.needs <= offered
                  and not issubclass(p, (EncoderPruner, CachePruner, DecodePruner)))  # fmt: skip
    return (f"{step} needs {', '.join(map(repr, sorted(missing)))}, which the {adapter.family} adapter does not offer at stage "
            f"{step.stage}.\n  It offers: {', '.join(sorted(offered))}. Pruners that fit here: {', '.join(fits)}. "
            f"(vlprune list --model {adapter.family})")  # fmt: skip
