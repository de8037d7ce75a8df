"""Stage, Budget and Plan: their text, their file, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from contextlib import suppress
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vlprune
import vlprune.pruners  # registers them
from vlprune import PRUNERS, Budget, BudgetError, Plan, SpecError, Stage, Step, VlpruneError

WRAPPERS = {n for n, cls in PRUNERS.items() if any(f.name == "inner" for f in dataclasses.fields(cls))}
PLAIN = sorted(set(PRUNERS) - WRAPPERS)
few = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


# ---- any plan at all


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a parameter's type."""
    if typing.get_origin(kind) is Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return st.one_of(*(values(k) for k in typing.get_args(kind)))
    if kind is type(None):
        return st.none()
    known = {
        bool: st.booleans(),
        int: st.integers(0, 10**9),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.sampled_from(["mean", "last"]),
    }
    return known[kind]


@st.composite
def pruners(draw: Any, name: str | None = None) -> Any:
    name = name or draw(st.sampled_from(sorted(PRUNERS)))
    cls = PRUNERS[name]
    kinds = typing.get_type_hints(cls)
    params = {}
    for f in dataclasses.fields(cls):
        if f.name == "inner":
            params["inner"] = draw(pruners(draw(st.sampled_from(PLAIN))))
        elif draw(st.booleans()):
            params[f.name] = draw(values(kinds[f.name]))
    try:
        return cls(**params)
    except VlpruneError:  # a value the rule does not take
        params = {"inner": params["inner"]} if "inner" in params else {}
    try:
        return cls(**params)
    except VlpruneError:
        return draw(pruners(draw(st.sampled_from(PLAIN))))


budgets = st.builds(
    Budget,
    st.one_of(st.integers(2, 10**6), st.floats(0, 1, exclude_min=True)),
    st.sampled_from(["image", "prompt"]),
)
stages = st.builds(Stage, st.one_of(st.sampled_from(Stage.NAMED), st.integers(0, 99).map(str)))
steps = st.builds(Step, pruners(), stages, budgets)
plans = st.builds(
    Plan,
    st.lists(steps, min_size=1, max_size=3, unique_by=lambda s: s.stage).map(tuple),
    st.sampled_from(["original", "compact"]),
)


@few
@given(plans)
def test_text_round_trip(plan):
    assert Plan.parse(str(plan)) == plan
    assert "," not in str(plan), "lmms-eval splits arguments at commas"


@few
@given(plans)
def test_file_round_trip(plan):
    data = json.loads(json.dumps(plan.to_dict()))
    assert Plan.from_dict(data) == plan


@given(st.integers(1, 5000), budgets)
def test_a_count_lies_between_one_and_all(n, budget):
    assert 1 <= budget.count(n) <= n


@given(st.text(max_size=40))
def test_any_text_is_a_plan_or_one_clear_error(text):
    with suppress(VlpruneError):
        assert Plan.parse(str(Plan.parse(text))) == Plan.parse(text)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["format", "steps", "step", "source", "positions", "vlprune", "x"]), inner, max_size=4), max_leaves=12))  # fmt: skip
def test_any_file_is_a_plan_or_one_clear_error(data):
    with pytest.raises(SpecError):
        Plan.from_dict(data)
    if isinstance(data, dict):
        with pytest.raises(SpecError):
            Plan.from_dict({**data, "format": 1, "steps": [data]})


# ---- texts


