"""The same tokens on every device, in company and alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vlprune
from tests.laws.every import give_guide
from tests.pruners.vectors import Case, cases, changed, tokens
from tests.tiny import llava
from vlprune.eval.draws import every_pruner

CASES = cases()
SINGLE = [c for c in CASES if not isinstance(c.rule, vlprune.EncoderPruner | vlprune.DecodePruner)]
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = ["cpu", pytest.param("cuda", marks=[gpu, needs_cuda])]


def out_of_a_batch(t: Tensor) -> Tensor:
    """The same numbers as a slice of something larger, with strangers on all sides."""
    larger = torch.full((3, *(size + 2 for size in t.shape)), 7, dtype=t.dtype, device=t.device)
    view = larger[(1, *(slice(1, size + 1) for size in t.shape))]
    return view.copy_(t)


def test_the_methods_that_have_vectors_are_here():
    rules = {case.pruner.partition("(")[0] for case in CASES}
    assert {"debias", "entropyprune", "flowcut", "flowcut_llm", "holov", "zoo_prune"} <= rules
    assert {
        "dart",
        "divprune",
        "fastervlm",
        "fastv",
        "pyramiddrop",
        "scope",
        "sparsevlm",
        "visionzip",
        "vispruner",
    } <= rules
    assert {"delta", "dycoke", "fasa", "h2o", "hiprune", "hired", "lookm", "mustdrop", "prumerge"} <= rules
    assert {"snapkv", "spatten_release", "streaming"} <= rules


@gpu
@needs_cuda
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_gpu_keeps_what_the_cpu_keeps(case: Case):
    assert case.run(lambda t: t.cuda()) == case.run()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_slice_of_a_batch_is_like_a_tensor_of_its_own(case: Case, device: str):
    assert case.run(lambda t: out_of_a_batch(t.to(device))) == case.run(lambda t: t.to(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SINGLE, ids=lambda c: c.name)
def test_one_call_for_many_is_like_many_calls(case: Case, device: str):
    g = torch.Generator().manual_seed(0)

    def other(t: Tensor) -> Tensor:
        return t * (1 + 0.5 * torch.rand(t.shape, generator=g)).to(t.dtype) if t.is_floating_point() else t

    own = changed(case.contexts[0], lambda t: t.to(device))
    company = [changed(changed(case.contexts[0], other), lambda t: t.to(device)) for _ in range(2)]
    selections = case.rule.select_many([company[0], own, company[1]])
    assert tokens(selections[1]) == case.run(lambda t: t.to(device))
    assert len(selections) == 3


@pytest.fixture(scope="module", params=DEVICES)
def rows(request: Any) -> Any:
    """A model of random weights, and three prompts of different lengths, one of them with two pictures."""
    model, inputs = llava()
    model.to(request.param)
    batch = {k: v.to(request.param) for k, v in inputs(batch=3).items()}
    yield model, batch
    vlprune.unwrap(model, missing_ok=True)


def kept(model: Any, inputs: dict[str, Tensor], plan: str, row: int) -> list[list[int]]:
    """Cells kept of each picture of a row."""
    with vlprune.pruning(model, plan), torch.no_grad():
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        trace = vlprune.trace(model)
        pictures = sum(p.row == row for p in trace.pictures)
        return [trace.cells(i, row) for i in range(pictures)]


@pytest.mark.parametrize("pruner", every_pruner())
def test_a_row_keeps_in_a_batch_what_it_keeps_alone(rows: Any, pruner: str, monkeypatch: pytest.MonkeyPatch):
    give_guide(monkeypatch)
    model, batch = rows
    stage = vlprune.Plan.parse(pruner, 2).steps[0].stage
    at = f"{pruner}@2" if (stage.layer or 0) > 2 else pruner  # the model has four layers
    plan = f"{at}:keep=5"
    reason = vlprune.why_unsupported(model, plan)
    if reason or str(stage) == "decode":
        pytest.skip(reason or "nothing is removed at stage decode")
    first = 0
    for row, ids in enumerate(batch["input_ids"]):
        pictures = int((ids == model.config.image_token_id).sum()) // model.config.image_seq_length
        mask = batch["attention_mask"][row].bool()
        alone = {
            "input_ids": ids[mask][None],
            "attention_mask": torch.ones_like(ids[mask])[None],
            "pixel_values": batch["pixel_values"][first : first + pictures],
        }
        first += pictures
        found = kept(model, alone, plan, 0)
        assert all(1 <= len(cells) <= 5 for cells in found)
        assert kept(model, batch, plan, row) == found
