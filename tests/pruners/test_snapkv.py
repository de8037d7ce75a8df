from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from tests.pruners.vectors import causal_attention
from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruners.snapkv import SnapKV, share_of


@pytest.mark.parametrize("name", names("base_kv_snap"))
def test_golden(name: str):
    g = load(name)
    rows = causal_attention(g["q"], g["k"]).transpose(0, 1)  # [L, H, L]
    ctx = Context(keep=g.params["capacity"], text_attention=rows[-10:], keys=g["k"])
    rule = SnapKV(tokens="all", window=g.params["window_share"], kernel=g.params["snapkv_kernel"])
    selection = rule.select(ctx).check(g.params["seq"], ctx.keep)
    assert share_of(ctx.keep, rule.window) == g.params["window"]
    assert torch.equal(selection.heads.kept, g["kept_snapkv"].sort().values)


def test_by_hand():
    """Two query heads a key head, one row in the window, three neighbours in the mean."""
    rows = torch.zeros(2, 4, 6)
    rows[0, :, 5] = 9.0  # in front of the window
    rows[1, 0, 1], rows[1, 1, 1], rows[1, 2, 4], rows[1, 3, 0] = 0.3, 0.3, 0.5, 0.2
    ctx = Context(keep=3, text_attention=rows, keys=torch.zeros(2, 6, 4))
    selection = SnapKV(kernel=3).select(ctx)
    assert selection.heads.kept.tolist() == [[0, 1, 2], [3, 4, 5]]
    torch.testing.assert_close(selection.scores * 3, torch.tensor([0.8, 0.8, 0.6, 0.5, 0.5, 0.5]))
    assert selection.kept.tolist() == [0, 1, 2]
    assert SnapKV(kernel=3, heads="shared").select(ctx).heads is None


def test_a_window_longer_than_the_text():
    rows = torch.rand(2, 4, 30, generator=torch.Generator().manual_seed(0))
    ctx = Context(keep=20, text_attention=rows, keys=torch.zeros(2, 30, 4))
    assert torch.equal(SnapKV(window=1.0).select(ctx).heads.kept, SnapKV(window=0.1).select(ctx).heads.kept)


@pytest.mark.parametrize("keep", [1, 2, 29, 30])
def test_all_tokens_keep_the_window(keep: int):
    rows = torch.rand(5, 4, 30, generator=torch.Generator().manual_seed(0))
    ctx = Context(keep=keep, text_attention=rows, keys=torch.zeros(2, 30, 4))
    selection = SnapKV(tokens="all", window=0.5).select(ctx).check(30, keep)
    last = share_of(keep, 0.5)
    assert selection.heads.kept[:, -last:].tolist() == [list(range(30 - last, 30))] * 2


def test_parameters_it_refuses():
    for wrong in ({"window": 1.5}, {"kernel": 4}, {"kernel": 0}):
        with pytest.raises(SpecError, match="snapkv"):
            SnapKV(**wrong)
