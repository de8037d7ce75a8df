from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.pruners.golden import Golden, load, names
from vlprune.context import Context, Grid
from vlprune.errors import PruningError, SpecError
from vlprune.plan import Plan
from vlprune.pruner import Pruner, Scorer
from vlprune.pruners.debias import Debias, inside, inside_bilinear, inside_rows, places
from vlprune.pruners.divprune import DivPrune
from vlprune.pruners.fastervlm import FasterVLM
from vlprune.pruners.fastv import FastV
from vlprune.pruners.himap import HiMAP
from vlprune.pruners.pyramiddrop import PyramidDrop
from vlprune.pruners.sparsevlm import SparseVLM

GRID = Grid(1, 24, 24)


def kappa_of(weight: Tensor) -> float:
    return -float(weight[-1].log())


def visual(g: Golden, rows: Tensor) -> Tensor:
    return rows[..., g.params["sys_len"] : g.params["sys_len"] + g.params["n_visual"]]


def check(g: Golden, pruner: Debias, ctx: Context, rtol: float = 1e-4) -> None:
    selection = pruner.select(ctx).check(g.params["n_visual"], ctx.keep)
    torch.testing.assert_close(selection.scores, g["score"], rtol=rtol, atol=0)
    assert selection.kept.tolist() == g["keep_sorted"].tolist()


def context(g: Golden, **fields: Tensor) -> Context:
    size = g.params.get("image_size_wh")
    return Context(keep=len(g["keep_sorted"]), grids=(GRID,), image_size=tuple(size) if size else None, **fields)


# ---- the authors' code


@pytest.mark.parametrize("name", ["attention_debias_padmask"])
def test_golden_masks(name: str):
    g = load(name)
    p = g.params
    grid, second = (Grid(1, p[k], p[k]) for k in ("grid", "grid2"))
    for i, size in enumerate(g["image_sizes"].tolist()):
        for j, theta in enumerate(p["thresholds"]):
            assert torch.equal(inside(size, grid, theta), g["pad_mask"][i, j].bool()), (size, theta)
        assert torch.equal(inside_rows(size, grid), g["unpad_mask"][i].bool()), size
        assert torch.equal(inside(size, second, 0.5), g["pad_mask_g16_t05"][i].bool()), size


def test_golden_bilinear_mask():
    g = load("attention_debias_padmask_sparsevlm")
    for size, mask in zip(g["image_sizes"].tolist(), g["pad_mask"], strict=True):
        assert torch.equal(inside_bilinear(size, GRID), mask.bool()), size


