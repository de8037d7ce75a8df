from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from vlprune.context import Context
from vlprune.pruners.cdpruner import CDPruner, select_dpp, unit_range


@pytest.mark.parametrize("name", names("base_cdpruner"))
def test_golden_process(name: str):
    """With CLIP's relevance, which no Context carries; the file takes its range over the whole batch."""
    g = load(name)
    unit = torch.nn.functional.normalize
    q = -(unit(g["image_embeds"], dim=-1) @ unit(g["text_embeds"], dim=-1).T).mean(dim=-1)  # [B, N]
    r = unit_range(q)
    for x, relevance, mask in zip(g["features_projected"], r, g["keep_mask"], strict=True):
        kept = select_dpp(x, relevance, g.params["keep"])
        assert kept.tolist() == mask.nonzero().squeeze(1).tolist()


def test_most_relevant_comes_first():
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    ctx = Context(keep=1, features=x, text_embeddings=torch.tensor([[2.0, 0.0], [4.0, 0.2]]))
    assert CDPruner().select(ctx).kept.tolist() == [0]
    assert CDPruner().select(ctx).scores.argmax() == 0


def test_diversity_is_weighed_by_relevance():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.05], [0.6, 0.8]])
    assert select_dpp(x, torch.tensor([1.0, 1.0, 0.9]), 2).tolist() == [0, 2]  # 1 repeats 0
    assert select_dpp(x, torch.tensor([1.0, 0.9, 0.01]), 2).tolist() == [0, 1]  # 2 does not matter


def test_unit_range():
    torch.testing.assert_close(
        unit_range(torch.tensor([1.0, 3.0, 2.0])), torch.tensor([0.0, 1.0, 0.5]), atol=1e-6, rtol=0
    )
    assert unit_range(torch.full((4,), 0.3)).tolist() == [1.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_edges(dtype: torch.dtype):
    for keep in (1, 5, 9):
        for x in (torch.ones(9, 4), torch.randn(9, 4, generator=torch.Generator().manual_seed(0))):  # rank 1 and 4
            ctx = Context(keep=keep, features=x.to(dtype), text_embeddings=torch.ones(3, 4, dtype=dtype))
            CDPruner().select(ctx).check(9, keep)
