from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from vlprune.context import Context
from vlprune.pruners.fastervlm import FasterVLM


@pytest.mark.parametrize("name", names("base_fastervlm"))
def test_golden(name: str):
    g = load(name)
    n, keep = g.params["patches"], g.params["keep"]
    for attention, mask in zip(g["cls_attn"], g["keep_mask"], strict=True):
        kept = FasterVLM().select(Context(keep=keep, cls_attention=attention)).check(n, keep).kept
        assert kept.tolist() == mask.nonzero().squeeze(1).tolist()


def test_heads_count_alike():
    attention = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.0, 0.4, 0.1, 0.5]])
    assert FasterVLM().select(Context(keep=2, cls_attention=attention)).kept.tolist() == [0, 1]
    received = Context(keep=1, received_attention=attention)
    assert FasterVLM(attention="received").select(received).kept.tolist() == [1]
    assert FasterVLM(attention="received").needs == {"received_attention"}
    assert FasterVLM().needs == {"cls_attention"}


def test_ties_and_unseen_tokens():
    same = Context(keep=3, cls_attention=torch.ones(2, 5, dtype=torch.bfloat16))
    assert FasterVLM().select(same).kept.tolist() == [0, 1, 2]
    attention = torch.tensor([[torch.nan, 0.2, 0.1]])
    assert FasterVLM().select(Context(keep=2, cls_attention=attention)).kept.tolist() == [1, 2]
