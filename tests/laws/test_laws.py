"""The laws every pruner obeys on a model, at every stage that takes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from laws.every import cases, plan
from reference import TOLERANCE, apart, decode, kept, masked, rewritten, starts
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vlprune
from vlprune import DecodePruner, EncoderPruner, Pruner

STEPS = 3


@cache
def unpruned() -> Any:
    model, inputs = tiny.llava()  # the shared one may be wrapped when this is first asked for
    with torch.no_grad():
        return decode(model, inputs(3), STEPS)


@cache
def eager() -> Any:
    return tiny.llava("eager")[0]


@dataclass(frozen=True)
class Spy(Pruner):
    """Hands on what another pruner does, and remembers it."""

    inner: Pruner
    made: list[Any] = field(default_factory=list)

    name = "spy"
    stage = property(lambda self: self.inner.stage)
    needs = property(lambda self: self.inner.needs | {"features"})
    adaptive = property(lambda self: self.inner.adaptive)

    def select(self, ctx):
        selection = self.inner.select(ctx)
        self.made.append((ctx, selection))
        return selection


@pytest.mark.parametrize(("pruner", "stage"), cases())
def test_keeping_all_changes_nothing(model, inputs, pruner, stage):
    tokens, logits, _ = unpruned()
    vlprune.wrap(model, plan(pruner, stage, 1.0))
    after = decode(model, inputs(3), STEPS)
    assert torch.equal(after[0], tokens)
    assert torch.equal(after[1], logits)


@pytest.mark.parametrize(("pruner", "stage"), cases("encoder", "projector", "1", "3"))
def test_pruned_equals_masked(model, inputs, pruner, stage):
    """Merging pruners: what entered the decoder, or its layer, is rewritten by their own sparse map in the reference."""
    x, layer = inputs(3), int(stage) if stage.isdigit() else 0
    keep: float | int = 4 if stage in ("encoder", "1") else 0.6
    spy = pruner if isinstance(pruner, EncoderPruner) else Spy(pruner)
    vlprune.wrap(model, plan(spy, stage, keep))
    tokens, logits, _ = decode(model, x, STEPS)
    trace = vlprune.trace(model)
    assert trace.layer_tokens[:layer] == [64] * layer
    assert trace.kept == 4 * (10 if keep == 0.6 else 4) or (pruner.adaptive and trace.kept < 40)
    first = starts(x["input_ids"], tiny.VISUAL, trace)
    merges = (
        []
        if spy is pruner
        else [(first[i.row, i.picture], i.row, *made) for i, made in zip(trace.pictures, spy.made, strict=True)]
    )

    def merge(hidden):
        hidden = hidden.clone()
        for start, row, ctx, selection in merges:
            if selection.merge is not None:
                rows = ctx.features if stage == "encoder" else hidden[row, start : start + 16]
                rows = selection.apply(rows)
                hidden[row, start + selection.kept] = (
                    eager().model.multi_modal_projector(rows) if stage == "encoder" else rows
                )
        return hidden

    with masked(eager(), kept(trace, x["input_ids"], tiny.VISUAL)), rewritten(eager(), layer, merge):
        if isinstance(pruner, EncoderPruner):  # its features are those of a tower that lost tokens on the way
            features = torch.stack(model.get_image_features(x["pixel_values"], return_dict=True).pooler_output)
            with rewritten(eager(), 0, lambda h: h.masked_scatter((x["input_ids"] == tiny.IMG)[..., None], features)):
                want_tokens, want_logits, _ = decode(eager(), x, STEPS)
        else:
            want_tokens, want_logits, _ = decode(eager(), x, STEPS)
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE
    assert apart(logits[:, 0], unpruned()[1][:, 0]) > 1e-3, "nothing was pruned"


@pytest.mark.parametrize(("pruner", "stage"), cases("cache", "decode"))
def test_later_steps_see_less(model, inputs, pruner, stage):
    """The prefill is whole. tests/engine/test_evict.py and test_decode.py hold the steps against masking."""
    if isinstance(pruner, DecodePruner) and not pruner.worthwhile(16):
        pytest.skip(f"{pruner.name} reads pictures of 16 tokens whole")
    vlprune.wrap(model, plan(pruner, stage, 4))
    tokens, logits, cache = decode(model, inputs(1), STEPS)
    want_tokens, want_logits, _ = decode(vlprune.unwrap(model), inputs(1), STEPS)
    assert torch.equal(tokens[:, 0], want_tokens[:, 0])
    assert apart(logits[:, 0], want_logits[:, 0]) < TOLERANCE
    assert apart(logits[:, 1], want_logits[:, 1]) > 1e-3
    lengths = {layer.keys.shape[2] for layer in cache.layers}
    assert lengths == {23 + STEPS - 1} if stage == "decode" else max(lengths) <= 11 + STEPS - 1


@pytest.mark.parametrize(("pruner", "stage"), cases())
def test_padded_row_equals_row_alone(model, inputs, pruner, stage):
    x = inputs(3)
    vlprune.wrap(model, plan(pruner, stage, 5))
    tokens, logits, _ = decode(model, x, STEPS)
    together = vlprune.trace(model)
    picture = 0
    for row, mask in enumerate(x["attention_mask"].bool()):
        ids = x["input_ids"][row, mask][None]
        n = int((ids == tiny.IMG).sum()) // 16
        alone = {"input_ids": ids, "pixel_values": x["pixel_values"][picture : picture + n]}
        picture += n
        one = decode(model, alone, STEPS)
        for i in range(n):
            assert vlprune.trace(model).cells(i) == together.cells(i, row)
        assert torch.equal(one[0][0], tokens[row])
        assert apart(one[1][0], logits[row]) < TOLERANCE


@pytest.mark.parametrize(("pruner", "stage"), cases("encoder", "projector"))
def test_pictures_do_not_mix(model, inputs, pruner, stage):
    """Before the language model a picture's tokens depend on that picture and, where the rule reads it, the text."""
    x = inputs(2)
    vlprune.wrap(model, plan(pruner, stage, 5))
    model(**x)
    before = [i.cells_kept() for i in vlprune.trace(model).stages[0].items]
    pixels = x["pixel_values"].clone()
    pixels[2] = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(99))
    model(**{**x, "pixel_values": pixels})
    after = [i.cells_kept() for i in vlprune.trace(model).stages[0].items]
    if pruner.needs & {"last_attention", "next_attention", "text_attention"}:  # rows that run over both pictures
        assert before[0] == after[0]
    else:
        assert before[:2] == after[:2]


