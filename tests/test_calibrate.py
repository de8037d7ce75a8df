from __future__ import annotations

import math

import pytest
import torch

from tests.pruners.golden import load, names
from vlprune.calibrate import (
    Trend,
    change_point,
    entropy_collapse,
    fit_trend,
    focal_layers,
    matrix_entropy,
    shift_layers,
)
from vlprune.context import Context
from vlprune.errors import PruningError
from vlprune.plan import Plan
from vlprune.pruners.debias import Debias
from vlprune.pruners.fastv import FastV

# ---- trend


def test_finds_the_exponential_again():
    x = torch.linspace(0, 1, 200, dtype=torch.float64)
    fit = fit_trend(3e-4 * torch.exp(1.3 * x))
    assert fit.trend == "exponential"
    assert fit.kappa == pytest.approx(1.3, abs=1e-9)
    assert fit.r2 == pytest.approx(1)
    assert fit.parameters == {"trend": "exponential", "kappa": fit.kappa}


def test_noise_and_padding_do_not_move_it():
    g = torch.Generator().manual_seed(0)
    x = torch.linspace(0, 1, 576)
    a = torch.exp(0.9 * x) * (1 + 0.2 * torch.rand(576, generator=g))
    valid = (torch.arange(576) >= 72) & (torch.arange(576) < 504)
    a[~valid] *= 30  # sinks at both ends
    fit = fit_trend(a, valid)
    assert fit.kappa == pytest.approx(0.9, abs=0.05)
    assert fit.r2 > 0.9
    assert fit_trend(a).r2 < fit.r2


def test_falls_back_to_the_cubic():
    """Attention that sags in the middle is no straight line in the logarithm; the fit takes it out altogether."""
    x = torch.linspace(0, 1, 100, dtype=torch.float64)
    a = 2e-3 * (1 - 3 * x + 3.2 * x**2 + 0.1 * x**3)
    fit = fit_trend(a)
    assert fit.trend == "cubic"
    assert fit.r2 < 0.5
    assert (fit.c1, fit.c2, fit.c3) == pytest.approx((-3, 3.2, 0.1))
    flat = Debias(FastV(), **fit.parameters).score(Context(keep=1, last_attention=a[None]))
    torch.testing.assert_close(flat, torch.full((100,), 2e-3))


def test_a_cubic_that_turns_negative_is_not_taken():
    """A bank at each end drives the cubic below zero in between."""
    a = torch.full((101,), 1e-4)
    a[:15] = a[-15:] = 1
    fit = fit_trend(a)
    assert fit.r2 < 0.5
    assert fit.trend == "exponential"


def test_a_flat_curve_has_no_trend():
    fit = fit_trend(torch.full((50,), 0.01))
    assert fit.kappa == pytest.approx(0, abs=1e-9)
    assert fit.r2 == 1


def test_a_fit_goes_into_a_plan():
    fit = Trend("exponential", r2=0.9, kappa=1.25)
    plan = Plan.parse("debias(fastv)", keep=0.5, **fit.parameters)
    assert str(plan) == "debias(fastv):keep=0.5:kappa=1.25"


def test_too_few_positions():
    with pytest.raises(PruningError, match="two positions"):
        fit_trend(torch.tensor([0.0, 1.0]))


# ---- entropy


def test_matrix_entropy_of_known_spectra():
    assert float(matrix_entropy(torch.cat([torch.eye(6), -torch.eye(6)]))) == pytest.approx(1)
    line = torch.linspace(-1, 1, 10)[:, None] * torch.tensor([[1.0, 2.0, 3.0]])
    assert float(matrix_entropy(line)) == pytest.approx(0, abs=1e-9)
    two = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 5, 0], [0, -5, 0]])  # lengths are taken out
    assert float(matrix_entropy(two)) == pytest.approx(math.log(2) / math.log(3))
    assert float(matrix_entropy(torch.ones(5, 4))) == 0
    assert float(matrix_entropy(torch.ones(1, 4))) == 0


