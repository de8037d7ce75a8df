from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from tests.pruners.vectors import causal_attention
from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruners.lookm import LookM, into_nearest
from vlprune.selection import Heads


@pytest.mark.parametrize("name", names("base_kv_lookm"))
def test_golden(name: str):
    g = load(name)
    keep = g.params["hh"] + g.params["recent"]
    sums = causal_attention(g["q"], g["k"]).sum(1)
    ctx = Context(keep=keep, prompt_attention=sums, keys=g["k"], is_text=g["text_mask"])
    selection = LookM(tokens="all", window=g.params["recent"] / keep).select(ctx).check(g.params["seq"], keep)
    assert torch.equal(selection.heads.kept, g["kept_sorted"])
    for x, merged in ((g["k"], g["k_merged"]), (g["v"], g["v_merged"])):  # the port rounds to bfloat16
        torch.testing.assert_close(selection.heads.apply(x), merged, rtol=0, atol=3e-2)


def test_merging_by_hand():
    """Of five keys the first and the fourth stay; the second and the third are nearest to the first."""
    keys = torch.tensor([[[1.0, 0.0], [2.0, 0.1], [3.0, -0.1], [0.0, 1.0], [0.2, 5.0]]])
    heads = Heads(torch.tensor([[0, 3]]), into_nearest(keys, torch.tensor([[0, 3]])))
    first = (torch.tensor([1.0, 0.0]) + torch.tensor([1.5, 0.05]) + torch.tensor([2.0, -0.05])) / 3
    fourth = (torch.tensor([0.0, 1.0]) + torch.tensor([0.1, 3.0])) / 2
    torch.testing.assert_close(heads.apply(keys)[0], torch.stack([first, fourth]))
    values = torch.tensor([[[1.0], [10.0], [100.0], [0.0], [7.0]]])
    torch.testing.assert_close(heads.apply(values).flatten().tolist(), [(1 + 5.5 + 50.5) / 3, 1.75])


def test_equal_rows_stay_what_they_are():
    keys = torch.ones(2, 9, 4)
    ctx = Context(keep=3, prompt_attention=torch.rand(4, 9), keys=keys)
    torch.testing.assert_close(LookM().select(ctx).heads.apply(keys), torch.ones(2, 3, 4))


def test_text_comes_first():
    text = torch.tensor([True, False, False, True, False])
    ctx = Context(
        keep=3, prompt_attention=torch.tensor([[0.1, 5.0, 4.0, 0.2, 0.0]]), keys=torch.rand(1, 5, 2), is_text=text
    )
    assert LookM(tokens="all", window=0.0).select(ctx).heads.kept.tolist() == [[0, 3, 4]]
    assert LookM().select(ctx).heads.kept.tolist() == [[1, 2, 3]]
    assert "is_text" not in LookM().needs


def test_shared_heads_merge_each_its_own():
    g = torch.Generator().manual_seed(0)
    ctx = Context(keep=4, prompt_attention=torch.rand(4, 12, generator=g), keys=torch.randn(2, 12, 3, generator=g))
    heads = LookM(heads="shared").select(ctx).heads
    assert torch.equal(heads.kept[0], heads.kept[1])
    assert not torch.equal(heads.merge.slot[0], heads.merge.slot[1])
    with pytest.raises(SpecError, match="lookm"):
        LookM(window=2.0)