def state(model: Any) -> dict[str, Any]:
    """All a wrap could leave behind."""
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
             "_forward_hooks_always_called", "_backward_hooks")  # fmt: skip
    return {
        "keys": {name: sorted(m.__dict__) for name, m in modules.items()},
        "hooks": {name: [list(getattr(m, h)) for h in hooks] for name, m in modules.items()},
        "configs": {name: id(m.config) for name, m in modules.items() if hasattr(m, "config")},
        "attention": {name: m.config._attn_implementation for name, m in modules.items() if hasattr(m, "config")},
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "forwards": {type(m): (type(m).forward, type(m).__call__) for m in modules.values()},
        "parameters": {name: (id(p), p._version) for name, p in model.named_parameters()},
    }


def tables() -> dict[str, Any]:
    """What transformers looks attention up in, but for entries of our own."""
    return {k: v for k, v in ALL_ATTENTION_FUNCTIONS._global_mapping.items() if not k.startswith("vlprune|")}


@pytest.mark.parametrize(("pruner", "stage"), cases())
def test_unwrapping_restores(model, inputs, pruner, stage):
    x = inputs(3)
    decode(model, x, 1)  # the library installs hooks of its own on the first run
    before, entries = state(model), tables()
    vlprune.wrap(model, plan(pruner, stage, 4))
    model.generate(**x, max_new_tokens=2)
    assert state(model) != before
    vlprune.unwrap(model)
    assert state(model) == before
    assert tables() == entries
    assert torch.equal(decode(model, x, STEPS)[1], unpruned()[1])


@pytest.mark.parametrize(("pruner", "stage"), cases())
def test_unwrapping_restores_after_an_error(model, inputs, monkeypatch, pruner, stage):
    x = inputs(3)
    decode(model, x, 1)
    before = state(model)

    def fail(*args: Any) -> Any:
        raise ZeroDivisionError("by design")

    for name in ("select", "select_many", "step", "step_many"):
        if hasattr(type(pruner), name):
            monkeypatch.setattr(type(pruner), name, fail)
    if isinstance(pruner, DecodePruner):
        monkeypatch.setattr(type(pruner), "worthwhile", lambda self, tokens: True)
    vlprune.wrap(model, plan(pruner, stage, 4))
    with pytest.raises(ZeroDivisionError):
        model.generate(**x, max_new_tokens=3)
    vlprune.unwrap(model)
    assert state(model) == before
    assert torch.equal(decode(model, x, STEPS)[1], unpruned()[1])
