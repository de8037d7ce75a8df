from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.pruners.golden import load, names
from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruners.dart import Dart


@dataclass(frozen=True)
class Visiting(Dart):
    """DART that visits its pivots in a given order, and shows them."""

    order: tuple[int, ...] = ()

    def visit(self, visual: Tensor, text: Tensor) -> Tensor:
        assert sorted(self.order) == torch.cat([visual, text]).tolist()
        return torch.tensor(self.order)


@pytest.mark.parametrize("name", names("base_dart"))
def test_golden(name: str):
    g = load(name)
    start, n = g.params["image_start"], g.params["image_len"]
    image, text = slice(start, start + n), slice(start + n, g.params["seq_len"])
    expected = g["keep_abs_sorted"] - start
    ctx = Context(
        keep=len(expected),
        keys=g["keys"][:, image],
        text_keys=g["keys"][:, text],
        features=g["hidden_normed"][image],
        text_features=g["hidden_normed"][text],
        norm=lambda h: h,  # the file's states are normalised
    )
    order = tuple((g["pivot_visit_order"] - start).tolist())
    rule = Visiting(visual=g.params["pivot_image"], text=g.params["pivot_text"], order=order)
    assert rule.select(ctx).check(n, ctx.keep).kept.tolist() == expected.tolist()


def context(keep: int, n: int = 12, m: int = 5, dtype: torch.dtype = torch.float32, same: bool = False) -> Context:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.ones(shape) if same else torch.randn(shape, generator=g)).to(dtype)

    return Context(
        keep=keep, keys=draw(2, n, 4), text_keys=draw(2, m, 4), features=draw(n, 6), text_features=draw(m, 6),
        norm=lambda h: h,
    )  # fmt: skip


def test_by_hand():
    """Pivots: visual 0, text 0. Visual 0 takes its opposite 3; text 0, like token 1, takes what is least like it: 2."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [-1.0, 0.1], [0.5, 0.5]])
    ctx = Context(
        keep=3,
        keys=torch.tensor([[[9.0], [1.0], [1.0], [1.0], [-2.0]]]),
        text_keys=torch.tensor([[[-5.0], [1.0]]]),
        features=hidden,
        text_features=torch.tensor([[0.0, 2.0], [1.0, 1.0]]),
        norm=lambda h: h,
    )
    assert Dart(visual=1, text=1).select(ctx).kept.tolist() == [0, 2, 3]


def test_reads_states_after_the_norm():
    ctx = context(keep=8)
    normed = replace(ctx, norm=lambda h: h * torch.tensor([1, 1, 1, 50, 1, 1]))
    already = replace(ctx, features=normed.norm(ctx.features), text_features=normed.norm(ctx.text_features))
    assert Dart().select(normed).kept.tolist() == Dart().select(already).kept.tolist()
    assert Dart().select(normed).kept.tolist() != Dart().select(ctx).kept.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("m", [0, 2, 5])
def test_every_budget_is_met(dtype: torch.dtype, same: bool, m: int):
    for keep in range(1, 13):
        for rule in (Dart(), Dart(visual=9, text=1), Dart(visual=1, text=0)):
            rule.select(context(keep, m=m, dtype=dtype, same=same)).check(12, keep)


def test_pivots_stay():
    ctx = context(keep=7)
    strongest = ctx.keys.abs().sum(dim=(0, 2)).topk(4).indices
    assert set(strongest.tolist()) <= set(Dart().select(ctx).kept.tolist())


def test_no_pivot():
    with pytest.raises(SpecError, match="dart"):
        Dart(visual=0)
