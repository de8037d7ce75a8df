from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruners.holov import SCALE, HoloV, _blocks, allocate, crop_scores
from vlprune.selection import Selection


def filled(selection: Selection) -> list[int]:
    """Kept tokens that are not zero embeddings."""
    assert selection.merge is not None
    return selection.kept[selection.merge.weight > 0].tolist()


@pytest.mark.parametrize("name", names("holov"))
def test_golden(name: str):
    g = load(name)
    keep, crops, n = g.params["keep"], g.params["num_crops"], len(g["attention"])
    ctx = Context(keep=keep, features=g["features"], cls_attention=g["attention"][None])
    selection = HoloV(crops=crops, compat="official").select(ctx).check(n, keep)
    assert filled(selection) == g["kept_valid_sorted"].tolist()
    rows = selection.apply(ctx.features)
    assert int((rows == 0).all(dim=1).sum()) == int((g["kept_order"] < 0).sum())

    corrected = HoloV(crops=crops).select(ctx).check(n, keep)
    if (g["allocated"] <= g["crop_sizes"]).all():
        assert corrected.kept.tolist() == g["kept_valid_sorted"].tolist()
    else:
        assert set(g["kept_valid_sorted"].tolist()) < set(corrected.kept.tolist())


@pytest.mark.parametrize("name", names("holov"))
def test_golden_shares(name: str):
    g = load(name)
    blocks = _blocks(len(g["attention"]), min(g.params["num_crops"], len(g["attention"])))
    assert [m for c, m in blocks for _ in range(c)] == g["crop_sizes"].tolist()
    h = crop_scores(g["features"], g["attention"], blocks, g.params["coef_var"], single=1)
    weights, quota = allocate(h, g.params["keep"])
    torch.testing.assert_close(h, g["crop_scores"], rtol=1e-4, atol=0)
    torch.testing.assert_close(weights, g["crop_weights"], rtol=1e-4, atol=0)
    assert quota.tolist() == g["allocated"].tolist()


ATTENTION = torch.tensor([0.13, 0.11, 0.09, 0.07, 0.30, 0.14, 0.10, 0.06])


def test_by_hand():
    """Means .10 and .15 give shares 1.6 and 2.4 of 4; the one left over goes to the second crop."""
    ctx = Context(keep=4, features=torch.ones(8, 3), cls_attention=ATTENTION[None])
    assert HoloV(crops=2).select(ctx).kept.tolist() == [0, 4, 5, 6]
    assert filled(HoloV(crops=2, compat="official").select(ctx)) == [0, 4, 5, 6]


def test_overflow():
    """Shares .55 and 7.45 of 8: the second crop has room for 4, and the official code fills up with zeros."""
    a = ATTENTION.clone()
    a[4:] *= 9
    ctx = Context(keep=8, features=torch.ones(8, 3), cls_attention=a[None])
    official = HoloV(crops=2, compat="official").select(ctx).check(8, 8)
    assert filled(official) == [4, 5, 6, 7]
    assert official.apply(ctx.features)[:4].eq(0).all()
    assert HoloV(crops=2).select(ctx).kept.tolist() == list(range(8))


def test_overflow_goes_where_the_claim_is():
    """A crop of 12 draws 15 of 16 seats; the 3 it cannot fill go 2 : 1, as claims of 3 w and w have it."""
    a = torch.cat([torch.full((12,), 100.0), torch.full((12,), 3.0), torch.full((12,), 1.0)])
    z = torch.randn(36, 3, generator=torch.Generator().manual_seed(0))
    blocks = _blocks(36, 3)
    assert allocate(crop_scores(z, a, blocks, 0.0, SCALE), 16)[1].tolist() == [16, 0, 0]
    ctx = Context(keep=16, features=z, cls_attention=a[None])
    kept = HoloV(crops=3).select(ctx).check(36, 16).kept
    assert (kept // 12).bincount().tolist() == [12, 3, 1]


def test_rule_for_the_number_of_crops():
    g = torch.Generator().manual_seed(1)
    a, z = torch.rand(1, 576, generator=g), torch.randn(576, 4, generator=g)
    for keep, crops in ((64, 16), (128, 8), (192, 5)):
        ctx = Context(keep=keep, features=z, cls_attention=a)
        assert torch.equal(HoloV().select(ctx).kept, HoloV(crops=crops).select(ctx).kept)


def test_invariances():
    g = torch.Generator().manual_seed(2)
    a, z = torch.rand(2, 60, generator=g), torch.randn(60, 5, generator=g)
    kept = HoloV(crops=7).select(Context(keep=20, features=z, cls_attention=a)).kept
    for scaled in (
        Context(keep=20, features=z * 8, cls_attention=a),
        Context(keep=20, features=z, cls_attention=a * 4),
    ):
        assert torch.equal(HoloV(crops=7).select(scaled).kept, kept)
    same = Context(keep=20, features=z, cls_attention=a)
    assert torch.equal(HoloV(crops=7, beta=0.0).select(same).kept, kept)
    one = HoloV(crops=1).select(same).kept
    assert torch.equal(one, a.mean(0).topk(20).indices.sort().values)


@pytest.mark.parametrize("compat", ["corrected", "official"])
@pytest.mark.parametrize("attention", [torch.zeros(1, 30), torch.full((1, 30), 1 / 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_edges(compat: str, attention: torch.Tensor, dtype: torch.dtype):
    for keep in (1, 7, 30):
        for crops in (None, 1, 4, 30, 99):
            ctx = Context(keep=keep, features=torch.ones(30, 4, dtype=dtype), cls_attention=attention)
            HoloV(crops=crops, compat=compat).select(ctx).check(30, keep)  # type: ignore[arg-type]


def test_received_attention():
    assert HoloV(attention="received").needs == {"features", "received_attention"}
    ctx = Context(keep=4, features=torch.ones(8, 3), received_attention=ATTENTION[None])
    assert HoloV(crops=2, attention="received").select(ctx).kept.tolist() == [0, 4, 5, 6]


def test_no_crops():
    with pytest.raises(SpecError, match="crops"):
        HoloV(crops=0)
