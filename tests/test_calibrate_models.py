from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlprune
from tests.tiny import IMG, llava
from vlprune.calibrate import entropy_collapse_layer, focal_layers, focal_layers_of, matrix_entropy, positional_trend
from vlprune.context import Context
from vlprune.errors import PruningError, SpecError
from vlprune.plan import Budget, Plan, Stage, Step
from vlprune.pruner import Scorer
from vlprune.pruners.debias import Debias, inside

N = 16  # visual tokens of a picture


@pytest.fixture(scope="module")
def loaded() -> Any:
    return llava()


@pytest.fixture
def model(loaded: Any) -> Any:
    yield loaded[0]
    vlprune.unwrap(loaded[0], missing_ok=True)


@pytest.fixture
def inputs(loaded: Any) -> Any:
    return loaded[1]


@dataclass(frozen=True)
class Ramp(Scorer):
    """Attention that grows by e^1.3 along the picture, whatever is seen, and is large outside a wide picture."""

    padding: float = 1.0

    name = "ramp"
    stage = "2"
    needs = frozenset({"last_attention"})

    def score(self, ctx: Context) -> Tensor:
        x = torch.linspace(0, 1, ctx.tokens)
        a = 1e-3 * torch.exp(1.3 * x)
        return torch.where(inside((40, 20), ctx.grids[0]).flatten(), a, a * self.padding)


def plan_of(rule: Scorer) -> Plan:
    return Plan((Step(rule, Stage("2"), Budget(0.25)),))


# ---- trend


def test_finds_a_hosts_trend(model: Any, inputs: Any):
    found = positional_trend(model, [inputs(3), inputs(2, seed=1)], plan_of(Ramp()))
    assert found.trend.trend == "exponential"
    assert found.trend.kappa == pytest.approx(1.3, rel=1e-5)
    assert found.pictures == 4 + 3
    assert found.curve.shape == (N,)
    assert found.curve.mean() == pytest.approx(1, rel=1e-6)
    rule = found.plan.steps[0].pruner
    assert isinstance(rule, Debias)
    assert (rule.inner, rule.trend, rule.kappa) == (Ramp(), "exponential", found.trend.kappa)
    assert found.plan.steps[0].budget == Budget(0.25)


def test_fewer_places_find_the_same(model: Any, inputs: Any):
    found = positional_trend(model, [inputs(1)], plan_of(Ramp()), places=6)
    assert found.curve.shape == (6,)
    assert found.trend.kappa == pytest.approx(1.3, rel=0.1)


def test_padding_is_left_out(model: Any, inputs: Any):
    batches, sizes = [inputs(1), inputs(1, seed=1)], [[(40, 20)], [(400, 200)]]
    found = positional_trend(model, batches, plan_of(Ramp(padding=50.0)), sizes=sizes)
    assert found.trend.kappa == pytest.approx(1.3, rel=1e-5)
    assert (found.curve > 0).view(4, 4)[:, 0].tolist() == [False, True, True, False]
    fooled = positional_trend(model, batches, plan_of(Ramp(padding=50.0)))
    assert fooled.trend.r2 < 0.1 < 0.99 < found.trend.r2
    ignored = positional_trend(model, batches, plan_of(Ramp(padding=50.0)), sizes=sizes, padding="off")
    assert ignored.curve.tolist() == fooled.curve.tolist()


def test_scores_are_the_hosts_before_anything_left(model: Any, inputs: Any):
    batch = inputs(1)
    found = positional_trend(model, [batch], "fastv@2")
    with vlprune.pruning(model, "fastv@2", keep=N - 1), torch.no_grad():
        model(**batch)
        (item,) = vlprune.trace(model).stages[0].items
    torch.testing.assert_close(found.curve, (item.scores / item.scores.mean()).double(), rtol=1e-5, atol=0)


def test_result_is_a_plan_like_any_other(model: Any, inputs: Any, tmp_path: Path):
    plan = positional_trend(model, [inputs(3)], "fastv@2:keep=0.25", theta=0.01).plan
    assert Plan.parse(str(plan)) == plan
    plan.save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path) == plan
    assert str(plan).startswith("debias(fastv):keep=0.25:")
    with vlprune.pruning(model, plan), torch.no_grad():
        model(**inputs(2))
        assert {i.kept for i in vlprune.trace(model).stages[0].items} == {4}


def test_of_a_schedule_the_first_step_is_corrected(model: Any, inputs: Any):
    plan = positional_trend(model, [inputs(2)], "pyramiddrop@1:keep=0.5+pyramiddrop@2:keep=0.25").plan
    assert [type(s.pruner).__name__ for s in plan.steps] == ["Debias", "PyramidDrop"]
    assert [str(s.stage) for s in plan.steps] == ["1", "2"]


def test_a_debiased_host_is_fitted_anew(model: Any, inputs: Any):
    first = positional_trend(model, [inputs(2)], "debias(fastv:query=text)@2:kappa=9:theta=0.25", keep=0.5)
    again = positional_trend(model, [inputs(2)], first.plan)
    number = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
    assert number.sub("", str(again.plan)) == number.sub("", str(first.plan))
    fits = [[float(n) for n in number.findall(str(fit.plan))] for fit in (first, again)]
    assert fits[0] == pytest.approx(fits[1], rel=1e-4)  # sums of floats hang on where tensors lie in memory
    assert first.plan.steps[0].pruner.theta == 0.25


