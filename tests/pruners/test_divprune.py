from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from vlprune.context import Context
from vlprune.pruners.divprune import DivPrune


@pytest.mark.parametrize("name", names("base_divprune"))
def test_golden(name: str):
    g = load(name)
    n, keep = g.params["tokens"], g.params["keep"]
    if g.params["mode"] == "duplicates":
        pytest.skip("every token has a twin: the authors' first pick is rounding noise (see the golden README)")
    kept = DivPrune().select(Context(keep=keep, features=g["features"])).check(n, keep).kept
    assert kept.tolist() == g["selected_in_pick_order"].sort().values.tolist()


def test_starts_at_the_loneliest_token():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, -1.0]])
    assert DivPrune().select(Context(keep=1, features=x)).kept.tolist() == [4]
    assert DivPrune().select(Context(keep=2, features=x)).kept[1] == 4


def test_one_of_each_direction_before_any_twin():
    x = torch.eye(4).repeat(3, 1) * torch.arange(1, 13)[:, None]
    kept = DivPrune().select(Context(keep=4, features=x)).kept
    assert sorted((kept % 4).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identical_tokens_still_meet_the_budget(dtype: torch.dtype):
    for keep in (1, 3, 9):
        DivPrune().select(Context(keep=keep, features=torch.ones(9, 4, dtype=dtype))).check(9, keep)
