from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from tests.pruners.vectors import causal_attention
from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruners.h2o import H2O


@pytest.mark.parametrize("name", names("base_kv_snap"))
def test_golden(name: str):
    g = load(name)
    ctx = Context(keep=g.params["capacity"], prompt_attention=causal_attention(g["q"], g["k"]).sum(1), keys=g["k"])
    selection = H2O(tokens="all", window=g.params["window_share"]).select(ctx).check(g.params["seq"], ctx.keep)
    assert torch.equal(selection.heads.kept, g["kept_h2o"].sort().values)


def test_by_hand():
    sums = torch.tensor([[3.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.5, 0.0], [0.0, 1.0, 0.0, 0.5], [0.0, 0.0, 0.0, 1.0]])
    ctx = Context(keep=2, prompt_attention=sums, keys=torch.zeros(2, 4, 3))
    selection = H2O().select(ctx)
    assert selection.heads.kept.tolist() == [[0, 2], [1, 3]]
    assert selection.kept.tolist() == [0, 2]
    assert selection.scores.tolist() == [3.0, 2.0, 2.5, 1.5]
    assert H2O(tokens="all").select(ctx).heads.kept.tolist() == [[0, 3], [1, 3]]


def test_parameters_it_refuses():
    with pytest.raises(SpecError, match="h2o"):
        H2O(window=-0.1)
