"""The front door: what it takes, what it refuses, and that a refusal leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from reference import decode

import vlprune
from vlprune import (
    PRUNERS,
    Budget,
    BudgetError,
    Plan,
    PruningError,
    SpecError,
    Stage,
    Step,
    UnsupportedModel,
    UnsupportedStage,
    VlpruneError,
)


@pytest.fixture(scope="module")
def built() -> Any:
    return tiny.llava()


@pytest.fixture
def model(built: Any) -> Any:
    with torch.no_grad():
        yield built[0]
    vlprune.unwrap(built[0], missing_ok=True)


@pytest.fixture
def x(built: Any) -> Any:
    return built[1](2)


BAD = {
    "unknown pruner": (("fastw", 64), {}, SpecError, "unknown pruner 'fastw'; did you mean fastv"),
    "unknown pruner, nothing near": (("zzzzzz", 64), {}, SpecError, "unknown pruner 'zzzzzz' (vlprune list shows all)"),
    "unknown parameter": (("holov", 64), {"gamma": 1}, SpecError, "holov has no parameter gamma; it takes crops, beta"),
    "parameter of another type": (("fastv", 64), {"query": "first"}, SpecError, "query='first' is not one of 'last', 'text'"),
    "no budget": (("fastv",), {}, BudgetError, "no budget"),
    "zero": (("fastv", 0), {}, BudgetError, "a count is at least 2"),
    "one": (("fastv", 1), {}, BudgetError, "one token, or all of them?"),
    "more than all": (("fastv", 1.5), {}, BudgetError, "a share lies in (0, 1]"),
    "negative": (("fastv", -3), {}, BudgetError, "a count is at least 2"),
    "a string": (("fastv", "64"), {}, BudgetError, "got '64'"),
    "True": (("fastv", True), {}, BudgetError, "got True"),
    "nan": (("fastv", float("nan")), {}, BudgetError, "a share lies in (0, 1]"),
    "keep twice": (("fastv:keep=0.5", 0.5), {}, SpecError, "keep is given twice"),
    "unknown stage": (("fastv", 64), {"stage": "middle"}, SpecError, "unknown stage 'middle'"),
    "stage that offers too little": (("fastv@encoder:keep=64",), {}, UnsupportedStage, "needs 'last_attention', which the llava"),
    "stage for another kind of rule": (("fastv@decode:keep=64",), {}, UnsupportedStage, "chooses once per prompt"),
    "tower pruner elsewhere": (("flowcut@2:keep=64",), {}, UnsupportedStage, "acts at stage 'encoder' only"),
    "layer beyond depth": (("fastv@4:keep=64",), {}, UnsupportedStage, "this model has layers 0 to 3"),
    "far beyond depth": (("fastv:keep=8+fastv@99:keep=4",), {}, UnsupportedStage, "fastv@99:keep=4 cuts before decoder layer 99"),
    "merging in the cache": (("tome@cache:keep=64",), {}, UnsupportedStage, "cached keys cannot be merged"),
    "shared budget in the tower": (
        ("random@encoder:keep=64:scope=prompt",),
        {},
        UnsupportedStage,
        "pictures are handled one by one at stage encoder",
    ),
    "shared budget and merging": (
        ("tome@projector:keep=64:scope=prompt",),
        {},
        UnsupportedStage,
        "pictures cannot share its budget",
    ),
    "compact and late": (("fastv@2:keep=64+positions=compact",), {}, UnsupportedStage, "Use positions='original'"),
    "compact and cache": (("random@cache:keep=64",), {"positions": "compact"}, UnsupportedStage, "Use positions='original'"),
    "positions": (("random:keep=64",), {"positions": "dense"}, SpecError, "positions='dense'"),
    "no plan": ((3.14,), {}, SpecError, "a plan is a text, a Plan or a Pruner, got float"),
    "pruner without budget": ((PRUNERS, 3), {}, SpecError, "a plan is a text, a Plan or a Pruner, got dict"),
    "stage for two steps": (("random:keep=8+fastv:keep=4",), {"stage": "1"}, SpecError, "fits a single step"),
    "parameters for two steps": (("random:keep=8+fastv:keep=4",), {"seed": 1}, SpecError, "fit a single step"),
    "plan and more": ((Plan.parse("fastv:keep=8"), 4), {}, SpecError, "already says how many"),
    "pruner alone": ((Plan.parse("fastv:keep=8").steps[0].pruner,), {}, SpecError, "fastv needs a budget"),
    "pruner and parameters": ((Plan.parse("fastv:keep=8").steps[0].pruner, 8), {"query": "text"}, SpecError, "on the pruner itself"),
}  # fmt: skip


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_one_clear_error_and_the_model_as_it_was(model, x, name, wrapped):
    arguments, options, kind, message = BAD[name]
    if wrapped:
        vlprune.wrap(model, "random:keep=6")
    want = model(**x).logits
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(kind) as raised:
        vlprune.wrap(model, *arguments, **options)
    assert isinstance(raised.value, VlpruneError)
    assert message in str(raised.value)
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    assert torch.equal(model(**x).logits, want)
    if wrapped:
        assert str(vlprune.plan_of(model)) == "random:keep=6"


def test_models_without_an_adapter(model):
    decoder = tiny.tf.LlamaForCausalLM(model.config.text_config)
    for other in (decoder, model.model, model.model.vision_tower, torch.nn.Linear(2, 2)):
        with pytest.raises(UnsupportedModel, match=rf"{type(other).__name__} has no adapter; vlprune wraps .*LlavaFor"):
            vlprune.wrap(other, "fastv:keep=64")
        assert not vlprune.supported(other, "fastv")
        assert "has no adapter" in vlprune.why_unsupported(other, "fastv")


def test_flex_attention_is_refused():
    model = tiny.llava()[0]
    model.model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModel, match="attn_implementation='sdpa'"):
        vlprune.wrap(model, "random:keep=6")


def test_what_is_not_wrapped(model, x):
    for call in (vlprune.unwrap, vlprune.trace, vlprune.plan_of):
        with pytest.raises(PruningError, match="this model is not wrapped"):
            call(model)
    with pytest.raises(PruningError, match="this model is not wrapped"), vlprune.image_sizes(model, []):
        pass
    assert vlprune.unwrap(model, missing_ok=True) is model
    vlprune.wrap(model, "random:keep=6")
    with pytest.raises(PruningError, match="nothing to trace yet"):
        vlprune.trace(model)
    vlprune.unwrap(model)
    with pytest.raises(PruningError, match="this model is not wrapped"):
        vlprune.unwrap(model)


def test_all_ways_to_say_the_same(model):
    pruner = Plan.parse("fastv:keep=6:query=text").steps[0].pruner
    step = Step(pruner, Stage("3"), Budget(6))
    for arguments, options in (
        (("fastv@3:keep=6:query=text",), {}),
        (("fastv", 6), {"stage": "3", "query": "text"}),
        (("fastv@3", 6), {"query": "text"}),
        ((pruner, 6), {"stage": "3"}),
        ((Plan((step,)),), {}),
    ):
        assert vlprune.wrap(model, *arguments, **options) is model
        assert vlprune.plan_of(model) == Plan((step,))
    vlprune.wrap(model, "random", 6, positions="compact")
    assert str(vlprune.plan_of(model)) == "random:keep=6+positions=compact"
    vlprune.wrap(model, Plan.parse("random:keep=6"), positions="compact")
    assert vlprune.plan_of(model).positions == "compact"


def test_support_is_told_beforehand(model):
    assert vlprune.supported(model, "fastv")
    assert vlprune.supported(model, "fastv:keep=64+random@cache:keep=8")
    assert vlprune.supported(model, "holov", 64, beta=0.5, stage="projector")
    assert not vlprune.supported(model, "fastv", stage="encoder")
    assert "needs 'last_attention'" in vlprune.why_unsupported(model, "fastv", stage="encoder")
    assert vlprune.why_unsupported(model, "random:keep=8", positions="compact") is None
    with pytest.raises(SpecError):
        vlprune.supported(model, "fastw")
    assert "_vlprune" not in model.__dict__


def test_after_a_tower_pruner_the_towers_attention_is_gone(model):
    """It covers other tokens than the pictures had."""
    assert "needs 'cls_attention'" in vlprune.why_unsupported(model, "flowcut:keep=8+fastervlm@projector:keep=4")
    assert vlprune.why_unsupported(model, "flowcut:keep=8+fastv@2:keep=4") is None


def test_trace(model, x):
    vlprune.wrap(model, "uniform:keep=8+fastv@2:keep=4")
    model(**x)
    trace = vlprune.trace(model)
    assert (trace.visual, trace.kept, trace.rows, trace.prompt, trace.text) == (48, 12, 2, 43, 18)
    assert trace.layer_tokens == [24, 24, 12, 12]
    assert trace.layer_average == 18
    assert trace.kv_bytes_per_token == 2 * 2 * 8 * 4  # keys and values, heads, width, float32
    assert trace.kv_bytes == 128 * (24 + 24 + 12 + 12 + 4 * 18)
    assert trace.kv_bytes_unpruned == 128 * 4 * (48 + 18)
    assert [len(trace.cells(p, r)) for r, p in ((0, 0), (1, 0), (1, 1))] == [4, 4, 4]
    assert set(trace.cells(1, 1)) < set(trace.cells(1, 1, stage="projector"))
    data = trace.to_dict()
    assert data["kept_tokens"] == 12
    assert [s["kept"] for s in data["stages"]] == [24, 12]
    assert all(s["milliseconds"] > 0 for s in data["stages"])
    table = trace.table()
    assert "visual tokens 48 -> 12, layer average 18.0" in table
    assert len({len(line) for line in table.splitlines()[1:4]}) == 1
    with pytest.raises(IndexError, match="no picture 2 in row 1"):
        trace.cells(2, 1)


def test_trace_is_of_the_last_prefill(model, x, built):
    vlprune.wrap(model, "uniform:keep=8")
    decode(model, x)
    assert vlprune.trace(model).rows == 2
    decode(model, built[1](1))
    assert vlprune.trace(model).rows == 1
    model(input_ids=torch.tensor([[11, 12]]))
    assert vlprune.trace(model).rows == 1


def test_a_picture_smaller_than_a_patch(model, x, built):
    """Pixels the tower cannot cut into patches are the library's own error; pictures go through the processor first."""
    small = {**x, "pixel_values": torch.randn(3, 3, 4, 4)}
    with pytest.raises(ValueError, match="image size") as plain:
        model(**small)
    vlprune.wrap(model, "visionzip:keep=6")
    want = model(**x).logits
    with pytest.raises(ValueError, match="image size") as wrapped:
        model(**small)
    assert str(wrapped.value) == str(plain.value)
    assert torch.equal(model(**x).logits, want)


def test_tiny_pictures_through_the_processor():
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    from vlprune.models import embedded
    from vlprune.processors import load_processor

    model, processor = AutoModelForImageTextToText.from_pretrained(embedded()).eval(), load_processor(embedded())
    prompt = f"{processor.image_token}\nwhat colour?"
    for size in ((1, 1), (3, 2), (200, 1)):
        batch = processor(images=Image.new("RGB", size, "red"), text=prompt, return_tensors="pt")
        vlprune.wrap(model, "visionzip:keep=64+fastv@1:keep=16")
        out = model.generate(**batch, max_new_tokens=2, do_sample=False)
        assert out.shape[1] > batch["input_ids"].shape[1]
        assert vlprune.trace(model).kept == 16


def test_placeholders_that_do_not_fit_the_pictures(model, x):
    """The library checks the count; nothing of ours may hide its error."""
    vlprune.wrap(model, "random:keep=6")
    with pytest.raises(ValueError, match="do not match"):
        model(**{**x, "pixel_values": x["pixel_values"][:2]})
    assert model(**x).logits.shape[0] == 2
