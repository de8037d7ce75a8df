"""Logits, losses, hidden states and gradients keep their public shapes and mean what they mean on the shorter sequence."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F
from reference import TOLERANCE, apart, kept, masked, uneven

import vlprune
from vlprune.engine.engine import HOOKS_RUN_TWICE


def padded_right(x):
    """The same prompts with their padding behind them."""
    y = dict(x)
    for name in ("input_ids", "attention_mask"):
        y[name] = torch.stack(
            [row.roll(-int((m == 0).sum())) for row, m in zip(x[name], x["attention_mask"], strict=True)]
        )
    return y


def answers(x):
    """Labels: the text, but nothing that a padding token would have to predict."""
    labels = x["input_ids"].masked_fill((x["input_ids"] == tiny.IMG) | (x["attention_mask"] == 0), -100)
    labels[torch.arange(len(labels)), x["attention_mask"].argmax(1)] = -100
    return labels


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("stages", [("projector",), ("1",), ("projector", "2")], ids="+".join)
def test_loss_is_that_of_the_shorter_sequence(llava, reference, inputs, stages, side):
    twin, model = reference(), llava()
    x = inputs(3) if side == "left" else padded_right(inputs(3))
    labels = answers(x)
    vlprune.wrap(model, uneven(*stages))
    out = model(**x, labels=labels)
    alive = kept(vlprune.trace(model), x["input_ids"], tiny.VISUAL)
    with masked(twin, alive):
        want = twin(**x).logits
    left = torch.stack(list(alive.values())).all(0) & x["attention_mask"].bool()
    assert apart(out.logits[left], want[left]) < TOLERANCE
    losses = []
    for row, stays in enumerate(left):
        logits, target = want[row, stays][:-1], labels[row, stays][1:]
        losses.append(F.cross_entropy(logits, target, ignore_index=-100, reduction="none")[target != -100])
    assert abs(float(out.loss) - float(torch.cat(losses).mean())) < 1e-5


def test_hidden_states_keep_the_prompts_length(llava, reference, inputs):
    twin, model, x = reference(), llava(), inputs(3)
    vlprune.wrap(model, uneven("projector", "1", "3"))
    out = model(**x, output_hidden_states=True)
    alive = kept(vlprune.trace(model), x["input_ids"], tiny.VISUAL)
    with masked(twin, alive):
        want = twin(**x, output_hidden_states=True)
    for i, (a, b) in enumerate(zip(out.hidden_states, want.hidden_states, strict=True)):
        real = x["attention_mask"].bool() & torch.stack([k for at, k in alive.items() if at <= max(i - 1, 0)]).all(0)
        assert apart(a[real], b[real]) < TOLERANCE


def test_a_removed_position_repeats_the_survivor_before_it(llava, inputs):
    model, x = llava(), inputs(1)
    vlprune.wrap(model, "uniform:keep=4")
    logits = model(**x).logits[0]
    alive = kept(vlprune.trace(model), x["input_ids"], tiny.VISUAL)[0][0]
    for at in range(1, len(alive)):
        assert alive[at] or torch.equal(logits[at], logits[at - 1])


def test_logits_to_keep(llava, inputs):
    model, x = llava(), inputs(3)
    vlprune.wrap(model, uneven("1"))
    full = model(**x).logits
    assert apart(model(**x, logits_to_keep=torch.tensor([-9, -1])).logits, full[:, [-9, -1]]) < 1e-6
    assert apart(model(**x, logits_to_keep=2).logits, full[:, -2:]) < 1e-6


def test_tuples(llava, inputs):
    model, x = llava(), inputs(3)
    vlprune.wrap(model, uneven("1"))
    assert torch.equal(model(**x, return_dict=False)[0], model(**x).logits)


@pytest.mark.skipif(HOOKS_RUN_TWICE, reason="needs transformers 5.23, whose checkpointing calls hooks once")
@pytest.mark.parametrize("plan", ["fastv@2:keep=6", "visionzip:keep=6", "uniform:keep=6"])
def test_gradients_with_and_without_checkpointing(inputs, plan):
    model, x = tiny.llava()[0], inputs(3)
    gradients = []
    vlprune.wrap(model, plan)
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with torch.enable_grad():
            model(**x, labels=answers(x), use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("vision_tower" in n for n in gradients[0]), "pixels must get gradients through the kept tokens"
    for name, gradient in gradients[0].items():
        assert apart(gradient, gradients[1][name]) < 1e-5, name
    assert max(float(g.abs().max()) for g in gradients[0].values()) > 1e-3


def test_gradient_is_that_of_masking(llava, reference, inputs):
    """Of every decoder layer's own parameters; the removed tokens get none."""
    twin, model, x = reference(), llava(), inputs(3)
    vlprune.wrap(model, uneven("projector"))
    model(**x)
    alive = kept(vlprune.trace(model), x["input_ids"], tiny.VISUAL)
    left = alive[0] & x["attention_mask"].bool()
    found = []
    for m, context in ((model, torch.enable_grad()), (twin, masked(twin, alive))):
        with torch.enable_grad(), context:
            logits = m(**x).logits[left]
            logits.square().mean().backward()
        found.append({n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None})
        m.zero_grad(set_to_none=True)
    for name, gradient in found[0].items():
        assert apart(gradient, found[1][name]) < 1e-4 * max(1.0, float(gradient.abs().max())), name


def test_half_precision(inputs):
    """bfloat16 rounds at other places; the pruned run must be no further from masking than rounding explains."""
    model, twin, x = tiny.llava()[0].bfloat16(), tiny.llava("eager")[0].bfloat16(), inputs(3)
    x = {**x, "pixel_values": x["pixel_values"].bfloat16()}
    vlprune.wrap(model, "uniform:keep=6+fastv@2:keep=3")
    logits = model(**x).logits
    alive = kept(vlprune.trace(model), x["input_ids"], tiny.VISUAL)
    with masked(twin, alive):
        want = twin(**x).logits
    left = torch.stack(list(alive.values())).all(0) & x["attention_mask"].bool()
    rounding = apart(tiny.llava()[0](**{**x, "pixel_values": x["pixel_values"].float()}).logits, twin(**x).logits)
    assert apart(logits[left], want[left]) < 2 * rounding
