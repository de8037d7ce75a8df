from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruners.mmtok import MMTok, cover


@pytest.mark.parametrize("name", names("base_mmtok"))
def test_golden(name: str):
    g = load(name)
    p = g.params
    ctx = Context(keep=p["keep"], features=g["vision_projected"], encoder_features=g["vision_encoder_features"],
                  text_embeddings=g["text_tokens"])  # fmt: skip
    pruner = MMTok(alpha=p["alpha"], text_temperature=p["tv_temp"], temperature=p["vv_temp"])
    selection = pruner.select(ctx).check(p["tokens"], p["keep"])
    assert selection.kept.tolist() == g["selected_sorted"].sort().values.tolist()


def test_coverage_by_hand():
    """Column 1 covers most at first; then column 2, which covers the row that is left, beats the larger column 0."""
    rows = torch.tensor([[0.5, 0.6, 0.0, 0.1], [0.5, 0.6, 0.0, 0.1], [0.0, 0.0, 0.3, 0.2]])
    assert cover(rows, 1).tolist() == [1]
    assert cover(rows, 2).tolist() == [1, 2]
    assert cover(rows, 3).tolist() == [0, 1, 2], "nothing left to gain: the earlier token"
    assert cover(rows, 4).tolist() == [0, 1, 2, 3]


def test_without_the_picture_the_text_decides():
    x = torch.eye(5)
    ctx = Context(keep=2, features=x, encoder_features=torch.ones(5, 3), text_embeddings=x[[3, 1]])
    assert MMTok(alpha=0.0).select(ctx).kept.tolist() == [1, 3]
    with pytest.raises(SpecError, match="temperatures"):
        MMTok(temperature=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("equal", [False, True])
def test_counts(dtype: torch.dtype, equal: bool):
    g = torch.Generator().manual_seed(0)
    x = torch.ones(20, 6) if equal else torch.randn(20, 6, generator=g)
    for keep in (1, 7, 20):
        ctx = Context(keep=keep, features=x.to(dtype), encoder_features=x.to(dtype),
                      text_embeddings=torch.randn(3, 6, generator=g).to(dtype))  # fmt: skip
        MMTok().select(ctx).check(20, keep)
