from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load
from vlprune.errors import BudgetError
from vlprune.kernels.dispatch import KernelError
from vlprune.ops import max_min


def oracle(features, keep, weights=None, first="official"):
    """The definition with the whole matrix, in float64."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    distance = 1 - unit @ unit.T
    n = len(features)
    weight = torch.ones(n, dtype=torch.float64) if weights is None else weights.double().cpu()
    distance = distance.cpu()
    alone = distance.clone().fill_diagonal_(torch.inf).amin(1)
    picks = [int((weight * alone).argmax() if first == "official" else weight.argmax())]
    while len(picks) < keep:
        score = weight * distance[:, picks].amin(1)
        score[picks] = -torch.inf
        picks.append(int(score.argmax()))
    return picks


def judge(picks, features, weights=None, first="official"):
    """Every pick is new and, in float64, within float32 rounding of the best: closer candidates may go either way."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    cosine = unit @ unit.T
    weight = torch.ones_like(cosine[0]) if weights is None else weights.double()
    nearest = 1 - (cosine - 3 * torch.eye(len(unit), dtype=unit.dtype, device=unit.device)).amax(1)
    score = weight * nearest if first == "official" else weight
    distance = torch.full_like(score, torch.inf)
    for pick in picks.tolist():
        assert score[pick] >= score.amax() - 2e-6
        distance = torch.minimum(distance, 1 - cosine[pick])
        distance[pick] = -torch.inf
        score = torch.where(distance == -torch.inf, distance, weight * distance)
    assert len(set(picks.tolist())) == len(picks)


@pytest.mark.parametrize("name", ["base_divprune_s701", "base_divprune_s702"])
def test_reference_picks_like_divprune(name):
    g = load(name)
    order = g["selected_in_pick_order"]
    assert max_min(g["features"], len(order), order=True).tolist() == order.tolist()
    assert max_min(g["features"], len(order)).tolist() == order.sort().values.tolist()


@pytest.mark.parametrize("name", ["zoo_prune_sads_a", "zoo_prune_sads_const"])
def test_reference_picks_like_zoo_prune(name):
    g = load(name)
    order = g["selected_order"]
    picks = max_min(g["features"], len(order), weights=g["sens_weight"], first="weight", order=True)
    assert picks.tolist() == order.tolist()


def test_reference_is_the_definition():
    features, weights = torch.randn(40, 6), torch.rand(40)
    for kw in ({}, {"weights": weights}, {"weights": weights, "first": "weight"}):
        assert max_min(features, 15, order=True, **kw).tolist() == oracle(features, 15, **kw)


def test_hand_made_cases():
    corners = torch.eye(3).repeat_interleave(torch.tensor([2, 1, 1]), dim=0)  # e0 e0 e1 e2
    weights = torch.tensor([1.0, 0.5, 0.5, 0.0])
    assert max_min(corners, 2, weights=weights, first="weight").tolist() == [0, 2]
    assert max_min(torch.ones(5, 3), 3).tolist() == [0, 1, 2]  # all equal: ties to the earlier token, none twice
    assert max_min(torch.randn(1, 3), 1).tolist() == [0]
    assert max_min(torch.randn(6, 3), 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_errors():
    x = torch.randn(4, 3)
    for keep in (0, 5):
        with pytest.raises(BudgetError, match=f"keep {keep} of 4"):
            max_min(x, keep)
    with pytest.raises(KernelError, match="'weight' together with weights"):
        max_min(x, 2, first="weight")
    with pytest.raises(KernelError, match="like features"):
        max_min(x, 2, weights=torch.ones(3))


@pytest.mark.triton
@pytest.mark.parametrize("kind", ["official", "weighted", "weight first"])
@pytest.mark.parametrize(("n", "d", "keep"), [(77, 24, 9), (9, 100, 9), (1, 3, 1)])
def test_kernel(kind, n, d, keep, randn, guarded, device):
    features = randn(2, n, d)
    weights = torch.rand(2, n, device=device)
    kw = {} if kind == "official" else {"weights": weights, "first": "weight" if kind == "weight first" else "official"}
    picks = max_min(features, keep, order=True, backend="triton", **kw)
    for b in range(2):
        judge(picks[b], features[b], **{**kw, **({"weights": weights[b]} if kw else {})})
    assert torch.equal(max_min(features, keep, backend="triton", **kw), picks.sort(dim=1).values)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernel_with_half_precision_strides_ties_and_zeros(dtype, device, guarded):
    """Axis vectors have exact cosines in any precision, so the order of equal distances is checked too."""
    axes = torch.eye(12, device=device)[torch.tensor([4, 4, 0, 7, 7, 1, 9, 2, 2, 11, 0])].to(dtype)
    axes[6] = 0
    wide = torch.zeros(12, 22, device=device, dtype=dtype)
    wide[:, ::2] = axes.T
    features = wide.T[::2]
    kw = {"weights": torch.ones(11, device=device), "first": "weight"}
    expected = max_min(axes.cpu(), 9, order=True, weights=torch.ones(11), first="weight")
    assert max_min(features, 9, order=True, backend="triton", **kw).tolist() == expected.tolist()
    assert max_min(torch.ones(40, 16, device=device, dtype=dtype), 5, backend="triton").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.triton
def test_kernel_with_an_empty_batch(device):
    assert max_min(torch.zeros(0, 5, 4, device=device), 2, backend="triton").shape == (0, 2)


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "d", "keep"), [(576, 4096, 64), (2880, 4096, 160), (729, 1152, 200), (5000, 64, 50)])
def test_real_sizes(dtype, n, d, keep, device):
    features = torch.randn(2, n, d, device=device).to(dtype)
    picks = max_min(features, keep, order=True)
    for b in range(2):
        judge(picks[b], features[b])
