from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from tests.pruners.vectors import BUILDERS
from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruners.mustdrop import MustDrop


@pytest.mark.parametrize("name", names("base_mustdrop"))
def test_golden(name: str):
    """The filter, by the authors' thresholds and with their count as a budget."""
    g = load(name)
    for rule, ctx in BUILDERS["base_mustdrop"](g):
        selection = rule.select(ctx).check(g.params["image_len"], ctx.keep, rule.adaptive)
        assert selection.kept.tolist() == g["kept_image_idx"].tolist()


def test_by_hand():
    """Two text rows: token 0 by the sum of both, token 2 by one of them, and 1 and 3 by neither."""
    rows = torch.tensor([[[0.30, 0.05, 0.00, 0.05]], [[0.30, 0.05, 0.20, 0.05]]])
    ctx = Context(keep=4, text_attention=rows)
    rule = MustDrop(overall=0.4, single=0.2, count="thresholds")
    torch.testing.assert_close(rule.score(ctx), torch.tensor([1.5, 0.25, 1.0, 0.25]))
    assert rule.select(ctx).kept.tolist() == [0, 2]
    assert MustDrop(overall=0.4, single=0.2).select(Context(keep=3, text_attention=rows)).kept.tolist() == [0, 1, 2]


def test_counts():
    rows = torch.rand(3, 2, 20, generator=torch.Generator().manual_seed(0))
    loose, strict = (MustDrop(overall=x, single=x * 1e3, count="thresholds") for x in (1e-6, 1e3))
    assert len(loose.select(Context(keep=7, text_attention=rows)).kept) == 7
    assert len(strict.select(Context(keep=7, text_attention=rows)).kept) == 1
    assert loose.adaptive and not MustDrop().adaptive
    with pytest.raises(SpecError, match="above 0"):
        MustDrop(single=0.0)
