from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.pruners.golden import load, names
from vlprune.context import Context
from vlprune.pruners.trim import Trim


@pytest.mark.parametrize("name", names("base_trim"))
def test_golden(name: str):
    """Scores of the file come from features behind a layer norm without weights, in CLIP's space."""
    g = load(name)
    n, keep = len(g["features"]), len(g["kept_sorted"]) + 1
    normed = F.layer_norm(g["features"], g["features"].shape[1:])
    ctx = Context(keep=keep, features=normed, text_embeddings=g["text_embed"][None])
    selection = Trim().select(ctx).check(n, keep)
    rows = selection.apply(g["features"])
    stays = torch.isin(selection.kept, g["kept_sorted"])
    assert int(stays.sum()) == keep - 1
    # the authors' output is float16
    torch.testing.assert_close(rows[stays], g["output"][:-1], rtol=0, atol=2e-3)
    torch.testing.assert_close(rows[~stays], g["output"][-1:], rtol=0, atol=2e-3)


def test_by_hand():
    x = torch.tensor([[1.0, 0.0], [-1.0, 5.0], [3.0, 0.0], [0.5, 7.0]])
    ctx = Context(keep=2, features=x, text_embeddings=torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    selection = Trim().select(ctx)
    assert selection.scores.tolist() == [-1, 1, -3, -0.5]
    assert selection.kept.tolist() == [1, 3]
    torch.testing.assert_close(selection.apply(x), torch.stack([x[1], x[[0, 2, 3]].mean(0)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("equal", [False, True])
def test_counts(dtype: torch.dtype, equal: bool):
    g = torch.Generator().manual_seed(0)
    x = (torch.ones(9, 4) if equal else torch.randn(9, 4, generator=g)).to(dtype)
    for keep in (1, 2, 8, 9):
        ctx = Context(keep=keep, features=x, text_embeddings=torch.randn(3, 4, generator=g).to(dtype))
        selection = Trim().select(ctx).check(9, keep)
        rows = selection.apply(x)
        if keep == 1:
            torch.testing.assert_close(rows[0].float(), x.float().mean(0), rtol=1e-2, atol=1e-3)
        if keep == 9:
            assert torch.equal(rows, x)
        if equal:
            torch.testing.assert_close(rows, x[:keep])
