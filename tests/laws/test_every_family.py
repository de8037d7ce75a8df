"""The laws once more, for every pruner at every stage of every family that takes it: what `vlprune.supported` claims is run."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from laws.every import plan
from reference import TOLERANCE, apart, decode, kept, masked, rewritten, starts, text_model

import vlprune
from vlprune import DecodePruner, EncoderPruner, Pruner, Selection
from vlprune.support import STAGES, variants

STEPS = 2
FAMILIES = [pytest.param(family, marks=pytest.mark.slow) if family == "smolvlm" else family  # idefics3's code
            for family in tiny.FAMILIES if family != "llava"]  # it has test_laws.py for itself  # fmt: skip


@cache
def bench(family: str) -> Any:
    """A model, its eager twin, a prompt of two rows with pictures of unequal sizes, its answer and embeddings unpruned."""
    model, inputs = tiny.FAMILIES[family]()
    x = inputs()
    with torch.no_grad(), embeddings(model) as seen:
        plain = decode(model, x, STEPS)
    return model, tiny.FAMILIES[family]("eager")[0], x, plain, seen[0]


class embeddings:  # noqa: N801  (a context manager)
    """What enters the decoder, [B, T, D] for each forward pass."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        self.hook = text_model(self.model).register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        return seen

    def __exit__(self, *_: Any) -> None:
        self.hook.remove()


def supported(family: str, stage: str) -> list[tuple[str, Pruner]]:
    model = bench(family)[0]
    return [(name, p) for name, p in variants() if vlprune.supported(model, plan(p, stage, 0.5))]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_pruner(family: str, stage: str) -> None:
    model, _, x, plain, _ = bench(family)
    pruners = supported(family, stage)
    assert pruners or stage == "encoder"
    for name, pruner in pruners:
        where = f"{name}@{stage} on {family}"
        vlprune.wrap(model, plan(pruner, stage, 1.0))
        same = decode(model, x, STEPS)
        assert torch.equal(same[1], plain[1]), f"{where}: keeping all changes something"
        with vlprune.pruning(model, plan(pruner, stage, 0.5)):
            law = later_steps_see_less if stage in ("cache", "decode") else pruned_equals_masked
            law(family, stage, pruner, where)
        vlprune.unwrap(model)
        if (name, pruner) == pruners[-1]:
            assert torch.equal(decode(model, x, STEPS)[1], plain[1]), f"{family}: unwrapping leaves something"


def pruned_equals_masked(family: str, stage: str, pruner: Pruner, where: str) -> None:
    model, twin, x, plain, untouched = bench(family)
    with embeddings(model) as seen:
        tokens, logits, _ = decode(model, x, STEPS)
    assert apart(logits[:, 0], plain[1][:, 0]) > 1e-3, f"{where}: nothing was pruned"
    trace = vlprune.trace(model)
    if isinstance(pruner, EncoderPruner) and family == "qwen3_vl":
        return  # inner blocks that lost tokens feed later layers: tests/adapters/test_towers.py
    alive = kept(trace, x["input_ids"], tiny.VISUAL)
    left = torch.stack(list(alive.values())).all(0) & x["attention_mask"].bool()
    first = starts(x["input_ids"], tiny.VISUAL, trace)
    items = trace.stages[-1].items

    def merge(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone()
        for item in items:
            if item.merge is not None:
                start = first[item.row, item.picture]
                rows = Selection(item.chosen, item.merge).apply(hidden[item.row, start : start + item.tokens])
                hidden[item.row, start + item.chosen] = rows
        return hidden

    with ExitStack() as reference:
        reference.enter_context(masked(twin, alive))
        if stage == "encoder":  # what the projector made of the survivors, merged or having seen fewer neighbours
            assert (
                pruner.merges or isinstance(pruner, EncoderPruner) or apart(seen[0][left], untouched[left]) < TOLERANCE
            )
            reference.enter_context(rewritten(twin, 0, lambda hidden: seen[0]))
        else:
            reference.enter_context(rewritten(twin, 0 if stage == "projector" else int(stage), merge))
        want_tokens, want_logits, _ = decode(twin, x, STEPS)
    assert apart(logits, want_logits) < TOLERANCE, where
    assert torch.equal(tokens, want_tokens), where


def later_steps_see_less(family: str, stage: str, pruner: Pruner, where: str) -> None:
    """tests/engine/test_evict.py and test_decode.py hold the steps themselves against masking."""
    model, _, x, plain, _ = bench(family)
    _, logits, cache = decode(model, x, STEPS)
    assert apart(logits[:, 0], plain[1][:, 0]) < TOLERANCE, f"{where}: the prefill is not whole"
    if isinstance(pruner, DecodePruner) and not pruner.worthwhile(16):
        return
    assert apart(logits[:, 1], plain[1][:, 1]) > 1e-3, f"{where}: nothing was pruned"
    if stage == "cache":
        assert all(a.keys.shape[2] < b.get_seq_length() for a, b in zip(cache.layers, plain[2].layers, strict=True)), (
            where
        )
