from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import Golden, load, names
from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruners.sparsevlm import SparseVLM, centres, raters, split


def visual_and_text(g: Golden) -> tuple[slice, slice]:
    start, n = g.params["image_start"], g.params["image_len"]
    return slice(start, start + n), slice(start + n, start + n + g.params["text_len"])


def context(g: Golden, keep: int) -> Context:
    visual, text = visual_and_text(g)
    return Context(
        keep=keep,
        features=g.arrays.get("hidden", g["embeds"])[visual],
        embeddings=g["embeds"][visual],
        text_embeddings=g["embeds"][text],
        text_attention=g["attn_text_rows"][:, :, visual].transpose(0, 1),
    )


@pytest.mark.parametrize("name", names("base_sparsevlm"))
def test_golden_relevance(name: str):
    g = load(name)
    plain = g["keep_mask"].nonzero().squeeze(1)
    ctx, pruner = context(g, len(plain)), SparseVLM(version="v" + g.params["version"][0])
    assert raters(ctx.embeddings, ctx.text_embeddings).nonzero().squeeze(1).tolist() == g["rater_idx"].tolist()
    torch.testing.assert_close(pruner.score(ctx), g["relevance"], rtol=1e-4, atol=0)
    if pruner.version == "v2":
        selection = pruner.select(ctx).check(len(g["keep_mask"]), len(plain))
        assert selection.kept.tolist() == plain.tolist()
        assert selection.merge is None


@pytest.mark.parametrize("name", names("base_sparsevlm_v1"))
def test_golden_recycling(name: str):
    g = load(name)
    plain, recycled = g["keep_mask"].nonzero().squeeze(1), g["recycled"]
    n, keep = len(g["keep_mask"]), len(plain) + len(recycled)
    assert split(n, keep) == (len(plain), len(g["merge_stage2_idx_in_pruned"]), len(recycled))
    ctx = context(g, keep)
    hidden = g["hidden"][visual_and_text(g)[0]]
    selection = SparseVLM().select(ctx).check(n, keep)
    is_plain = torch.isin(selection.kept, plain)
    assert int(is_plain.sum()) == len(plain)
    rows = selection.apply(hidden)
    torch.testing.assert_close(rows[is_plain], hidden[plain])
    # ours lie in reading order, theirs in the order of their centres' weight
    mine = rows[~is_plain]
    nearest = torch.cdist(mine, recycled).argmin(1)
    assert sorted(nearest.tolist()) == list(range(len(recycled)))
    torch.testing.assert_close(mine, recycled[nearest], rtol=1e-4, atol=1e-5)
    assert selection.merge is not None


@pytest.mark.parametrize("n", [2, 7, 64, 400, 576])
def test_split_spends_the_whole_budget(n: int):
    for keep in range(1, n + 1):
        plain, recycled, clusters = split(n, keep)
        assert plain + clusters == keep
        assert plain >= (keep + 1) // 2
        assert clusters <= recycled <= n - plain
    assert split(n, n) == (n, 0, 0)
    assert split(n, 1)[::2] == (1, 0)


def test_split_by_hand():
    assert split(400, 77) == (66, 101, 11)
    assert split(576, 82) == (66, 154, 16)
    assert split(30, 18)[0] + split(30, 18)[2] == 18


def test_raters_stand_out():
    visual = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert raters(visual, torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.0, 1.0]])).tolist() == [True, False, False]
    assert raters(visual, torch.ones(3, 2)).all(), "none stands out"


def test_density_peaks_by_hand():
    """Three groups, the middle token of each the densest; the stray is thin, and joins the nearest group."""
    x = torch.tensor([[0.0], [0.1], [0.25], [10.0], [10.1], [10.3], [20.0], [20.1], [20.35], [17.0]])
    centre, cluster = centres(x, 3)
    assert sorted(centre.tolist()) == [1, 4, 7]
    assert centre[cluster].tolist() == [1, 1, 1, 4, 4, 4, 7, 7, 7, 7]


def hand(keep: int, n: int = 40, dtype: torch.dtype = torch.float32, equal: bool = False) -> Context:
    g = torch.Generator().manual_seed(0)
    rows = torch.ones(5, 2, n) if equal else torch.rand(5, 2, n, generator=g)
    x = torch.ones(n, 6) if equal else torch.randn(n, 6, generator=g)
    return Context(keep=keep, features=x.to(dtype), embeddings=x.to(dtype), text_embeddings=torch.randn(5, 6, generator=g).to(dtype),
                   text_attention=rows)  # fmt: skip


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_counts(version: str, equal: bool, dtype: torch.dtype):
    for keep in (1, 2, 3, 20, 39, 40):
        ctx = hand(keep, dtype=dtype, equal=equal)
        selection = SparseVLM(version=version).select(ctx).check(40, keep)
        rows = selection.apply(ctx.features)
        assert rows.shape == (keep, 6)
        assert rows.dtype == dtype
        if keep == 40:
            assert torch.equal(rows, ctx.features)


def test_merged_rows_are_means():
    selection = SparseVLM().select(hand(20))
    total = torch.zeros(20).index_add(0, selection.merge.slot, selection.merge.weight)
    torch.testing.assert_close(total, torch.ones(20))
    assert torch.isin(selection.kept, selection.merge.source).all()


def test_v2_takes_the_loudest_heads():
    ctx = hand(5)
    ctx.text_attention[:, 1] *= 10
    one = SparseVLM(version="v2", heads=1).score(ctx)
    chosen = raters(ctx.embeddings, ctx.text_embeddings)
    torch.testing.assert_close(one, ctx.text_attention[chosen, 1].mean(0))
    with pytest.raises(SpecError, match="heads"):
        SparseVLM(heads=0)