def test_matrix_entropy_does_not_see_rotation_shift_or_scale():
    g = torch.Generator().manual_seed(0)
    for shape in ((40, 12), (12, 40)):
        x = torch.randn(shape, generator=g)
        turn = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=g))[0]
        expected = matrix_entropy(x)
        torch.testing.assert_close(matrix_entropy(3 * x @ turn + 7), expected, rtol=1e-4, atol=0)
        assert 0 < float(expected) < 1


def test_collapse_is_the_drop_that_stands_out():
    curve = [0.9, 0.89, 0.5, 0.49, 0.48, 0.47, 0.46, 0.45, 0.44]
    assert entropy_collapse(curve) == 2
    assert entropy_collapse(torch.tensor([0.9, 0.4, 0.39, 0.38, 0.37])) == 1
    assert entropy_collapse([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]) == 2, "a steady slope has no collapse"
    assert entropy_collapse([0.9, 0.9, 0.9, 0.9, 0.9, 0.1, 0.1], fallback=3) == 3, "only the first half counts"
    assert entropy_collapse([0.1, 0.2, 0.3, 0.4, 0.5]) == 2, "entropy that grows"
    with pytest.raises(PruningError, match="curve"):
        entropy_collapse([0.5, 0.4])


# ---- focal layers


def brute(record: torch.Tensor, keep: int, focal: list[int]) -> float:
    """The objective, step by step and layer by layer."""
    steps, layers, _ = record.shape
    best = [[set(record[t, layer].topk(keep).indices.tolist()) for layer in range(layers)] for t in range(steps)]
    total = 0.0
    for layer in range(layers):
        if layer in focal:
            continue
        earlier = [f for f in focal if f < layer]
        source, lag = (earlier[-1], 0) if earlier else (focal[-1], 1)
        caught = [
            float(record[t, layer, list(best[t - lag][source])].sum() / record[t, layer].sum())
            for t in range(lag, steps)
        ]
        total += float(record[:, layer].sum(1).mean()) * sum(caught) / len(caught)
    return total


def test_focal_layers_maximise_the_objective():
    g = torch.Generator().manual_seed(0)
    record = (torch.randn(6, 5, 30, generator=g) * 2).softmax(-1).double() * torch.rand(6, 5, 1, generator=g)
    one = focal_layers(record, 4, count=1)
    assert one[0] == max(range(5), key=lambda layer: brute(record, 4, [layer]))
    two = focal_layers(record, 4, count=2)
    rest = [layer for layer in range(5) if layer != one[0]]
    second = max(rest, key=lambda layer: brute(record, 4, sorted([one[0], layer])))
    assert two == tuple(sorted([one[0], second]))


def test_the_layer_that_knows_is_focal():
    """Layer 1 shows where the layers above it look; the others are flat or one step behind."""
    steps, n = 8, 40
    record = torch.full((steps, 6, n), 1e-4)
    for t in range(steps):
        record[t, 1, 5 * t : 5 * t + 3] = 0.05
        record[t, 2:, 5 * t : 5 * t + 3] = 0.2
    record[:, 2:, :] += 1e-3 * torch.rand(steps, 4, n, generator=torch.Generator().manual_seed(0))
    assert focal_layers(record, 3, count=1) == (1,)
    with pytest.raises(PruningError, match="two steps"):
        focal_layers(record[:1], 3)
    with pytest.raises(PruningError, match="7 of 6"):
        focal_layers(record, 3, count=7)
    assert focal_layers(record, 3, count=6) == (0, 1, 2, 3, 4, 5)


# ---- change points


@pytest.mark.parametrize("name", names("adaptinfer_shift"))
def test_golden_shift_layers(name: str):
    g = load(name)
    top, t2v = g["top_tokens"], g["t2v"]
    assert shift_layers(t2v, len(top)).tolist() == g["shift_layer"].tolist()
    assert (change_point(t2v[:, top].T) - 1).tolist() == g["shift_layer_no_cumsum"].tolist()


def test_a_step_changes_where_it_steps():
    for c in range(2, 9):
        step = (torch.arange(10) >= c).double()
        assert int(change_point(step)) == c
    assert change_point(torch.zeros(3, 6)).tolist() == [2, 2, 2]
    with pytest.raises(PruningError, match="4 layers"):
        change_point(torch.zeros(3))