@pytest.mark.parametrize(
    ("text", "stage", "keep", "pruner"),
    [
        ("fastv:keep=0.333", "2", 0.333, {"query": "last"}),
        ("fastv@projector:keep=64:query=text", "projector", 64, {"query": "text"}),
        ("holov:keep=0.111:beta=1", "projector", 0.111, {"beta": 1.0, "crops": None}),
        ("holov:keep=0.111:crops=4:compat=official", "projector", 0.111, {"crops": 4, "compat": "official"}),
        (" random : keep=0.5", None, None, None),
        ("random:keep=1.0", "projector", 1.0, {}),
        ("random:keep=2", "projector", 2, {}),
        ("random@0:keep=5e-1", "0", 0.5, {}),
    ],
)
def test_single_steps(text, stage, keep, pruner):
    if stage is None:
        with pytest.raises(SpecError):
            Plan.parse(text)
        return
    (step,) = Plan.parse(text).steps
    assert (str(step.stage), step.budget) == (stage, Budget(keep))
    assert type(step.budget.keep) is type(keep)
    for name, value in pruner.items():
        assert getattr(step.pruner, name) == value
        assert type(getattr(step.pruner, name)) is type(value)


def test_several_steps_come_in_the_models_order():
    plan = Plan.parse(
        "random@cache:keep=0.1+fastv@8:keep=0.3+random@encoder:keep=0.9+fastv@2:keep=0.6+positions=original"
    )
    assert [str(s.stage) for s in plan.steps] == ["encoder", "2", "8", "cache"]
    assert str(plan) == "random@encoder:keep=0.9+fastv:keep=0.6+fastv@8:keep=0.3+random@cache:keep=0.1"


def test_a_pruner_that_wraps_another():
    plan = Plan.parse("debias(fastv:query=text)@3:keep=64:kappa=2")
    (step,) = plan.steps
    assert (step.pruner.name, step.pruner.kappa, step.pruner.inner.query) == ("debias", 2.0, "text")
    assert str(plan) == "debias(fastv:query=text)@3:keep=64:kappa=2.0"
    assert Plan.parse("debias(fastv):keep=64").steps[0].stage == Stage("2"), "where the wrapped one goes"


def test_keep_and_parameters_fill_in_what_a_step_leaves_open():
    assert Plan.parse("holov", 64, beta=0.5) == Plan.parse("holov:keep=64:beta=0.5")
    assert Plan.parse("uniform+fastv", 0.5) == Plan.parse("uniform:keep=0.5+fastv:keep=0.5")


BAD_TEXTS = {
    "fastvv:keep=0.5": "unknown pruner 'fastvv'; did you mean fastv",
    "": "unknown pruner ''",
    "fastv": "no budget; write fastv:keep=",
    "fastv:keep": "not of the form parameter=value",
    "fastv:=3:keep=2": "not of the form parameter=value",
    "fastv@:keep=0.5": "unknown stage ''",
    "fastv@two:keep=0.5": "unknown stage 'two'",
    "fastv@-1:keep=0.5": "unknown stage '-1'",
    "fastv@02:keep=0.5": "unknown stage '02'",
    "fastv@2@3:keep=0.5": "unknown stage '2@3'",
    "fastv:keep=0.5:k=3": "fastv has no parameter k; it takes query",
    "random:keep=0.5:query=last": "random has no parameter query; it takes seed",
    "fastv:keep=0.5:query=first": "query='first' is not one of 'last', 'text'",
    "random:keep=0.5:seed=x": "seed='x' should be of type int",
    "random:keep=0.5:seed=1.5": "seed=1.5 should be of type int",
    "fastv:keep=0.5:keep=0.6": "keep is given twice",
    "random:keep=0.5:seed=1:seed=2": "seed is given twice",
    "debias:keep=0.5": "debias wraps another pruner; write debias(fastv)",
    "debias(fastv:keep=0.5": "unbalanced parentheses",
    "debias(fastv)):keep=0.5": "unbalanced parentheses",
    "debias(fastv)x:keep=0.5": "nothing but @stage",
    "debias():keep=0.5": "unknown pruner ''",
    "debias(divprune):keep=0.5": "debias corrects scores",
    "fastv(random):keep=0.5": "fastv wraps no other pruner",
    "fastv:keep=0.5+fastv:keep=0.3": "two steps at stage 2",
    "fastv:keep=0.5+positions=dense": "positions='dense'",
    "fastv:keep=0.5:scope=batch": "scope='batch'",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_bad_texts(text):
    with pytest.raises(VlpruneError) as raised:
        Plan.parse(text)
    assert BAD_TEXTS[text] in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fastv:keep=0.5", 0.3), "keep is given twice"),
        (("fastv+random", 0.3, {"query": "text"}), "fit a single step"),
        (("fastv:keep=0.5:query=text", None, {"query": "text"}), "given twice"),
        (("fastv", 0.5, {"query": 3}), "query=3 is not one of"),
        (("random", 0.5, {"seed": True}), "seed=True should be of type int"),
    ],
)
def test_bad_arguments(arguments, message):
    text, keep, params = (*arguments, {})[:3]
    with pytest.raises(SpecError, match=message):
        Plan.parse(text, keep, **params)


