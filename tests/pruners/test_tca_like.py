from __future__ import annotations

import pytest
import torch

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruners.tca_like import TCALike


def test_by_hand():
    """Four equal keys and four that differ pairwise: the first block has one place, its most attended token's."""
    e = torch.eye(4)
    keys = torch.cat([e[:1].expand(4, 4), e])[None]
    attention = torch.tensor([[0.1, 0.3, 0.2, 0.1, 0.05, 0.02, 0.08, 0.01]])
    chosen = TCALike(block=4).select(Context(keep=4, keys=keys, last_attention=attention))
    assert chosen.kept.tolist() == [4, 5, 6, 7]  # the equal ones claim 0.001 / 0.5, the last of the others 0.501 / 3.5
    five = TCALike(block=4).select(Context(keep=5, keys=keys, last_attention=attention))
    assert five.kept.tolist() == [1, 4, 5, 6, 7]


def test_equal_blocks_share_equally():
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 8, 6, generator=g).repeat(1, 3, 1)
    attention = torch.rand(4, 24, generator=g)
    kept = TCALike(block=8).select(Context(keep=6, keys=keys, last_attention=attention)).heads.kept
    assert (kept // 8).tolist() == [[0, 0, 1, 1, 2, 2]] * 2
    best = attention.unflatten(0, (2, 2)).sum(1).unflatten(1, (3, 8)).topk(2).indices.sort().values
    assert torch.equal(kept.unflatten(1, (3, 2)) % 8, best)


def test_blocks_of_one_token_go_by_position():
    """A block of one has no spread: all claims are equal, and ties go to the earlier token."""
    g = torch.Generator().manual_seed(0)
    ctx = Context(keep=3, keys=torch.randn(1, 9, 4, generator=g), last_attention=torch.rand(1, 9, generator=g))
    assert TCALike(block=1).select(ctx).kept.tolist() == [0, 1, 2]


def test_a_block_that_does_not_divide_n():
    g = torch.Generator().manual_seed(0)
    ctx = Context(keep=9, keys=torch.randn(2, 21, 4, generator=g), last_attention=torch.rand(4, 21, generator=g))
    TCALike(block=8).select(ctx).check(21, 9)


def test_parameters_it_refuses():
    with pytest.raises(SpecError, match="block=0"):
        TCALike(block=0)
