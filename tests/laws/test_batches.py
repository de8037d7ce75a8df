"""Many pictures in one call: the tokens that each of them keeps alone, for hardly more launches than one picture needs."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from laws.every import every_pruner
from laws.test_selections import GRIDS, context, shown
from torch.utils._python_dispatch import TorchDispatchMode

from vlprune import Context, DecodePruner, EncoderPruner, Grid, Pruner, Selection

STEP_BY_STEP = {  # rules that are not asked for a batch at all, and why
    "delta": "decode steps are chosen item by item",
    "fasa": "decode steps are chosen item by item",
    "fastocr": "decode steps are chosen item by item",
    "flowcut": "how many tokens leave a vision layer hangs on the picture",
    "spatten": "decode steps are chosen item by item",
}
ONE_BY_ONE = {  # rules whose launches grow with the batch, and why
    "mustdrop:count=thresholds": "how many tokens stay hangs on the picture",
    "prumerge:count=outliers": "how many tokens stay hangs on the picture",
    "vflowopt": "the tower's rows come by a function of each picture's own",
    "vflowopt:recycle=False": "the tower's rows come by a function of each picture's own",
    "zoo_prune:crops=each": "how many tokens a crop has and keeps is read on the host",
}
GROWTH, COPIES = 1.5, 5  # launches of eight pictures over those of one; and those that put a batch together


def every_choice() -> Iterator[tuple[str, Pruner]]:
    """Every rule with its defaults, and once more for each other value of a parameter that takes a few named ones."""
    for name, pruner in every_pruner().items():
        yield name, pruner
        hints = typing.get_type_hints(type(pruner))
        for f in fields(pruner):
            named = typing.get_origin(hints[f.name]) is typing.Literal
            values = typing.get_args(hints[f.name]) if named else (False, True) if hints[f.name] is bool else ()
            for value in values:
                if value != getattr(pruner, f.name):
                    yield f"{name}:{f.name}={value}", replace(pruner, **{f.name: value})


CHOICES = [(name, p) for name, p in every_choice() if not isinstance(p, EncoderPruner | DecodePruner)]
PARAMS = [pytest.param(name, p, id=name) for name, p in CHOICES]


def pictures(count: int, grids: tuple[Grid, ...], keep: int, index: Any = None) -> list[Context]:
    """Contexts of other numbers, separators and picture sizes; every third has a longer text."""
    n = sum(grid.tokens for grid in grids) if index is None else len(index)
    found = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        own = {
            "text": 7 if i % 3 == 2 else 5,
            "index": None if index is None else index + i % 2,
            "padding": None,
            "newline": torch.zeros(n, dtype=torch.bool).index_fill(0, torch.tensor([i % n, n - 1]), True),
            "image_size": (40, 30 - 10 * (i % 2)),
        }
        found.append(context(grids, keep, make=lambda *shape, g=g: torch.randn(*shape, generator=g), **own))
    return found


def same(alone: Any, together: Any) -> None:
    """All that a Selection, a merge or the choice of the heads consists of."""
    assert vars(alone).keys() == vars(together).keys()
    for name, value in vars(alone).items():
        other = getattr(together, name)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-5 if name == "scores" else 0)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(other, value), name
        elif value is None:
            assert other is None, name
        else:
            same(value, other)


LEFT = torch.tensor([0, 1, 4, 7, 8, 12, 13, 20, 22, 30, 31, 34])


@pytest.mark.parametrize(("name", "pruner"), PARAMS)
@pytest.mark.parametrize(
    ("grids", "keep", "index"),
    [
        pytest.param(GRIDS["square"], 9, None, id="square"),
        pytest.param(GRIDS["square"], 5, LEFT, id="after an earlier stage"),
        pytest.param(GRIDS["video"], 17, None, id="video"),
        pytest.param(GRIDS["base and crops"], 14, None, id="base and crops"),
    ],
)
def test_one_batch_equals_single_calls(name, pruner, grids, keep, index):
    contexts = [shown(pruner, ctx) for ctx in pictures(5, grids, keep, index)]
    alone = [pruner.select(ctx) for ctx in contexts]
    for ctx in contexts:
        if ctx.generator is not None:
            ctx.generator.manual_seed(0)
    together = pruner.select_many(contexts)
    for ctx, one, other in zip(contexts, alone, together, strict=True):
        other.check(ctx.tokens, keep, pruner.adaptive)
        same(one, other)


class Launches(TorchDispatchMode):
    """How many operators make a tensor; a view launches nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func is not torch.ops.aten._unsafe_view.default
        return func(*args, **(kwargs or {}))


def launches(pruner: Pruner, contexts: list[Context]) -> int:
    with torch.no_grad(), Launches() as seen:
        pruner.select_many(contexts)
    return seen.count


@pytest.mark.parametrize(("name", "pruner"), PARAMS)
def test_eight_pictures_cost_little_more_launches_than_one(name, pruner):
    g = torch.Generator().manual_seed(0)
    ctx = context((Grid(1, 12, 12),), 18, make=lambda *shape: torch.randn(*shape, generator=g))
    ctx = shown(pruner, ctx)
    one, eight = launches(pruner, [ctx]), launches(pruner, [ctx] * 8)
    if name in ONE_BY_ONE:
        assert eight > GROWTH * one + COPIES, f"{name} is listed and need not be"
    else:
        assert eight <= GROWTH * one + COPIES, f"{one} operators for one picture, {eight} for eight"


def test_the_lists_are_of_rules_that_exist():
    assert set(ONE_BY_ONE) <= {name for name, _ in CHOICES}
    assert set(STEP_BY_STEP) == {n for n, p in every_pruner().items() if isinstance(p, EncoderPruner | DecodePruner)}


def test_a_batch_that_compares_many_tokens_goes_in_parts(monkeypatch):
    monkeypatch.setattr("vlprune.pruner.PAIRS", 2 * 36**2)
    pruner = every_pruner()["scope"]
    contexts = [shown(pruner, ctx) for ctx in pictures(5, GRIDS["square"], 9)]
    together = pruner.select_many(contexts)
    for ctx, other in zip(contexts, together, strict=True):
        same(pruner.select(ctx), other)


def test_a_subclass_does_not_inherit_the_claim():
    class Peeking(type(every_pruner()["fastv"])):
        def select(self, ctx: Context) -> Selection:
            assert float(ctx.last_attention.sum()) > 0
            return super().select(ctx)

    contexts = [shown(Peeking(), ctx) for ctx in pictures(3, GRIDS["square"], 9)]
    assert len(Peeking().select_many(contexts)) == 3
