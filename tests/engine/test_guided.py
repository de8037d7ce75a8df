"""Scores from outside, and the attention of a whole answer that they can be made of."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import tiny
import torch
from reference import TOLERANCE, apart, decode, kept, masked
from torch import Tensor

import vlprune
from vlprune import PruningError, UnsupportedModel
from vlprune.gathered import consistency, sequence_probability

STEPS = 5


def expected(twin: Any, x: tiny.Inputs, last_visual_row: bool) -> list[Tensor]:
    """The same sums, from the maps of an eager model."""
    with torch.no_grad():
        out = twin.generate(**x, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, output_attentions=True,
                            return_dict_in_generate=True)  # fmt: skip
    visual = x["input_ids"] == tiny.IMG
    scores = []
    for row in range(len(visual)):
        places = visual[row].nonzero()[:, 0]
        first = int(places[-1]) + (not last_visual_row)
        prompt = sum(layer[row, :, first:][..., places].sum(dim=(0, 1)) for layer in out.attentions[0])
        answer = sum(layer[row, :, 0][:, places].sum(dim=0) for step in out.attentions[1:] for layer in step)
        scores += list((prompt + answer).split(16))
    return scores


@pytest.mark.parametrize("last_visual_row", [True, False])
def test_gathers_what_eager_attention_shows(llava, reference, inputs, last_visual_row):
    model, twin, x = llava(), reference(), inputs(3)
    before = decode(model, x, STEPS)
    with vlprune.gathered_attention(model, last_visual_row) as seen:
        during = decode(model, x, STEPS)
    assert torch.equal(before[1], during[1]), "it watches and changes nothing"
    want = expected(twin, x, last_visual_row)
    assert len(seen.scores) == len(want) == 4
    for got, should in zip(seen.scores, want, strict=True):
        torch.testing.assert_close(got, should, rtol=1e-4, atol=1e-4)


def test_an_ended_answer_looks_at_nothing_any_more(llava, inputs):
    model, x = llava(), inputs(2)
    tokens = decode(model, x, STEPS)[0]
    end = next(t for t in tokens[0].tolist() if t not in tokens[1].tolist())
    stop = tokens[0].tolist().index(end)
    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, end
    try:
        with vlprune.gathered_attention(model) as seen:
            model.generate(**x, max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
    finally:
        model.generation_config.eos_token_id = ends
    with vlprune.gathered_attention(model) as shorter:
        model.generate(**x, max_new_tokens=stop + 1, min_new_tokens=stop + 1, do_sample=False)
    torch.testing.assert_close(seen.scores[0], shorter.scores[0], rtol=1e-5, atol=1e-5)


def test_leaves_no_trace_after_an_error(llava, inputs):
    model, x = llava(), inputs(1)
    before, configs = model(**x).logits, [layer.self_attn.config for layer in model.model.language_model.layers]
    with pytest.raises(RuntimeError, match="stop"), vlprune.gathered_attention(model):
        raise RuntimeError("stop")
    assert all(a is b.self_attn.config for a, b in zip(configs, model.model.language_model.layers, strict=True))
    assert torch.equal(model(**x).logits, before)
    with pytest.raises(PruningError, match="no prompt with a picture"), vlprune.gathered_attention(model) as seen:
        _ = seen.scores


def test_beams_and_sliding_windows_are_refused(llava, inputs):
    with pytest.raises(PruningError, match="without beams"), vlprune.gathered_attention(llava()):
        llava().generate(**inputs(1), max_new_tokens=3, do_sample=False, num_beams=2)
    llava().generate(**inputs(1), max_new_tokens=3, do_sample=False, num_beams=2)
    gemma = tiny.gemma3()[0]
    with pytest.raises(UnsupportedModel, match="sliding window"), vlprune.gathered_attention(gemma):
        pass


@pytest.mark.parametrize("stage", ["projector", "2", "cache"])
@torch.no_grad()
def test_the_best_tokens_by_scores_from_outside_stay(llava, reference, inputs, stage):
    model, twin, x = llava(), reference(), inputs(2)
    g = torch.Generator().manual_seed(5)
    scores = [torch.randn(16, generator=g) for _ in range(3)]
    vlprune.wrap(model, "sgl", keep=5, stage=stage)
    with vlprune.guided(model, scores):
        _, logits, _ = decode(model, x, 4)
        trace = vlprune.trace(model)
    for item, score in zip(trace.stages[0].items, scores, strict=True):
        assert item.cells_kept() == sorted(score.topk(5).indices.tolist())
    if stage != "cache":
        with masked(twin, kept(trace, x["input_ids"], [tiny.IMG])):
            assert apart(logits, decode(twin, x, 4)[1]) < TOLERANCE


def test_what_is_left_of_an_earlier_stage_keeps_its_scores(llava, inputs):
    model, x = llava(), inputs(1)
    scores = torch.arange(16.0).flip(0)
    vlprune.wrap(model, "uniform:keep=8+sgl@2:keep=3")
    with vlprune.guided(model, [scores]):
        model(**x)
    first, second = vlprune.trace(model).stages
    left = first.items[0].cells_kept()
    assert second.items[0].cells_kept() == sorted(left)[:3]  # the scores fall from token to token


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (None, "inside `with vlprune.guided"),
        ([torch.zeros(16)], "scores for 1 pictures"),
        ([torch.zeros(16), torch.zeros(9), torch.zeros(16)], r"16 visual tokens, but scores of shape \(9,\)"),
    ],
)
def test_missing_scores_are_named_and_the_model_goes_on(llava, inputs, scores, says):
    model, x = llava(), inputs(2)
    vlprune.wrap(model, "sgl", keep=5, stage="2")
    given = nullcontext() if scores is None else vlprune.guided(model, scores)
    with pytest.raises(PruningError, match=says), given:
        model(**x)
    with vlprune.guided(model, [torch.rand(16)] * 3):
        assert vlprune.trace(model(**x) and model).kept == 15
    vlprune.unwrap(model)


def test_consistency_of_all_tokens_is_the_answers_own_probability(llava, inputs):
    model, x = llava(), inputs(2)
    answer = decode(model, x, 3)[0]
    longer = {"input_ids": torch.cat([x["input_ids"], answer], 1),
              "attention_mask": torch.cat([x["attention_mask"], torch.ones_like(answer)], 1)}  # fmt: skip
    with torch.no_grad():
        want = sequence_probability(model(**{**x, **longer}).logits, answer)
    scores = [torch.rand(16, generator=torch.Generator().manual_seed(0))] * 3
    assert torch.equal(consistency(model, x, answer, scores, keep=1.0), want)
    few = consistency(model, x, answer, scores, keep=2)
    assert few.shape == (2,)
    assert not torch.equal(few, want)