def test_bilinear_mask_is_what_pillow_resizes():
    draw = random.Random(0)
    for _ in range(40):
        width, height, cells = draw.randint(4, 900), draw.randint(4, 900), draw.choice((7, 16, 24))
        side = max(width, height)
        mask = np.zeros((side, side), np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        mask[top : top + height, left : left + width] = 1
        resized = np.array(Image.fromarray(mask).resize((cells, cells), Image.Resampling.BILINEAR)) >= 0.5
        ours = inside_bilinear((width, height), Grid(1, cells, cells))
        assert torch.equal(ours, torch.from_numpy(resized)), (width, height, cells)


def test_golden_trends():
    g = load("attention_debias_trend")
    x = places(Context(keep=1, grids=(GRID,)), 576)
    weights = Debias(FastV(), trend="cubic").weights(x)
    # the constants are stated to nine digits, the file holds sixteen
    torch.testing.assert_close(weights, g["fastv_weight_f64"], rtol=1e-7, atol=0)
    c1, c2, c3 = g["fastv_cubic_c123_f64"].tolist()
    exact = Debias(FastV(), trend="cubic", c1=c1, c2=c2, c3=c3).weights(x)
    torch.testing.assert_close(exact, g["fastv_weight_f64"], rtol=1e-13, atol=0)
    for host in ("himap", "pyramiddrop", "sparsevlm", "tokencarve"):
        for b in g[f"{host}_b_f64"].tolist():
            released = torch.exp(-b * torch.arange(576, dtype=torch.float64))
            torch.testing.assert_close(Debias(FastV(), kappa=575 * b).weights(x), released)


@pytest.mark.parametrize("name", names("attention_debias_fastv"))
def test_golden_fastv(name: str):
    g = load(name)
    debiased = g.params["tag"] == "after"
    theta = g.params["pad_threshold"] if debiased else 0.5
    pruner = Debias(FastV(), trend="cubic" if debiased else "off", padding="area" if debiased else "rows", theta=theta)
    check(g, pruner, context(g, last_attention=visual(g, g["attn_last_row"])))


@pytest.mark.parametrize("name", names("attention_debias_himap"))
def test_golden_himap(name: str):
    g = load(name)
    pruner = Debias(HiMAP(), kappa=kappa_of(g["weight_f64"]), theta=g.params["pad_threshold"])
    rows = visual(g, g["attn_text_rows"]).transpose(0, 1)
    check(g, pruner, context(g, text_attention=rows), rtol=5e-4)  # their weights are float16: half a unit in 2^10


@pytest.mark.parametrize("name", names("attention_debias_sparsevlm"))
def test_golden_sparsevlm(name: str):
    """The file holds the rater rows alone: embeddings of zeros make every row a rater."""
    g = load(name)
    rows = visual(g, g["attn_rater_rows"]).transpose(0, 1)  # [M, H, N]
    pruner = Debias(SparseVLM(version="v2", heads=rows.shape[1]), kappa=kappa_of(g["weight_f64"]), padding="bilinear")
    ctx = context(
        g,
        text_attention=rows,
        features=torch.zeros(576, 4),
        embeddings=torch.zeros(576, 4),
        text_embeddings=torch.zeros(len(rows), 4),
    )
    check(g, pruner, ctx)


@pytest.mark.parametrize("name", names("attention_debias_pdrop"))
def test_golden_pyramiddrop(name: str):
    g = load(name)
    logits = (g["K"] @ g["q"].transpose(1, 2)).squeeze(-1) / g["q"].shape[-1] ** 0.5  # [H, S]
    pruner = Debias(PyramidDrop(), kappa=kappa_of(g["weight_f64"]), theta=g.params["pad_threshold"])
    check(g, pruner, context(g, next_attention=visual(g, logits.softmax(-1))))


# ---- masks by hand


@pytest.mark.parametrize("theta", [0.01, 0.3, 0.5])
def test_three_rows_of_padding(theta: float):
    mask = inside((640, 480), GRID, theta)
    assert mask.all(1).nonzero().squeeze(1).tolist() == list(range(3, 21))
    assert int(mask.sum()) == 432
    assert torch.equal(inside((480, 640), GRID, theta), mask.T)
    assert inside((77, 77), GRID, theta).all()


def test_partly_covered_rows():
    assert int(inside((500, 333), GRID, 0.01).sum()) == int(inside((500, 333), GRID, 0.5).sum()) == 384
    assert int(inside((2048, 256), GRID, 0.5).sum()) == 96, "half a cell outside is still picture"
    assert int(inside_bilinear((2048, 256), GRID).sum()) == 48


# ---- what it does to its host


def rows(n: int = 576, seed: int = 0) -> Tensor:
    return torch.rand(3, n, generator=torch.Generator().manual_seed(seed)) / n


def test_takes_out_its_own_trend():
    x = torch.arange(576) / 575
    a = torch.exp(1.7 * x)
    flat = Debias(FastV(), kappa=1.7).score(Context(keep=1, grids=(GRID,), last_attention=a[None]))
    torch.testing.assert_close(flat, torch.ones(576))
    a[123] *= 1.1
    assert Debias(FastV(), kappa=1.7).select(Context(keep=1, grids=(GRID,), last_attention=a[None])).kept.tolist() == [
        123
    ]


@pytest.mark.parametrize("trend", ["off", "exponential"])
def test_no_trend_and_no_padding_is_the_host(trend: str):
    ctx = Context(keep=60, grids=(GRID,), last_attention=rows())
    assert torch.equal(Debias(FastV(), trend=trend, kappa=0.0).select(ctx).kept, FastV().select(ctx).kept)


@pytest.mark.parametrize("keep", [1, 96, 97, 300, 576])
def test_padding_goes_first(keep: int):
    ctx = Context(keep=keep, grids=(GRID,), image_size=(2048, 256), last_attention=rows())
    kept = Debias(FastV()).select(ctx).check(576, keep).kept
    picture = inside((2048, 256), GRID).flatten()
    assert int(picture[kept].sum()) == min(keep, 96)


def test_padding_that_is_known_comes_before_the_size():
    padding = torch.zeros(576, dtype=torch.bool)
    padding[5:] = True
    ctx = Context(keep=5, grids=(GRID,), image_size=(640, 480), padding=padding, last_attention=rows())
    assert Debias(FastV()).select(ctx).kept.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(Debias(FastV(), padding="off", kappa=0.0).select(ctx).kept, FastV().select(ctx).kept)


def test_a_valid_token_without_attention_still_beats_padding():
    ctx = Context(keep=4, last_attention=torch.tensor([[0.9, 0.9, 0.0, 0.0, 0.1, 0.0]]),
                  padding=torch.tensor([True, True, False, False, False, False]))  # fmt: skip
    assert Debias(FastV()).select(ctx).kept.tolist() == [2, 3, 4, 5]


def test_every_image_starts_again():
    grids = (Grid(1, 2, 3), Grid(2, 1, 2))
    x = places(Context(keep=1, grids=grids), 10)
    expected = [0, 0.2, 0.4, 0.6, 0.8, 1, 0, 1 / 3, 2 / 3, 1]
    torch.testing.assert_close(x, torch.tensor(expected, dtype=torch.float64))
    assert places(Context(keep=1, grids=(Grid(1, 1, 1),)), 1).tolist() == [0]


def test_row_separators_count_and_come_last():
    newline = torch.tensor([False, False, True] * 3)
    ctx = Context(keep=6, grids=(Grid(1, 3, 2),), newline=newline, last_attention=newline[None].float())
    assert places(ctx, 9)[-1] == 1
    assert Debias(FastV()).select(ctx).kept.tolist() == [0, 1, 3, 4, 6, 7]
    assert Debias(FastV()).select(replace(ctx, keep=7)).kept.tolist() == [0, 1, 2, 3, 4, 6, 7]


def test_after_an_earlier_stage_places_are_the_old_ones():
    whole = Context(keep=20, grids=(GRID,), image_size=(640, 480), last_attention=rows())
    index = torch.arange(0, 576, 5)
    left = replace(whole, index=index, last_attention=whole.last_attention[:, index])
    torch.testing.assert_close(Debias(FastV()).score(left), Debias(FastV()).score(whole)[index])
    with pytest.raises(PruningError, match="first stage"):
        Debias(FastV()).score(replace(left, grids=(GRID, GRID)))


def test_what_it_cannot_place():
    ctx = Context(keep=2, grids=(Grid(1, 2, 2), Grid(1, 2, 2)), last_attention=rows(11))
    with pytest.raises(PruningError, match="scope=image"):
        Debias(FastV()).score(ctx)
    for grid, n in ((GRID, 600), (Grid(1, 6, 8), 48)):
        with pytest.raises(PruningError, match="padding=off"):
            Debias(FastV()).score(Context(keep=2, grids=(grid,), image_size=(9, 8), last_attention=rows(n)))


def test_sparsevlm_recycles_what_debiasing_leaves():
    g = torch.Generator().manual_seed(0)
    features, text = torch.randn(400, 8, generator=g), torch.randn(6, 8, generator=g)
    ctx = Context(keep=77, grids=(Grid(1, 20, 20),), image_size=(20, 12), features=features, embeddings=features, text_embeddings=text,
                  text_attention=torch.rand(6, 2, 400, generator=g))  # fmt: skip
    plain, debiased = SparseVLM().select(ctx), Debias(SparseVLM()).select(ctx).check(400, 77)
    assert debiased.merge is not None
    assert not torch.equal(plain.kept, debiased.kept)
    assert inside((20, 12), Grid(1, 20, 20)).flatten()[debiased.kept].all()


# ---- the plan and its checks


def test_plan_text():
    text = "debias(pyramiddrop):keep=0.5:kappa=1.89:theta=0.01"
    step = Plan.parse(text).steps[0]
    assert step.stage.name == "8"
    assert step.pruner == Debias(PyramidDrop(), kappa=1.89, theta=0.01)
    assert str(Plan.parse(text)) == text
    cubic = "debias(fastv)@3:keep=64:trend=cubic:c2=-4.5:padding=off"
    assert str(Plan.parse(cubic)) == cubic
    assert Debias(HiMAP()).needs == {"text_attention", "grids", "index", "newline", "padding", "image_size"}


@dataclass(frozen=True)
class OwnWay(Scorer):
    """Ranks by attention, but does not say how it selects."""

    needs = frozenset({"last_attention"})

    def select(self, ctx: Context):
        raise NotImplementedError


@pytest.mark.parametrize("inner", [DivPrune(), FasterVLM(), Debias(FastV()), OwnWay()])
def test_hosts_it_refuses(inner: Pruner):
    with pytest.raises(SpecError, match="debias"):
        Debias(inner)


def test_parameters_it_refuses():
    with pytest.raises(SpecError, match="theta"):
        Debias(FastV(), theta=1.0)
    with pytest.raises(SpecError, match="positive"):
        Debias(FastV(), trend="cubic", c1=-3.0, c2=0.0, c3=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype):
    ctx = Context(keep=50, grids=(GRID,), image_size=(640, 480), last_attention=rows().to(dtype))
    assert Debias(FastV()).select(ctx).check(576, 50).scores.dtype == torch.float32