def test_the_model_is_left_as_it_was(model: Any, inputs: Any):
    vlprune.wrap(model, "random:keep=0.5")
    positional_trend(model, [inputs(1)])
    entropy_collapse_layer(model, [inputs(1)])
    assert str(vlprune.plan_of(model)) == "random:keep=0.5"


def test_what_cannot_be_fitted_is_refused(model: Any, inputs: Any):
    with pytest.raises(SpecError, match="divprune has none"):
        positional_trend(model, [inputs(1)], "divprune")
    with pytest.raises(PruningError, match="holds 1 pictures, sizes names 2"):
        positional_trend(model, [inputs(1)], sizes=[[(4, 4), (4, 4)]])
    with pytest.raises(PruningError, match="no picture"):
        positional_trend(model, [])


# ---- entropy collapse


def test_curve_is_that_of_the_unpruned_model(model: Any, inputs: Any):
    batch = inputs(3)
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    expected = []
    for row, ids in enumerate(batch["input_ids"]):
        places = (ids == IMG).nonzero()[:, 0]
        for picture in places.split(N):
            expected.append([float(matrix_entropy(h[row, picture])) for h in states])
    assert len(expected) == 4
    vlprune.wrap(model, "random:keep=0.25")
    found = entropy_collapse_layer(model, [batch])
    assert found.pictures == 4
    assert found.curve == pytest.approx(torch.tensor(expected, dtype=torch.float64).mean(0).tolist())
    assert len(found.curve) == 5
    if not found.stands_out:
        assert found.layer == 2
        assert entropy_collapse_layer(model, [batch], fallback=3).layer == 3


def test_a_collapse_is_found(model: Any, inputs: Any):
    """The first layer adds a large multiple of one direction to every token, another one to each."""
    weight = model.model.language_model.layers[0].mlp.down_proj.weight
    before = weight.detach().clone()
    weight.data = 1e4 * torch.ones(weight.shape[0], 1) * before[:1]
    try:
        found = entropy_collapse_layer(model, [inputs(2)], fallback=3)
    finally:
        weight.data = before
    assert found.stands_out
    assert found.layer == 1
    assert found.curve[1] < 0.1 < found.curve[0]


def test_plot(model: Any, inputs: Any):
    pytest.importorskip("matplotlib").use("Agg")
    found = entropy_collapse_layer(model, [inputs(1)])
    axes = found.plot()
    assert axes.lines[0].get_ydata().tolist() == list(found.curve)
    assert axes.lines[1].get_xdata()[0] == found.layer
    assert f"layer {found.layer}" in axes.get_legend().get_texts()[0].get_text()
    assert found.plot(axes) is axes


def test_no_picture_no_curve(model: Any):
    with pytest.raises(PruningError, match="no picture"):
        entropy_collapse_layer(model, [])


# ---- focal layers


def recorded(model: Any, batch: Any, steps: int) -> list[Tensor]:
    """[T, L, N] of every picture, from the attention maps of an eager model."""
    out = model.generate(
        **batch, max_new_tokens=steps, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    rows = torch.stack([torch.stack([a.mean(1)[:, 0] for a in step])[..., : batch["input_ids"].shape[1]]
                        for step in out.attentions[1:]])  # fmt: skip  # [T, L, B, S]
    places = [
        (b, picture) for b, ids in enumerate(batch["input_ids"]) for picture in (ids == IMG).nonzero()[:, 0].split(N)
    ]
    return [rows[:, :, b, picture] for b, picture in places]


@pytest.fixture(scope="module")
def eager() -> Any:
    return llava(attn="eager")


def test_records_what_dense_decoding_attends_to(eager: Any):
    model, inputs = eager
    batch = inputs(3)
    records = recorded(model, batch, 7)
    found = focal_layers_of(model, [batch], steps=7, keep=4, count=2)
    assert found.layers == focal_layers(records, 4, 2)
    assert found.steps == 4 * 6
    every = torch.cat(records).double()  # [T, L, N]
    assert found.mass == pytest.approx(every.sum(2).mean(0).tolist(), rel=1e-4)
    share = every.topk(4, dim=2).values.sum(2) / every.sum(2)
    assert found.concentration == pytest.approx(share.mean(0).tolist(), rel=1e-4)
    plan = vlprune.Plan.parse(f"fastocr:keep=0.25:least=0:focal_layers={found.parameter}")
    assert plan.steps[0].pruner.focal(4) == found.layers


def test_a_row_counts_until_its_answer_ends(eager: Any):
    model, inputs = eager
    batch = inputs(1)
    ids = model.generate(**batch, max_new_tokens=9, do_sample=False)[0, batch["input_ids"].shape[1] :]
    end = next(i for i in range(4, 9) if ids[i] not in ids[:i])
    model.generation_config.eos_token_id = int(ids[end])
    try:
        assert focal_layers_of(model, [batch], steps=9).steps == end
    finally:
        model.generation_config.eos_token_id = None
    with pytest.raises(PruningError, match="three tokens or more"):
        focal_layers_of(model, [batch], steps=2)


def test_records_of_other_lengths_count_by_their_steps():
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(6, 5, 20, generator=g), torch.rand(3, 5, 30, generator=g)
    assert focal_layers([a], 4) == focal_layers(a, 4)
    assert focal_layers([a] * 3, [4, 4, 4]) == focal_layers(a, 4)
    assert len(focal_layers([a, b], [4, 6], count=3)) == 3
    with pytest.raises(PruningError, match="two steps"):
        focal_layers([a, b[:1]], 4)
    with pytest.raises(PruningError, match="a record"):
        focal_layers([], 4)
