"""A plan is made once per set of shapes, strides, dtypes and alignments, and holds nothing of the call that made it."""

from __future__ import annotations

import pytest
import torch

from vlprune.kernels import plan
from vlprune.kernels.plan import Buffer, Plan, planned
from vlprune.ops import gather_tokens


def recorded():
    """A planned function without launches, and the calls of its `make`."""
    made = []

    @planned
    def run(inputs, width):
        made.append(width)
        return Plan((Buffer((len(inputs[0]), width), inputs[0].dtype),), ())

    return run, made


def test_one_plan_for_equal_shapes():
    run, made = recorded()
    (a,), (b,) = run((torch.zeros(3),), 2), run((torch.ones(3),), 2)
    assert a.shape == b.shape == (3, 2)
    assert a.data_ptr() != b.data_ptr()
    assert made == [2]


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x[:3],
        lambda x: x.double(),
        lambda x: x.repeat_interleave(2)[::2],
        lambda x: torch.cat([x[:1], x])[1:],  # four bytes off
        lambda x: None,
    ],
    ids=["shape", "dtype", "stride", "alignment", "absent"],
)
def test_another_plan_for_other_inputs(other):
    run, made = recorded()
    x = torch.zeros(4)
    for second in (x, other(x), x, other(x)):
        run((x, second), 2)
    run((x, x), 3)
    assert made == [2, 2, 3]


def test_plans_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(plan, "PLANS", 3)
    run, made = recorded()
    for width in (1, 2, 3, 3, 4, 1):
        run((torch.zeros(1),), width)
    assert made == [1, 2, 3, 4, 1]


@pytest.mark.gpu
@pytest.mark.triton
def test_alignment_decides_which_kernel_runs(device):
    """The same shapes eight times, every second time two bytes off what vector loads need."""
    buffer = torch.randn(2 * 20 * 64 + 1, device=device).half()
    index = torch.tensor([[3, 19, 0], [7, 7, -1]], device=device)
    for turn in range(8):
        x = buffer[turn % 2 :][: 2 * 20 * 64].view(2, 20, 64)
        assert torch.equal(gather_tokens(x, index, backend="triton"), gather_tokens(x, index, backend="reference"))
