"""The front door: wrap a model, unwrap it, look at what happened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from vlprune.adapters.base import Adapter, find
from vlprune.engine.checks import check_plan
from vlprune.engine.engine import Engine
from vlprune.engine.replay import Replay
from vlprune.errors import PruningError, SpecError, UnsupportedModel, UnsupportedStage
from vlprune.plan import Budget, Plan, Positions, Stage, Step
from vlprune.pruner import Pruner
from vlprune.trace import Trace

M = TypeVar("M", bound=nn.Module)
ATTRIBUTE = "_vlprune"


def wrap(model: M, plan: str | Plan | Pruner, keep: float | int | None = None, *, stage: str | None = None,
         positions: Positions | None = None, **params: Any) -> M:  # fmt: skip
    """Prune this model's visual tokens from now on, in place; returns the same object.

    Args:
        model: a Hugging Face vision-language model (``...ForConditionalGeneration``).
        plan: a pruner's name, a plan's text ("fastv@2:keep=0.333"), a Pruner or a Plan.
        keep: share (float in (0, 1]) or count (int >= 2) of visual tokens to keep, where `plan` does not say.
        stage: where to prune, where `plan` does not say; default: where the pruner's paper puts it.
        positions: "original" (default) keeps every token's position id, "compact" renumbers.
        params: the pruner's own parameters, as in ``wrap(model, "holov", keep=64, beta=0.1)``.
    Raises:
        SpecError, BudgetError: the plan cannot be understood. UnsupportedModel, UnsupportedStage: this model cannot serve
        it. The model is then as it was before.
    Wrapping again replaces the plan.
    """
    plan = _plan(plan, keep, stage, positions, params)
    engine, before = Engine(model, plan, find(model)), _engine(model)
    unwrap(model, missing_ok=True)
    try:
        _put(model, engine)
    except BaseException:
        engine.detach()
        _put(model, before)
        raise
    return model


def unwrap(model: M, missing_ok: bool = False) -> M:
    """Take every hook off again; the model is bit for bit what it was. PruningError if it is not wrapped."""
    engine = _engine(model)
    if engine is None:
        if missing_ok:
            return model
        raise PruningError("this model is not wrapped; vlprune.wrap(model, ...) does that")
    engine.detach()
    object.__delattr__(model, ATTRIBUTE)
    return model


@contextmanager
def pruning(model: M, plan: str | Plan | Pruner, keep: float | int | None = None, **options: Any) -> Iterator[M]:
    """Wrap for the length of a with-block, then put back whatever was there before, also after an error."""
    before = _engine(model)
    wrap(model, plan, keep, **options)
    try:
        yield model
    finally:
        unwrap(model, missing_ok=True)
        _put(model, before)


def image_sizes(model: M, sizes: list[tuple[int, int]]) -> AbstractContextManager[M]:
    """Tell the sizes (width, height) that the pictures had before the processor resized them, in the processor's order.

    Pruners that must know which tokens show letterbox padding (`debias`) read them. Holds for a with-block, in this thread.
    """
    return _telling(model, sizes=sizes)


def guided(model: M, scores: Sequence[Tensor]) -> AbstractContextManager[M]:
    """Give scores from outside, higher stays, to rules that rank by them (`sgl`). Holds for a with-block, in this thread.

    Args:
        scores: for every picture the model is given, in the processor's order, [N] over the visual tokens it has at
            first: those of `vlprune.gathered_attention`, or anything you computed.
    """
    return _telling(model, guide=list(scores))


def recording(model: M) -> AbstractContextManager[M]:
    """Keep every choice of a per-step pruner in the trace, for `Trace.focus` and `Trace.words`.

    Holds for a with-block, in this thread. A choice of K among N tokens holds K + 2 N numbers on the model's device until
    the trace goes.
    """
    return _telling(model, recording=True)


@contextmanager
def _telling(model: M, **told: Any) -> Iterator[M]:
    """Set what a wrapped model is told about its inputs, then put back what was there."""
    runs = _wrapped(model).runs
    before = {name: getattr(runs, name) for name in told}
    vars(runs).update(told)
    try:
        yield model
    finally:
        vars(runs).update(before)


def replay(model: nn.Module, inputs: Mapping[str, Any], new_tokens: int) -> Replay:
    """Prefill and greedy decoding as CUDA graphs, for prompts of the shape of `inputs` and up to `new_tokens` new tokens.

    For small batches, where launching kernels takes longer than running them; see docs/fast.md.
    Raises:
        PruningError, UnsupportedStage, UnsupportedModel: as `vlprune.engine.replay.Replay`.
    """
    return Replay(lambda: _engine(model), inputs, new_tokens)


def trace(model: nn.Module) -> Trace:
    """What happened in this thread's last prefill with pictures. PruningError before the first."""
    last = _wrapped(model).runs.last
    if last is None:
        raise PruningError("nothing to trace yet: run the wrapped model on a prompt with a picture first")
    return last


def plan_of(model: nn.Module) -> Plan:
    """The plan a model is wrapped with. PruningError if it is not wrapped."""
    return _wrapped(model).plan


def supported(model: nn.Module, plan: str | Plan | Pruner, keep: float | int | None = 1.0, **options: Any) -> bool:
    """Whether `wrap` would take this plan for this model; raises SpecError only if the plan is no plan."""
    return why_unsupported(model, plan, keep, **options) is None


def why_unsupported(
    model: nn.Module, plan: str | Plan | Pruner, keep: float | int | None = 1.0, **options: Any
) -> str | None:
    """The reason `wrap` would refuse this plan for this model, or None."""
    if isinstance(plan, Plan) or (isinstance(plan, str) and "keep=" in plan):
        keep = None
    stage, positions = options.pop("stage", None), options.pop("positions", None)
    read = _plan(plan, keep, stage, positions, options)
    try:
        check_plan(read, find(model))
    except (UnsupportedModel, UnsupportedStage) as error:
        return str(error)
    return None


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter that would serve this model. UnsupportedModel names the families that have one."""
    return find(model)


def _put(model: nn.Module, engine: Engine | None) -> None:
    if engine is not None:
        engine.attach()
        object.__setattr__(model, ATTRIBUTE, engine)


def _engine(model: nn.Module) -> Engine | None:
    return getattr(model, ATTRIBUTE, None)


def _wrapped(model: nn.Module) -> Engine:
    engine = _engine(model)
    if engine is None:
        raise PruningError("this model is not wrapped; vlprune.wrap(model, ...) does that")
    return engine


def _plan(plan: str | Plan | Pruner, keep: float | int | None, stage: str | None, positions: Positions | None,
          params: dict[str, Any]) -> Plan:  # fmt: skip
    if isinstance(plan, Pruner):
        if keep is None:
            raise SpecError(f"{plan.name} needs a budget; pass keep=")
        if params:
            raise SpecError(f"set {sorted(params)} on the pruner itself")
        plan = Plan((Step(plan, Stage(stage or plan.stage), Budget(keep)),))
    elif isinstance(plan, str):
        plan = Plan.parse(plan, keep, **params)
        if stage is not None:
            if len(plan.steps) > 1:
                raise SpecError("stage= fits a single step; write it into the plan's text as pruner@stage")
            step = plan.steps[0]
            plan = Plan((Step(step.pruner, Stage(stage), step.budget),), plan.positions)
    elif not isinstance(plan, Plan):
        raise SpecError(f"a plan is a text, a Plan or a Pruner, got {type(plan).__name__}")
    elif keep is not None or params or stage is not None:
        raise SpecError("this Plan already says how many tokens to keep; change the Plan instead of passing more")
    return Plan(plan.steps, positions) if positions else plan
