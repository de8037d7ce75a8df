from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruners.visionzip import VisionZip


def context(keep: int, n: int = 20, seed: int = 0, dtype: torch.dtype = torch.float32) -> Context:
    g = torch.Generator().manual_seed(seed)
    attention = torch.rand(2, n, generator=g)
    return Context(
        keep=keep,
        features=torch.randn(n, 6, generator=g).to(dtype),
        cls_attention=attention / attention.sum(1, keepdim=True),
        received_attention=attention.flip(1),
        keys=torch.randn(2, n, 4, generator=g).to(dtype),
    )


@pytest.mark.parametrize("name", names("base_visionzip"))
def test_golden(name: str):
    g = load(name)
    dominant, contextual = g.params["dominant_patches"], g.params["contextual"]
    keep, n = dominant + contextual, g.params["patches"]
    for b in range(g.params["batch"]):
        ctx = Context(  # the authors' tokens without CLS, which stands at 0
            keep=keep,
            features=g["hidden"][b, 1:],
            cls_attention=g["cls_attn"][b, :, 1:],
            keys=g["metric"][b, None, 1:],  # already the mean over heads
        )
        selection = VisionZip(contextual=contextual / keep).select(ctx).check(n, keep)
        top = g["dominant_idx_topk_order"][b]
        is_dominant = torch.isin(selection.kept, top[top > 0] - 1)
        assert int(is_dominant.sum()) == dominant
        rows, expected = selection.apply(ctx.features), g["output"][b, 1:]
        torch.testing.assert_close(rows[is_dominant], expected[:dominant], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rows[~is_dominant], expected[dominant:], rtol=1e-4, atol=1e-5)


def test_by_hand():
    """Dominant 1; others 0 2 3 4, targets 0 and 3; 2 joins 3 and 4 joins 0 by their keys."""
    ctx = Context(
        keep=3,
        features=torch.tensor([[1.0], [10.0], [100.0], [1000.0], [10000.0]]),
        cls_attention=torch.tensor([[0.1, 0.5, 0.2, 0.1, 0.1]]),
        keys=torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 3.0], [0.0, 1.0], [9.0, 1.0]]]),
    )
    selection = VisionZip(contextual=2 / 3).select(ctx)
    assert selection.kept.tolist() == [0, 1, 3]
    assert selection.apply(ctx.features).flatten().tolist() == [10001.0, 10.0, 1100.0]


def test_default_share_is_the_papers():
    for keep, contextual in ((64, 10), (128, 20), (192, 30)):
        merge = VisionZip().select(context(keep, n=576)).merge
        assert merge is not None
        joined = merge.slot[keep:]
        assert len(joined) == 576 - keep
        assert joined.unique().numel() <= contextual
        total = torch.zeros(keep).index_add(0, merge.slot, merge.weight)
        assert int((total - 2).abs().lt(1e-4).sum()) == joined.unique().numel()  # own token plus a mean


def test_nothing_to_merge():
    assert VisionZip().select(context(keep=1)).merge is None
    whole = context(keep=20)
    selection = VisionZip().select(whole).check(20, 20)
    assert torch.equal(selection.apply(whole.features), whole.features)


def test_received_attention_stands_in_for_cls():
    ctx = context(keep=4)
    kept = VisionZip(contextual=0.0, attention="received").select(ctx).kept
    assert torch.equal(kept, ctx.received_attention.mean(0).topk(4).indices.sort().values)
    assert VisionZip(attention="received").needs == {"received_attention", "keys"}
    assert VisionZip().needs == {"cls_attention", "keys"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_ties(dtype: torch.dtype):
    ctx = context(keep=10, dtype=dtype)
    assert VisionZip().select(ctx).check(20, 10).apply(ctx.features).dtype == dtype
    same = Context(keep=10, cls_attention=torch.ones(2, 20), keys=torch.ones(2, 20, 4), features=torch.ones(20, 3))
    rows = VisionZip().select(same).check(20, 10).apply(same.features)
    assert rows.round().unique().tolist() == [1.0, 2.0]
    torch.testing.assert_close(rows, rows.round())


def test_share_outside_range():
    with pytest.raises(SpecError, match="contextual"):
        VisionZip(contextual=1.0)
