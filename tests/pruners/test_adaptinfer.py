from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.pruners.golden import load, names
from vlprune.context import Context
from vlprune.pruners.adaptinfer import AdaptInfer, votes


def context(attention: Tensor, prefix: int, text: int, keep: int) -> Context:
    """From a whole causal map [H, S, S] of prefix, picture and text."""
    rows = attention[:, -text:].transpose(0, 1)  # [M, H, S]
    return Context(keep=keep, text_attention=rows[..., prefix:-text], text_self_attention=rows[..., -text:])


FILES = [n for n in names("adaptinfer_s") if "shift" not in n]


@pytest.mark.parametrize("name", FILES)
def test_golden(name: str):
    g = load(name)
    prefix, text = int(g["pre"]), int(g["n_text"])
    alive = torch.arange(int(g["n_visual"]))
    for i, budget in enumerate(g["budgets"].tolist()):
        keep = min(budget, len(alive) - 1)
        selection = AdaptInfer().select(context(g[f"attn{i}"][0], prefix, text, keep)).check(len(alive), keep)
        torch.testing.assert_close(selection.scores, g[f"score{i}"], rtol=1e-4, atol=0)
        assert selection.kept.tolist() == g[f"keep{i}"].tolist()
        alive = alive[selection.kept]
        assert alive.tolist() == g[f"orig{i}"].tolist()


@pytest.mark.parametrize("name", FILES)
def test_golden_qwen(name: str):
    g = load(name)
    n = int(g["n_visual"])
    keep = max(1, min(int(float(g["qwen_ratio"]) * n), n))
    selection = AdaptInfer().select(context(g["attn0"][0], int(g["pre"]), int(g["n_text"]), keep)).check(n, keep)
    torch.testing.assert_close(selection.scores, g["qwen_score"], rtol=1e-4, atol=0)
    assert selection.kept.tolist() == g["qwen_keep"].tolist()


def test_by_hand():
    """Both text tokens take part with 0.5 in text-to-text attention."""
    text_rows = torch.tensor([[[0.5, 0.3]], [[0.1, 0.4]]])  # [M=2, H=1, N=2]
    t2t = torch.tensor([[[0.2, 0.0]], [[0.3, 0.2]]])
    torch.testing.assert_close(votes(t2t), torch.tensor([[0.5], [0.5]]))
    ctx = Context(keep=1, text_attention=text_rows, text_self_attention=t2t)
    torch.testing.assert_close(AdaptInfer().score(ctx), torch.tensor([0.30, 0.35]))
    assert AdaptInfer().select(ctx).kept.tolist() == [1]


def test_one_text_row_is_weighted_by_its_own_attention():
    g = torch.Generator().manual_seed(0)
    rows, own = torch.rand(1, 3, 20, generator=g), torch.rand(1, 3, 1, generator=g)
    score = AdaptInfer().score(Context(keep=1, text_attention=rows, text_self_attention=own))
    torch.testing.assert_close(score, (rows[0] * own[0]).sum(0))


def test_equal_votes_leave_the_plain_sum():
    g = torch.Generator().manual_seed(0)
    rows = torch.rand(4, 3, 20, generator=g)
    ctx = Context(keep=6, text_attention=rows, text_self_attention=torch.full((4, 3, 4), 0.1))
    assert AdaptInfer().select(ctx).kept.tolist() == rows.sum((0, 1)).topk(6).indices.sort().values.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_and_counts(dtype: torch.dtype):
    for keep in (1, 6):
        ctx = Context(
            keep=keep, text_attention=torch.ones(3, 2, 6, dtype=dtype), text_self_attention=torch.ones(3, 2, 3)
        )
        assert AdaptInfer().select(ctx).check(6, keep).kept.tolist() == list(range(keep))
