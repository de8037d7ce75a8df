from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from vlprune.context import Context
from vlprune.pruners.flowcut_llm import FlowCutLLM


@pytest.mark.parametrize("name", names("flowcut_llm"))
def test_golden(name: str):
    g = load(name)
    ctx = Context(keep=g.params["target"], last_query=g["q_last"], last_value=g["v_last"], keys=g["k_visual"],
                  values=g["v_visual"])  # fmt: skip
    selection = FlowCutLLM().select(ctx).check(g.params["n_visual"], g.params["target"])
    assert selection.kept.tolist() == g["keep_sorted"].tolist()
    torch.testing.assert_close(selection.scores, g["score"], rtol=1e-4, atol=0)


def context(keep: int, dtype: torch.dtype = torch.float32) -> Context:
    g = torch.Generator().manual_seed(0)
    return Context(
        keep=keep,
        last_query=torch.randn(6, 8, generator=g).to(dtype),
        last_value=torch.randn(2, 8, generator=g).to(dtype),
        keys=torch.randn(2, 40, 8, generator=g).to(dtype),
        values=torch.randn(2, 40, 8, generator=g).to(dtype),
    )


def test_grouped_heads_equal_repeated_ones():
    ctx = context(10)
    repeated = Context(keep=10, last_query=ctx.last_query, last_value=ctx.last_value.repeat_interleave(3, 0),
                       keys=ctx.keys.repeat_interleave(3, 0), values=ctx.values.repeat_interleave(3, 0))  # fmt: skip
    torch.testing.assert_close(FlowCutLLM().score(ctx), FlowCutLLM().score(repeated))


def test_by_hand():
    """Equal attention and semantics leave the strength of the values: 1, 2 and 4."""
    ctx = Context(keep=1, last_query=torch.zeros(1, 2), last_value=torch.zeros(1, 2), keys=torch.ones(1, 3, 2),
                  values=torch.tensor([[[1.0, 0.0], [-1.0, 1.0], [0.0, -4.0]]]))  # fmt: skip
    torch.testing.assert_close(FlowCutLLM().score(ctx), torch.tensor([1.0, 2.0, 4.0]) * 2 / 3)
    assert FlowCutLLM().select(ctx).kept.tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [1, 39, 40])
def test_counts(dtype: torch.dtype, keep: int):
    FlowCutLLM().select(context(keep, dtype)).check(40, keep)


def test_ties_go_to_the_earlier_token():
    ones = Context(keep=3, last_query=torch.ones(2, 4), last_value=torch.ones(2, 4), keys=torch.ones(2, 9, 4),
                   values=torch.ones(2, 9, 4))  # fmt: skip
    assert FlowCutLLM().select(ones).kept.tolist() == [0, 1, 2]
