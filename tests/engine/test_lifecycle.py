"""A wrapped model can be copied, saved, shared between threads, wrapped again and unwrapped; errors leave it usable."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from contextlib import suppress

import pytest
import tiny
import torch
from reference import decode, uneven

import vlprune
from vlprune import PruningError, Scorer

PLANS = [
    "fastv@2:keep=6",
    "visionzip:keep=6",
    "flowcut:keep=6",
    "random@cache:keep=6",
    "fastv@2:keep=6+random@cache:keep=3",
]


@pytest.fixture
def fresh():
    return tiny.llava()[0]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_prunes_on_its_own(fresh, inputs, plan, how):
    """A LLaVA that has run cannot be pickled, wrapped or not: the library leaves local functions as hooks."""
    x = inputs(3)
    vlprune.wrap(fresh, plan)
    blob = pickle.dumps(fresh)
    want = decode(fresh, x)[1]
    twin = pickle.loads(blob) if how == "pickle" else copy.deepcopy(fresh)
    vlprune.unwrap(fresh)
    assert torch.equal(decode(fresh, x)[1], decode(tiny.llava()[0], x)[1])
    assert torch.equal(decode(twin, x)[1], want)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.01)
    assert not torch.equal(decode(twin, x)[1], want)
    assert vlprune.plan_of(twin) == vlprune.Plan.parse(plan)
    assert len(vlprune.trace(twin).stages) == len(vlprune.plan_of(twin).steps)
    vlprune.unwrap(twin)


def test_checkpoint_is_clean(fresh, inputs, tmp_path):
    x = inputs(1)
    before, names = decode(fresh, x)[1], set(fresh.state_dict())
    vlprune.wrap(fresh, "visionzip:keep=6+fastv@2:keep=3")
    assert set(fresh.state_dict()) == names
    fresh.save_pretrained(tmp_path)
    assert "vlprune" not in "".join(p.read_text() for p in tmp_path.glob("*.json"))
    loaded = tiny.tf.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    loaded.generation_config = fresh.generation_config
    assert torch.equal(decode(loaded, x)[1], before)


@pytest.mark.parametrize(
    "plan",
    ["fastv@2:keep=6", "himap:keep=6", "visionzip:keep=6", "flowcut:keep=6", "fastv@2:keep=6+random@cache:keep=3"],
)
def test_threads_share_a_model(fresh, inputs, plan):
    text = {"input_ids": torch.randint(10, 99, (2, 12), generator=torch.Generator().manual_seed(0))}
    prompts = [inputs(3), text, inputs(2, seed=5)]
    vlprune.wrap(fresh, plan)
    want = [decode(fresh, x, 6)[0] for x in prompts]
    wrong: list[object] = []

    def work(x, tokens):
        try:
            with torch.no_grad():
                for _ in range(4):
                    if not torch.equal(decode(fresh, x, 6)[0], tokens):
                        wrong.append("other tokens")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(prompts, want, strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_traces_and_sizes_are_per_thread(fresh, inputs):
    vlprune.wrap(fresh, "random:keep=6")
    fresh(**inputs(3))
    found = []

    def work():
        with torch.no_grad():
            with pytest.raises(PruningError, match="nothing to trace"):
                vlprune.trace(fresh)
            fresh(**inputs(1))
            found.append(vlprune.trace(fresh).rows)

    with vlprune.image_sizes(fresh, [(3, 4)] * 4):
        t = threading.Thread(target=work)
        t.start()
        t.join()
        assert fresh._vlprune.runs.sizes == [(3, 4)] * 4
    assert fresh._vlprune.runs.sizes is None
    assert found == [1]
    assert vlprune.trace(fresh).rows == 3


class Fails(Scorer):
    name = "fails"
    broken = True

    def score(self, ctx):
        if self.broken:
            raise ZeroDivisionError("by design")
        return torch.arange(ctx.tokens).float()


@pytest.mark.parametrize("stage", ["encoder", "projector", "2", "cache"])
def test_an_error_in_a_pruner_leaves_a_usable_model(fresh, inputs, monkeypatch, stage):
    x = inputs(3)
    plain = decode(fresh, x)[1]
    vlprune.wrap(fresh, Fails(), 6, stage=stage)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            decode(fresh, x)
    assert fresh._vlprune.runs.now is None
    text = {"input_ids": torch.tensor([[11, 12, 13]])}
    assert torch.equal(decode(fresh, text)[1], decode(tiny.llava()[0], text)[1])
    monkeypatch.setattr(Fails, "broken", False)
    pruned = decode(fresh, x)[1]
    assert vlprune.trace(fresh).kept == 24
    vlprune.unwrap(fresh)
    assert torch.equal(decode(fresh, x)[1], plain)
    vlprune.wrap(fresh, Fails(), 6, stage=stage)
    assert torch.equal(decode(fresh, x)[1], pruned)


class Careless(Scorer):
    name = "careless"

    def __init__(self, kept):
        self.__dict__["kept"] = kept

    def select(self, ctx):
        return vlprune.Selection(self.kept)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (torch.arange(5), "6 of 16 tokens were asked for, the pruner kept 5"),
        (torch.tensor([0, 1, 2, 3, 4, 16]), "within 0..15"),
        (torch.tensor([0, 2, 1, 3, 4, 5]), "strictly increasing"),
        (torch.tensor([0, 0, 1, 3, 4, 5]), "strictly increasing"),
        (torch.arange(6).float(), "int64"),
        (torch.arange(6)[None], "one-dimensional"),
    ],
)
def test_a_careless_selection_is_named(llava, inputs, kept, message):
    model = llava()
    vlprune.wrap(model, Careless(kept), 6)
    with pytest.raises(PruningError, match=message):
        model(**inputs(1))


def test_pruning_puts_back_what_was_there(fresh, inputs):
    x = inputs(3)
    plain = decode(fresh, x)[1]
    with vlprune.pruning(fresh, "fastv:keep=6"):
        inner = decode(fresh, x)[1]
    assert torch.equal(decode(fresh, x)[1], plain)
    vlprune.wrap(fresh, "visionzip:keep=6")
    outer = decode(fresh, x)[1]
    with suppress(KeyError), vlprune.pruning(fresh, "fastv:keep=6"):
        assert torch.equal(decode(fresh, x)[1], inner)
        with vlprune.pruning(fresh, "random:keep=3"):
            assert vlprune.plan_of(fresh).steps[0].pruner.name == "random"
        assert torch.equal(decode(fresh, x)[1], inner)
        raise KeyError
    assert torch.equal(decode(fresh, x)[1], outer)
    with vlprune.pruning(fresh, "fastv:keep=6"):
        vlprune.unwrap(fresh)
    assert torch.equal(decode(fresh, x)[1], outer)
    vlprune.unwrap(fresh)
    assert torch.equal(decode(fresh, x)[1], plain)


def test_wrapping_again_replaces(fresh, inputs):
    x = inputs(3)
    plain = decode(fresh, x)[1]
    vlprune.wrap(fresh, "fastv:keep=6")
    want = decode(fresh, x)[1]
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in fresh.modules())
    vlprune.wrap(fresh, "visionzip:keep=3")
    vlprune.wrap(fresh, "fastv:keep=6")
    assert hooks == sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in fresh.modules())
    assert torch.equal(decode(fresh, x)[1], want)
    assert torch.equal(decode(vlprune.unwrap(fresh), x)[1], plain)


def test_a_failing_wrap_keeps_the_old_plan(fresh, inputs, monkeypatch):
    x = inputs(3)
    vlprune.wrap(fresh, "fastv:keep=6")
    want = decode(fresh, x)[1]
    monkeypatch.setattr(type(fresh._vlprune.adapter), "attach", lambda self, engine: 1 / 0)
    before = fresh._vlprune
    monkeypatch.setattr(before.adapter, "attach", lambda engine: None, raising=False)
    with pytest.raises(ZeroDivisionError):
        vlprune.wrap(fresh, "random:keep=3")
    monkeypatch.undo()
    assert torch.equal(decode(fresh, x)[1], want)


def test_attention_may_be_switched_after_wrapping(fresh, reference, inputs):
    x = inputs(3)
    vlprune.wrap(fresh, "fastv@2:keep=6")
    want = decode(fresh, x)[1]
    fresh.set_attn_implementation("eager")
    assert (decode(fresh, x)[1] - want).abs().max() < 1e-4
    vlprune.unwrap(fresh)
    assert fresh.model.language_model.layers[1].self_attn.config._attn_implementation == "eager"
    assert torch.equal(decode(fresh, x)[1], decode(reference(), x)[1])


def test_accelerate_hooks(fresh, inputs):
    hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate")
    x = inputs(3)
    vlprune.wrap(fresh, "visionzip:keep=8+fastv@2:keep=6")
    want = decode(fresh, x)[0]
    vlprune.unwrap(fresh)
    for module in fresh.modules():
        align = hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True, skip_keys="past_key_values")
        hooks.add_hook_to_module(module, align)
    vlprune.wrap(fresh, "visionzip:keep=8+fastv@2:keep=6")
    assert torch.equal(decode(fresh, x)[0], want)


def test_no_warning_in_a_usual_run(fresh, inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vlprune.wrap(fresh, uneven("projector", "2"))
        fresh(**inputs(3))