# ---- budgets


@pytest.mark.parametrize(
    "keep", [0, 1, 1.5, -3, "64", True, False, math.nan, math.inf, -0.5, 0.0, None, [0.5], 1 + 1e-9]
)
def test_bad_budgets(keep):
    with pytest.raises(BudgetError, match="keep"):
        Budget(keep)


def test_one_is_asked_about():
    with pytest.raises(BudgetError, match=r"one token, or all of them\? Write keep=1.0"):
        Budget(1)


@pytest.mark.parametrize(
    ("keep", "n", "count"),
    [(0.333, 576, 192), (0.222, 576, 128), (0.111, 576, 64), (0.1, 10, 1), (0.9, 10, 9), (1.0, 576, 576), (0.001, 576, 1),
     (64, 576, 64), (64, 30, 30), (2, 1, 1), (0.5, 1, 1), (0.5, 3, 2), (0.5, 5, 3), (0.25, 2, 1)],
)  # fmt: skip
def test_counts_of_the_papers(keep, n, count):
    assert Budget(keep).count(n) == count


def test_equivalent_of_a_layer_average():
    assert Budget.equivalent(192, 576, 32, 2) == Budget(166)
    for average, at in ((192, 2), (128, 2), (300, 16)):
        found = Budget.equivalent(average, 576, 32, at)
        plan = Plan((Step(PRUNERS["fastv"](), Stage(str(at)), found),))
        assert average - 1 < plan.layer_average(576, 32) <= average
    with pytest.raises(BudgetError, match=r"lowest average there is 37\.9"):
        Budget.equivalent(20, 576, 32, 2)
    with pytest.raises(BudgetError, match="one of the 32 layers"):
        Budget.equivalent(192, 576, 32, 32)


def test_layer_average_of_a_plan():
    assert Plan.parse("uniform:keep=64").layer_average(576, 32) == 64
    assert Plan.parse("fastv@2:keep=0.5").layer_average(576, 32) == (2 * 576 + 30 * 288) / 32
    schedule = Plan.parse("fastv@8:keep=0.5+fastv@16:keep=0.25+fastv@24:keep=0.125")
    assert schedule.layer_average(576, 32) == 8 * (576 + 288 + 144 + 72) / 32
    assert Plan.parse("visionzip:keep=64").layer_average(576, 32) == 64


# ---- the file


def test_saved_beside_a_checkpoint(tmp_path):
    plan = Plan.parse("divprune:keep=0.5+fastv@3:keep=0.25+positions=original")
    path = plan.save_pretrained(tmp_path / "new" / "folder")
    assert path.name == "vlprune.json"
    data = json.loads(path.read_text())
    assert data["format"] == 1
    assert data["vlprune"] == vlprune.__version__
    assert [s["step"] for s in data["steps"]] == ["divprune:keep=0.5", "fastv@3:keep=0.25"]
    assert data["steps"][0]["source"]["paper"] == "arXiv:2503.02175"
    assert Plan.from_pretrained(path.parent) == plan
    assert Plan.from_pretrained(str(path.parent)) == plan


