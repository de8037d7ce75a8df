from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from vlprune.context import Context
from vlprune.plan import Plan
from vlprune.pruners.pyramiddrop import PyramidDrop


@pytest.mark.parametrize("name", names("base_pdrop"))
def test_golden(name: str):
    g = load(name)
    start, n, keep = g.params["image_start"], g.params["image_len"], g.params["keep_len"]
    logits = (g["k_all"] @ g["q_last"][..., None]).squeeze(-1) / g.params["head_dim"] ** 0.5
    ctx = Context(keep=keep, next_attention=logits.softmax(-1)[:, start : start + n])
    selection = PyramidDrop().select(ctx).check(n, keep)
    torch.testing.assert_close(selection.scores, g["scores"], rtol=1e-4, atol=0)
    expected = g["keep_abs_sorted"]
    visual = expected[(expected >= start) & (expected < start + n)] - start
    assert selection.kept.tolist() == visual.tolist()


def test_mean_over_heads():
    rows = torch.tensor([[0.5, 0.1, 0.2], [0.0, 0.3, 0.3]])
    ctx = Context(keep=2, next_attention=rows)
    torch.testing.assert_close(PyramidDrop().score(ctx), torch.tensor([0.25, 0.2, 0.25]))
    assert PyramidDrop().select(ctx).kept.tolist() == [0, 2]


def test_schedule_is_a_plan():
    text = "pyramiddrop:keep=0.5+pyramiddrop@16:keep=0.25+pyramiddrop@24:keep=0.125"
    plan = Plan.parse(text)
    assert str(plan) == text
    assert [s.budget.count(576) for s in plan.steps] == [288, 144, 72]
    assert plan.layer_average(576, 32) == 270


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_and_counts(dtype: torch.dtype):
    for keep in (1, 6):
        ctx = Context(keep=keep, next_attention=torch.full((2, 6), 0.1, dtype=dtype))
        assert PyramidDrop().select(ctx).check(6, keep).kept.tolist() == list(range(keep))
