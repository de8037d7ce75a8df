"""Every registered pruner at every stage a LLaVA offers it, with nothing said about any of them by name."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import tiny
import torch

import vlprune
import vlprune.pruners  # registers them
from vlprune import PRUNERS, Budget, Plan, Pruner, Stage, Step, VlpruneError
from vlprune.engine.contexts import Stand

STAGES = ("encoder", "projector", "1", "3", "cache", "decode")
WRAPPERS = {n for n, cls in PRUNERS.items() if any(f.name == "inner" for f in dataclasses.fields(cls))}


@cache
def llava() -> tuple[Any, Any]:
    """One model for all laws; every test leaves it unwrapped."""
    return tiny.llava()


def every_pruner() -> dict[str, Pruner]:
    """Name -> the pruner as it comes; one that wraps another wraps the first that suits it."""
    plain = {name: cls() for name, cls in PRUNERS.items() if name not in WRAPPERS}
    return {name: plain[name] if name in plain else _around(PRUNERS[name], plain) for name in sorted(PRUNERS)}


def _around(cls: type[Pruner], plain: dict[str, Pruner]) -> Pruner:
    for inner in plain.values():
        try:
            return cls(inner=inner)
        except VlpruneError:
            continue
    raise LookupError(f"{cls.name} wraps none of the registered pruners")


def give_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores for rules that rank by some from outside: the same for all pictures of one size, alone and in a batch."""

    def scores(stand: Stand, visual: Any) -> torch.Tensor:
        return torch.rand(visual.tokens, generator=torch.Generator().manual_seed(visual.tokens)).to(
            stand._device, non_blocking=True
        )

    monkeypatch.setattr(Stand, "_guide", scores)


def plan(pruner: Pruner, stage: str, keep: float | int) -> Plan:
    return Plan((Step(pruner, Stage(stage), Budget(keep)),))


def cases(*stages: str) -> list[Any]:
    """(pruner, stage) for pytest; a pruner that fits no stage of this model is skipped in its own words."""
    out = []
    for name, pruner in every_pruner().items():
        why = {s: vlprune.why_unsupported(llava()[0], plan(pruner, s, 1.0)) for s in STAGES}
        fits = [s for s in STAGES if why[s] is None]
        if not fits:
            skip = pytest.mark.skip(reason=why.get(pruner.stage) or why["1"])
            out.append(pytest.param(pruner, pruner.stage, marks=skip, id=name))
        out += [pytest.param(pruner, s, id=f"{name}@{s}") for s in fits if not stages or s in stages]
    return out
