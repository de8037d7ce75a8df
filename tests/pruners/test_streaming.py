from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruners.streaming import Streaming


@pytest.mark.parametrize("name", names("base_kv_snap"))
def test_golden(name: str):
    g = load(name)
    ctx = Context(keep=g.params["capacity"], keys=g["k"])
    for tokens in ("all", "visual"):
        selection = (
            Streaming(tokens=tokens, window=g.params["window_share"]).select(ctx).check(len(g["k"][0]), ctx.keep)
        )
        for head in g["kept_streaming"]:
            assert selection.kept.tolist() == head.sort().values.tolist()


def test_the_window_is_part_of_the_budget():
    keys = torch.zeros(2, 10, 4)
    assert Streaming().select(Context(keep=1, keys=keys)).kept.tolist() == [9]
    assert Streaming().select(Context(keep=3, keys=keys)).kept.tolist() == [0, 1, 9]
    assert Streaming(window=1.0).select(Context(keep=3, keys=keys)).kept.tolist() == [7, 8, 9]
    assert Streaming().select(Context(keep=10, keys=keys)).kept.tolist() == list(range(10))
    with pytest.raises(SpecError, match="streaming"):
        Streaming(window=2.0)