def good():
    return Plan.parse("fastv:keep=0.5").to_dict()


BAD_FILES = {
    "not json": ("{", "not valid JSON"),
    "not text": (b"\xff\xfe\x00", "not valid JSON"),
    "a list": ("[]", "not a vlprune plan"),
    "no steps": (json.dumps({"format": 1}), "not a vlprune plan"),
    "empty steps": (json.dumps({**good(), "steps": []}), "at least one step"),
    "newer format": (json.dumps({**good(), "format": 2}), "has format 2, this vlprune reads format 1"),
    "no format": (json.dumps({k: v for k, v in good().items() if k != "format"}), "has format None"),
    "unknown field": (json.dumps({**good(), "colour": 1, "size": 2}), "unknown fields: colour, size"),
    "unknown step field": (
        json.dumps({**good(), "steps": [{"step": "fastv:keep=0.5", "when": 1}]}),
        "unknown fields: when",
    ),
    "step without text": (json.dumps({**good(), "steps": [{"source": {}}]}), "its text under 'step'"),
    "step is a string": (json.dumps({**good(), "steps": ["fastv:keep=0.5"]}), "unknown fields"),
    "unknown pruner": (json.dumps({**good(), "steps": [{"step": "fastw:keep=0.5"}]}), "did you mean fastv"),
    "bad positions": (json.dumps({**good(), "positions": "sparse"}), "positions='sparse'"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    text, message = BAD_FILES[name]
    (tmp_path / "vlprune.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpecError) as raised:
        Plan.from_pretrained(tmp_path)
    assert message in str(raised.value)
    if name != "unknown pruner":
        assert "vlprune" in str(raised.value) or "plan" in str(raised.value) or "positions" in str(raised.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SpecError, match=r"holds no vlprune\.json; Plan\.save_pretrained writes one"):
        Plan.from_pretrained(tmp_path)
    with pytest.raises(SpecError, match="no such folder"):
        Plan.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(SpecError, match="no such folder"):
        Plan.from_pretrained("somebody/nothing-here")


def test_a_plan_of_a_newer_vlprune_warns():
    for version in ("99.0.0", "0.10.0"):
        with pytest.warns(UserWarning, match=f"written by vlprune {version}"):
            Plan.from_dict({**good(), "vlprune": version})


def test_stage_knows_its_layer():
    found = {s: Stage(s).layer for s in ("encoder", "projector", "0", "7", "cache", "decode")}
    assert found == {"encoder": None, "projector": 0, "0": 0, "7": 7, "cache": None, "decode": None}


def test_staircase_has_the_average_it_was_asked_for():
    """ADSC's example: cuts before layers 4, 10 and 18 of 32 that halve what is left are 0.336 of all tokens."""
    halves = Plan.staircase("uniform", (4, 10, 18), (4 + 6 * 0.5 + 8 * 0.25 + 14 * 0.125) / 32, 32)
    assert [(s.stage.layer, round(float(s.budget.keep), 5)) for s in halves.steps] == [
        (4, 0.5),
        (10, 0.25),
        (18, 0.125),
    ]
    for average in (0.2, 1 / 3, 0.7, 1.0):
        plan = Plan.staircase("holov:beta=0.1", (4, 10, 18), average, 32)
        assert plan.layer_average(576, 32) == pytest.approx(average * 576, abs=1)
        assert Plan.parse(str(plan)) == plan
        assert all(s.pruner.beta == 0.1 for s in plan.steps)


@pytest.mark.parametrize(
    ("at", "average"), [((), 0.5), ((3, 3), 0.5), ((4, 2), 0.5), ((32,), 0.5), ((8,), 0.2), ((8,), 1.2)]
)
def test_staircase_says_what_is_out_of_reach(at, average):
    with pytest.raises(BudgetError):
        Plan.staircase("uniform", at, average, 32)
