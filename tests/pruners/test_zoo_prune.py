from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from tests.pruners.golden import Golden, load, names
from vlprune.context import Context, Grid
from vlprune.errors import PruningError, SpecError
from vlprune.pruners.zoo_prune import ZooPrune, sensitivity


@dataclass(frozen=True)
class Given(ZooPrune):
    """ZOO-Prune with the sensitivities, or the directions, of a golden file instead of its own draw."""

    scores: Tensor | None = None
    drawn: Tensor | None = None

    def sensitivity(self, ctx: Context) -> Tensor:
        return super().sensitivity(ctx) if self.scores is None else self.scores

    def draw(self, ctx: Context, width: int) -> Tensor:
        return super().draw(ctx, width) if self.drawn is None else self.drawn


class Projector(nn.Module):
    """The layout of the LLaVA projectors."""

    def __init__(self, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
        super().__init__()
        self.linear_1, self.act, self.linear_2 = linear(w1, b1), nn.GELU(), linear(w2, b2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def projector(g: Golden) -> Projector:
    return Projector(g["w1"], g["b1"], g["w2"], g["b2"])


def random_projector(dv: int = 12, d: int = 20, seed: int = 0) -> Projector:
    g = torch.Generator().manual_seed(seed)
    shapes = ((d, dv), (d,), (d, d), (d,))
    return Projector(*(torch.randn(s, generator=g) / s[-1] ** 0.5 for s in shapes))


def context(keep: int, n: int = 30, dtype: torch.dtype = torch.float32, **fields: object) -> Context:
    g = torch.Generator().manual_seed(3)
    x, module = torch.randn(n, 12, generator=g), random_projector()
    with torch.no_grad():
        features = module(x)
    fields = {"features": features.to(dtype), "encoder_features": x.to(dtype), "project": module.to(dtype), **fields}
    return Context(keep=keep, generator=torch.Generator(), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [n for n in names("zoo_prune_sads") if "frames" not in n])
def test_golden_selection(name: str):
    g = load(name)
    n, keep = len(g["sensitivity"]), g.params["keep"]
    kept = Given(scores=g["sensitivity"]).select(Context(keep=keep, features=g["features"])).check(n, keep).kept
    assert kept.tolist() == g["keep_sorted"].tolist()
    for fewer in (1, keep // 2):  # the picks for fewer are the first of the picks for more
        kept = Given(scores=g["sensitivity"]).select(Context(keep=fewer, features=g["features"])).kept
        assert kept.tolist() == g["selected_order"][:fewer].sort().values.tolist()


@pytest.mark.parametrize("name", names("zoo_prune_sads_frames"))
def test_golden_crops(name: str):
    """Crops as grids of one row each, and every token's cell among them: the picks of each crop, and the separators."""
    g = load(name)
    label, per_crop = g["frame_label"], g.params["keep_per_frame"]
    newline = label < 0
    labels = label[~newline].unique().tolist()
    sizes = [int((label == c).sum()) for c in labels]
    cell = torch.zeros_like(label)
    for i, c in enumerate(labels):
        cell[label == c] = sum(sizes[:i]) + torch.arange(sizes[i])
    ctx = Context(
        keep=per_crop * len(labels) + int(newline.sum()),
        grids=tuple(Grid(1, 1, size) for size in sizes),
        features=g["features"],
        newline=newline,
        index=cell,
    )
    kept = Given(scores=g["sensitivity"], crops="each").select(ctx).check(len(label), ctx.keep).kept
    assert kept[~newline[kept]].tolist() == g["keep_sorted"].tolist()
    assert int(newline[kept].sum()) == int(newline.sum())


@pytest.mark.parametrize("name", [n for n in names("zoo_prune_rge") if "lowrank" not in n])
def test_golden_sensitivity_and_selection(name: str):
    g = load(name)
    x, keep = g["features_in"][0], g.params["keep"]
    for project in (projector(g), nn.Sequential(*projector(g).children()), projector(g).forward):
        ctx = Context(keep=keep, features=g["projected"], encoder_features=x, project=project)
        rule = Given(drawn=g["directions"], h=g.params["h"])
        selection = rule.select(ctx).check(len(x), keep)
        assert selection.kept.tolist() == g["keep_sorted"].tolist()
        # 2e-3 is what float32 leaves of the difference of two projections (golden README)
        torch.testing.assert_close(selection.scores, g["sensitivity"][0], rtol=2e-3, atol=0)
        if isinstance(project, nn.Module):  # taken apart, most of that error is gone
            torch.testing.assert_close(selection.scores.double(), g["sensitivity_f64"][0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", names("zoo_prune_rge_lowrank"))
def test_golden_low_rank(name: str):
    g = load(name)
    for x, score, exact in zip(g["features_in"], g["sensitivity"], g["sensitivity_f64"], strict=True):
        found = sensitivity(projector(g), x, g["directions"], g.params["h"], g.params["rank"])
        torch.testing.assert_close(found, score, rtol=2e-3, atol=0)
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)


def test_low_rank_follows_the_weights():
    module, x = random_projector(), torch.randn(9, 12, generator=torch.Generator().manual_seed(1))
    u = torch.randn(8, 12, generator=torch.Generator().manual_seed(2))
    before = sensitivity(module, x, u, 0.01, 3)
    assert torch.equal(sensitivity(module, x, u, 0.01, 3), before)
    with torch.no_grad():
        module.linear_2.weight.mul_(2)
    torch.testing.assert_close(sensitivity(module, x, u, 0.01, 3), 2 * before)
    torch.testing.assert_close(sensitivity(module, x, u, 0.01, 999), sensitivity(module, x, u, 0.01))


def test_relu_by_hand():
    x = torch.tensor([[5.0, 5.0], [5.0, -5.0], [-5.0, -5.0]])
    for project in (nn.ReLU(), torch.relu, nn.Sequential(nn.ReLU())):
        score = sensitivity(project, x, torch.eye(2), 0.01)
        torch.testing.assert_close(score, torch.tensor([1.0, 0.5, 0.0]), rtol=1e-4, atol=0)


def test_linear_projector_reacts_alike_everywhere():
    torch.manual_seed(0)
    module = nn.Linear(6, 4)
    x, u = torch.randn(10, 6), torch.randn(5, 6)
    expected = (u / u.norm(dim=1, keepdim=True) @ module.weight.T).norm(dim=1).mean().detach()
    found = sensitivity(nn.Sequential(module), x, u, 0.01)
    torch.testing.assert_close(found, expected.expand(10), rtol=1e-5, atol=0)
    for project in (module, nn.Sequential(module), module.forward):  # the last is constant up to rounding only
        ctx = Context(
            keep=1, features=torch.randn(10, 4), encoder_features=x, project=project, generator=torch.Generator()
        )
        assert ZooPrune().select(ctx).kept.tolist() == [0]


def test_deeper_sequences():
    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 5))
    x, u = torch.randn(7, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    plain = sensitivity(module.double().forward, x, u, 0.01)
    torch.testing.assert_close(sensitivity(module, x, u, 0.01), plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(sensitivity(module[1:], x, u, 0.01), sensitivity(module[1:].forward, x, u, 0.01))


def test_greedy_by_hand():
    """w = 1 .5 .5 0; after token 0 its twin is at distance 0 and token 3 weighs nothing, so 2 comes next."""
    e = torch.eye(3)
    features = torch.stack([e[0], e[0], e[1], e[2]])
    rule = Given(scores=torch.tensor([3.0, 2.0, 2.0, 1.0]))
    for keep, expected in ((1, [0]), (2, [0, 2]), (4, [0, 1, 2, 3])):
        assert rule.select(Context(keep=keep, features=features)).kept.tolist() == expected


def test_symmetries():
    ctx, rule = context(keep=8), ZooPrune(directions=16)
    kept = rule.select(ctx).kept
    u = rule.draw(ctx, 12)
    for other in (-u, u.flip(0), 7 * u):
        assert torch.equal(Given(drawn=other).select(ctx).kept, kept)
    assert torch.equal(rule.select(replace(ctx, features=3 * ctx.features)).kept, kept)
    assert torch.equal(rule.select(ctx).kept, kept)
    assert torch.equal(rule.select(ctx).scores, rule.sensitivity(ctx))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_scored_in_float32(dtype: torch.dtype):
    ctx = context(keep=8, dtype=dtype)
    exact = ZooPrune().sensitivity(
        replace(ctx, encoder_features=ctx.encoder_features.double(), project=ctx.project.double())
    )
    torch.testing.assert_close(ZooPrune().sensitivity(context(keep=8, dtype=dtype)).double(), exact, rtol=1e-4, atol=0)
    ZooPrune().select(context(keep=8, dtype=dtype)).check(30, 8)


def test_gradients_are_not_recorded():
    assert not ZooPrune().sensitivity(context(keep=3)).requires_grad


def test_separators_stay_within_the_budget():
    newline = torch.zeros(30, dtype=torch.bool)
    newline[[14, 19, 24, 29]] = True
    plain = ZooPrune().select(context(keep=8)).kept
    unseen = context(keep=1).encoder_features.masked_fill(newline[:, None], torch.nan)
    kept = ZooPrune().select(context(keep=12, newline=newline, encoder_features=unseen)).check(30, 12).kept
    assert newline[kept].sum() == 4
    kept = ZooPrune().select(context(keep=4, newline=newline)).check(30, 4).kept
    assert kept[newline[kept]].tolist() == [19, 29]  # more would leave too little of the picture
    ZooPrune().select(context(keep=30, newline=newline)).check(30, 30)
    ZooPrune().select(context(keep=1, newline=newline)).check(30, 1)
    none = torch.zeros(30, dtype=torch.bool)
    assert torch.equal(ZooPrune().select(context(keep=8, newline=none)).kept, plain)


def test_official_separators_are_one_base_crop_too_early():
    newline = torch.zeros(30, dtype=torch.bool)
    newline[[14, 19, 24, 29]] = True
    ctx = context(keep=12, newline=newline, grids=(Grid(1, 2, 5), Grid(1, 4, 5)))
    kept = ZooPrune(newline="official").select(ctx).check(30, 12).kept.tolist()
    assert {4, 9, 19} <= set(kept)  # 14, 19, 24, 29 less 10; 14 is itself a separator
    assert 14 in kept
    assert not {24, 29} & set(kept)


def test_crops_share_the_budget():
    ctx = context(keep=11, grids=(Grid(2, 1, 10), Grid(1, 1, 10)))
    kept = ZooPrune(crops="each").select(ctx).check(30, 11).kept
    assert (kept // 10).bincount().tolist() == [4, 4, 3]
    ctx = context(keep=20, grids=(Grid(1, 1, 2), Grid(1, 4, 7)))  # the first crop has only two
    kept = ZooPrune(crops="each").select(ctx).check(30, 20).kept
    assert kept[:2].tolist() == [0, 1]
    for keep in (1, 2, 3, 30):
        ctx = context(keep=keep, grids=(Grid(2, 1, 10), Grid(1, 1, 10)))
        ZooPrune(crops="each").select(ctx).check(30, keep)


def test_needs():
    assert ZooPrune().needs == {"encoder_features", "features", "project", "generator", "newline"}
    assert ZooPrune(crops="each").needs == ZooPrune().needs | {"grids", "index"}


def test_errors():
    for wrong in ({"directions": 0}, {"h": 0.0}, {"rank": -1}):
        with pytest.raises(SpecError, match="zoo_prune"):
            ZooPrune(**wrong)  # type: ignore[arg-type]
    with pytest.raises(PruningError, match="rank"):
        sensitivity(nn.ReLU(), torch.zeros(2, 2), torch.eye(2), 0.01, rank=1)
    with pytest.raises(PruningError, match="projector"):
        ZooPrune().select(Context(keep=1, features=torch.zeros(2, 2)))
