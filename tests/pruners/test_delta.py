from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.pruners.golden import load, names
from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruners.delta import Delta


def kept(rule: Delta, a: Tensor, keep: int) -> list[int]:
    return rule.step(Context(keep=keep, last_attention=a), None)[0].check(a.shape[1], keep).kept.tolist()


@pytest.mark.parametrize("name", names("delta"))
def test_golden(name: str):
    g = load(name)
    page, count = int(g["page_size"]), int(g["subset_pages"])
    rule = Delta(page=page, recent=int(g["last_pages"]))
    for b, (length, pages) in enumerate(zip(g["lengths"].tolist(), g["page_counts"].tolist(), strict=True)):
        attention = g["logits"][b].softmax(-1)[:, :length]  # -inf behind the length
        scores, last = rule.pages(attention.amax(0)), pages - rule.recent
        torch.testing.assert_close(scores[:last], g["page_scores"][b, :last], rtol=1e-4, atol=1e-6)
        short = pages * page - length  # tokens that the last page, always chosen, lacks
        chosen = kept(rule, attention, min(count, pages) * page - short)
        start, stop = g["selected_indptr"][b : b + 2].tolist()
        assert sorted({i // page for i in chosen}) == g["selected_pages"][start:stop].tolist()
        assert len(chosen) == sum(
            len(range(p * page, min((p + 1) * page, length))) for p in {i // page for i in chosen}
        )


def test_a_page_that_does_not_fit_gives_its_best_tokens():
    a = torch.tensor([[0.1, 0.1, 0.1, 0.5, 0.0, 0.1, 0.2, 0.3, 0.1]])
    rule = Delta(page=3)  # pages sum to 0.3, 0.6 and 0.6; of equal ones the earlier wins
    assert kept(rule, a, 1) == [3]
    assert kept(rule, a, 3) == [3, 4, 5]
    assert kept(rule, a, 5) == [3, 4, 5, 6, 7]
    assert kept(rule, a, 7) == [0, 3, 4, 5, 6, 7, 8]
    assert kept(Delta(page=3, recent=1), a, 3) == [6, 7, 8]


def test_the_loudest_head_counts():
    a = torch.zeros(3, 64)
    a[:, :16] = 0.01
    a[1, 50] = 0.2
    assert kept(Delta(), a, 16) == list(range(48, 64))
    assert kept(Delta(page=64), a, 64) == list(range(64))


def test_layers():
    assert Delta().focal(28) == (2, 14, 22)
    assert Delta().dense(28) == (0, 1)
    assert Delta().focal(4) == (0, 2, 3)
    assert Delta(delta_layers="1").focal(4) == (1,)
    assert Delta(delta_layers=1) == Delta(delta_layers="1")
    with pytest.raises(SpecError, match="layers 0 to 3"):
        Delta(delta_layers="4").focal(4)
    for wrong in ({"delta_layers": "a"}, {"page": 0}, {"recent": -1}):
        with pytest.raises(SpecError, match="delta"):
            Delta(**wrong)
