from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from tests.pruners.golden import load, names
from vlprune.errors import BudgetError
from vlprune.kernels.dispatch import KernelError
from vlprune.ops import greedy_dpp


def kernel_of(features, relevance):
    unit = normalize(features.double(), dim=-1) * relevance.double()[..., None]
    return unit @ unit.transpose(-1, -2)


def oracle(kernel, keep):
    """Greedy by determinants, straight from the definition; float64."""
    picks: list[int] = []
    for _ in range(keep):
        gains = []
        for i in range(len(kernel)):
            chosen = [*picks, i]
            gains.append(-torch.inf if i in picks else float(torch.linalg.det(kernel[chosen][:, chosen])))
        picks.append(int(torch.tensor(gains).argmax()))
    return picks


def judge(picks, features, relevance):
    """Every pick's gain, recomputed in float64, is within float32 rounding of the best."""
    kernel = kernel_of(features, relevance)
    left, factors = kernel.diagonal().clone(), kernel.new_zeros(0, len(kernel))
    for pick in picks.tolist():
        assert left[pick] >= left.amax() - 1e-5
        row = (kernel[pick] - factors[:, pick] @ factors) / left[pick].sqrt()
        factors = torch.cat([factors, row[None]])
        left = left - row.square()
        left[pick] = -torch.inf


@pytest.mark.parametrize("name", names("base_cdpruner"))
def test_reference_keeps_what_cdpruner_keeps(name):
    g = load(name)
    image, text = normalize(g["image_embeds"], dim=-1), normalize(g["text_embeds"], dim=-1)
    cosine = -(image @ text.T).mean(-1)
    relevance = (cosine - cosine.min() + 1e-6) / (cosine.max() - cosine.min())
    kept = greedy_dpp((g["features_projected"], relevance), g.params["keep"])
    for mask, row in zip(g["keep_mask"], kept, strict=True):
        assert mask.nonzero().squeeze(1).tolist() == row.tolist()


def test_reference_maximises_the_determinant():
    features, relevance = torch.randn(14, 9), torch.rand(14) + 0.5
    expected = oracle(kernel_of(features, relevance), 6)
    assert greedy_dpp((features, relevance), 6, order=True).tolist() == expected
    assert greedy_dpp(kernel_of(features, relevance).float(), 6, order=True).tolist() == expected


def test_beyond_the_rank_relevance_decides():
    features, relevance = torch.randn(30, 4), torch.rand(30) + 0.1
    picks = greedy_dpp((features, relevance), 12, order=True).tolist()
    assert sorted(picks) == sorted(set(picks))
    left = [i for i in relevance.argsort(descending=True).tolist() if i not in picks[:4]]
    assert picks[4:] == left[:8]


def test_errors():
    with pytest.raises(BudgetError, match="keep 5 of 4"):
        greedy_dpp(torch.eye(4), 5)
    with pytest.raises(KernelError, match="must be square"):
        greedy_dpp(torch.zeros(4, 3), 2)
    with pytest.raises(KernelError, match="relevance must be"):
        greedy_dpp((torch.zeros(4, 3), torch.zeros(3)), 2)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("dtype", "n", "d", "keep"),
    [(torch.float32, 60, 40, 11), (torch.float16, 30, 20, 7), (torch.bfloat16, 30, 20, 7), (torch.float32, 1, 3, 1)],
)
def test_kernel(dtype, n, d, keep, randn, guarded, device):
    features = randn(2, n, d, dtype=dtype)
    relevance = torch.rand(2, n, device=device) + 0.1
    picks = greedy_dpp((features, relevance), keep, order=True, backend="triton")
    for b in range(2):
        judge(picks[b], features[b], relevance[b])
    assert torch.equal(greedy_dpp((features, relevance), keep, backend="triton"), picks.sort(dim=1).values)


@pytest.mark.triton
def test_kernel_beyond_the_rank(randn, guarded, device):
    features, relevance = randn(19, 5), torch.rand(19, device=device) + 0.1
    picks = greedy_dpp((features, relevance), 12, order=True, backend="triton")
    judge(picks[:5], features, relevance)
    left = [i for i in relevance.argsort(descending=True).tolist() if i not in picks[:5].tolist()]
    assert picks[5:].tolist() == left[:7]


@pytest.mark.triton
def test_kernel_with_a_given_matrix(randn, guarded, device):
    """A strided [N, N] kernel, and one of equal rows: one pick by gain, the rest by index."""
    matrix = kernel_of(randn(30, 12), torch.rand(30, device=device) + 0.1).float()
    wide = torch.zeros(60, 60, device=device)
    wide[::2, ::2] = matrix
    expected = greedy_dpp(matrix.double(), 9, order=True, backend="reference")
    assert greedy_dpp(wide[::2, ::2], 9, order=True, backend="triton").tolist() == expected.tolist()
    assert greedy_dpp(torch.ones(2, 7, 7, device=device), 3, backend="triton").tolist() == [[0, 1, 2]] * 2
    assert greedy_dpp(torch.zeros(0, 7, 7, device=device), 3, backend="triton").shape == (0, 3)


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d", "keep"), [(576, 4096, 64), (2880, 1024, 160), (4096, 256, 40)])
def test_real_sizes(dtype, n, d, keep, device):
    features = torch.randn(n, d, device=device).to(dtype)
    relevance = torch.rand(n, device=device) + 0.1
    judge(greedy_dpp((features, relevance), keep, order=True), features, relevance)
