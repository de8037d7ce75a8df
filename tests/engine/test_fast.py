"""A replay gives the tokens of `model.generate`, for other pictures and words than it was made with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import vlprune
from vlprune.errors import PruningError, UnsupportedModel, UnsupportedStage

PLANS = ["uniform:keep=0.25", "divprune:keep=5", "visionzip:keep=0.5", "fastv@2:keep=0.25", "cdpruner@1:keep=4"]
DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")])]  # fmt: skip


def prompt(seed: int, rows: int = 1, text: int = 4) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    picture = ("img", 16)
    x = tiny.prompt([[3, picture, text, picture, 5]] * rows, g)
    return {**x, "pixel_values": torch.randn(2 * rows, 3, 32, 32, generator=g)}


def on(x: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {k: v.to(device) for k, v in x.items()}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {}


@pytest.fixture(params=DEVICES)
def model(request: pytest.FixtureRequest, models: dict[str, Any]) -> Iterator[Any]:
    device = request.param
    if device not in models:
        models[device] = tiny.llava()[0].to(device)
    yield models[device]
    vlprune.unwrap(models[device], missing_ok=True)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("plan", PLANS)
def test_tokens_are_those_of_generate(model: Any, plan: str, rows: int) -> None:
    vlprune.wrap(model, plan)
    device = str(model.device)
    fast = vlprune.replay(model, on(prompt(0, rows), device), new_tokens=8)
    told = []
    for seed in (1, 2, 0):
        x = on(prompt(seed, rows), device)
        want = model.generate(**x, max_new_tokens=8, do_sample=False)[:, -8:]
        slow = vlprune.trace(model)
        assert torch.equal(fast.generate(x), want)
        again = vlprune.trace(model)
        assert again is not slow
        assert again.layer_tokens == slow.layer_tokens
        assert again.cells(1) == slow.cells(1)
        told.append(want)
    assert not torch.equal(told[0], told[1])  # the prompts matter


def test_logits_are_those_of_a_plain_loop(model: Any) -> None:
    vlprune.wrap(model, "fastv@2:keep=0.25")
    x = on(prompt(3), str(model.device))
    fast = vlprune.replay(model, on(prompt(4), str(model.device)), new_tokens=4)
    with torch.inference_mode():
        out = model(**x, use_cache=True)
        close = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(fast.prefill(x), out.logits[:, -1], **close)
        for word in (17, 40, 8):  # any token may be put in place of the likeliest
            fast.token.fill_(word)
            out = model(input_ids=fast.token.clone(), past_key_values=out.past_key_values, use_cache=True)
            torch.testing.assert_close(fast.step(), out.logits[:, -1], **close)


def test_the_cache_is_short_and_stays_where_it_is(model: Any) -> None:
    vlprune.wrap(model, "fastv@2:keep=0.25")
    x = on(prompt(0), str(model.device))
    fast = vlprune.replay(model, x, new_tokens=6)
    before = [layer.keys.data_ptr() for layer in fast.cache.layers if layer.is_initialized]
    fast.generate(x)
    length, left = x["input_ids"].shape[1], x["input_ids"].shape[1] - 24
    assert [layer.keys.shape[2] for layer in fast.cache.layers] == [length + 6] * 2 + [left + 6] * 2
    fast.generate(on(prompt(5), str(model.device)), new_tokens=3)
    now = [layer.keys.data_ptr() for layer in fast.cache.layers]
    assert now[: len(before)] == before


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("uniform@cache:keep=0.5", "at one stage"),
        ("fastv@1:keep=0.5+fastv@2:keep=0.25", "at one stage"),
        ("uniform:keep=0.5+positions=compact", "keep their positions"),
    ],
)
def test_plans_it_does_not_take(plan: str, words: str) -> None:
    model = vlprune.wrap(tiny.llava()[0], plan)
    with pytest.raises(UnsupportedStage, match=words):
        vlprune.replay(model, prompt(0), 4)


@pytest.mark.parametrize("make", [tiny.qwen2_5_vl, tiny.gemma3])
def test_models_it_does_not_take(make: Any) -> None:
    model, inputs = make()
    vlprune.wrap(model, "uniform:keep=0.5")
    with pytest.raises(UnsupportedModel, match=r"use model\.generate"):
        vlprune.replay(model, inputs(1), 4)


def test_prompts_it_does_not_take() -> None:
    model = tiny.llava()[0]
    with pytest.raises(PruningError, match="not wrapped"):
        vlprune.replay(model, prompt(0), 4)
    vlprune.wrap(model, "uniform:keep=0.25")
    padded = tiny.llava()[1](2)
    with pytest.raises(PruningError, match="without padding"):
        vlprune.replay(model, padded, 4)
    with pytest.raises(PruningError, match="holds no pictures"):
        vlprune.replay(model, {"input_ids": torch.tensor([[1, 20, 30, 40]])}, 4)
    fast = vlprune.replay(model, prompt(0), 4)
    with pytest.raises(PruningError, match="made for prompts of 44 tokens of which 20 are left; this one has 46"):
        fast.prefill(prompt(0, text=6))
    with pytest.raises(PruningError, match="room for 4 new tokens"):
        fast.generate(prompt(0), 5)
    vlprune.unwrap(model)
    with pytest.raises(PruningError, match="no longer"):
        fast.prefill(prompt(0))
    vlprune.wrap(model, "uniform:keep=0.5")
    with pytest.raises(PruningError, match="no longer"):
        fast.prefill(prompt(0))
    vlprune.wrap(model, "uniform:keep=0.25")
    assert fast.generate(prompt(0)).shape == (1, 4)


def test_a_model_on_several_devices_is_refused():
    model = tiny.llava()[0]
    model.lm_head.to("meta")
    vlprune.wrap(model, "divprune:keep=5")
    with pytest.raises(UnsupportedModel, match="several devices"):
        vlprune.replay(model, prompt(0), 4)
