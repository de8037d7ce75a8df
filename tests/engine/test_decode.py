"""Stage "decode": a step reads the text and the chosen visual tokens; the cache keeps everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from reference import decode

import vlprune
from vlprune import Budget, Context, DecodePruner, Plan, Selection, Stage, Step, top
from vlprune.engine.decode import _rows
from vlprune.pruners.fastocr import FastOCR

TOKENS = 8


@dataclass(frozen=True)
class Ranked(DecodePruner):
    """Most attended tokens at layers 0, every, 2 * every, ...; counts its own steps."""

    every: int = 2
    least: int = 0
    name = "ranked"

    def focal(self, layers: int) -> tuple[int, ...]:
        return tuple(range(0, layers, self.every))

    def worthwhile(self, tokens: int) -> bool:
        return tokens >= self.least

    def start(self, ctx: Context) -> Any:
        return 0

    def step(self, ctx: Context, state: Any) -> tuple[Selection, Any]:
        assert ctx.last_attention is not None
        return Selection(top(ctx.last_attention.mean(0), ctx.keep)), state + 1


def plan(keep: float | int, every: int = 2, least: int = 0) -> Plan:
    return Plan((Step(Ranked(every, least), Stage("decode"), Budget(keep)),))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llava()[0]


@pytest.fixture(scope="module")
def inputs() -> Any:
    return tiny.llava()[1]()


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """As `generate` counts them: padding takes none."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def by_hand(model: Any, inputs: Any, keep: int, every: int) -> torch.Tensor:
    """The same steps on an unwrapped eager model: read its attention, mask what was not chosen."""
    ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
    visual = ids == tiny.IMG
    layers = model.model.language_model.layers
    runs = [row.nonzero()[:, 0].view(-1, 16).tolist() for row in visual]  # positions of each picture of 16 tokens
    chosen = visual.clone()

    def choose(weights: torch.Tensor) -> None:  # [B, H, S]
        chosen[:] = False
        for b, items in enumerate(runs):
            for item in items:
                chosen[b, [item[int(j)] for j in top(weights[b, :, item].mean(0), keep)]] = True

    out = model(**inputs, position_ids=positions(attention_mask), use_cache=True, output_attentions=True)
    last_focal = max(range(0, len(layers), every))
    choose(out.attentions[last_focal][:, :, -1])
    cache, logits = out.past_key_values, [out.logits[:, -1]]

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        if module.layer_idx % every == 0:
            return None
        m = kwargs["attention_mask"].clone()
        m[..., : visual.shape[1]].masked_fill_((visual & ~chosen)[:, None, None], torch.finfo(m.dtype).min)
        return args, {**kwargs, "attention_mask": m}

    def after(module: Any, args: Any, result: Any) -> None:
        if module.layer_idx % every == 0:
            choose(result[1][:, :, -1])

    handles = [x.self_attn.register_forward_pre_hook(before, with_kwargs=True) for x in layers]
    handles += [x.self_attn.register_forward_hook(after) for x in layers]
    for _ in range(TOKENS - 1):
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(ids), 1)], 1)
        out = model(input_ids=logits[-1].argmax(-1, keepdim=True), attention_mask=attention_mask, past_key_values=cache,
                    position_ids=positions(attention_mask)[:, -1:], use_cache=True, output_attentions=True)  # fmt: skip
        logits.append(out.logits[:, -1])
    for handle in handles:
        handle.remove()
    return torch.stack(logits, 1)


@pytest.mark.parametrize("every", [2, 3, 4])
def test_equals_masking_by_hand(inputs: Any, every: int) -> None:
    want = by_hand(tiny.llava("eager")[0], inputs, 3, every)
    for attn in ("sdpa", "eager"):
        model = tiny.llava(attn)[0]
        dense = decode(model, inputs, TOKENS)[1]
        with vlprune.pruning(model, plan(3, every)):
            _, got, cache = decode(model, inputs, TOKENS)
        assert (want - got).abs().max() < 1e-4
        assert (dense - got)[:, 1:].abs().max() > 0.1  # the choice matters
        assert {layer.keys.shape[2] for layer in cache.layers} == {inputs["input_ids"].shape[1] + TOKENS - 1}


@pytest.mark.parametrize("options", [dict(keep=1.0), dict(keep=16), dict(keep=3, every=1), dict(keep=3, least=17)])
def test_everything_read_is_dense_decode_bit_for_bit(model: Any, inputs: Any, options: Any) -> None:
    tokens, logits, _ = decode(model, inputs, TOKENS)
    with vlprune.pruning(model, plan(**options)):
        again, same, _ = decode(model, inputs, TOKENS)
    assert torch.equal(tokens, again)
    assert torch.equal(logits, same)


def test_static_cache_and_padded_row(model: Any, inputs: Any) -> None:
    first = inputs["attention_mask"][0].bool()
    one = dict(input_ids=inputs["input_ids"][:1, first], attention_mask=first[None, first].long(),
               pixel_values=inputs["pixel_values"][:1])  # fmt: skip
    with vlprune.pruning(model, plan(3)):
        tokens, logits, _ = decode(model, inputs, TOKENS)
        static, same, _ = decode(model, inputs, TOKENS, cache_implementation="static")
        alone = decode(model, one, TOKENS)[1]
    assert torch.equal(tokens, static)
    assert (logits - same).abs().max() < 1e-4
    assert (logits[:1] - alone).abs().max() < 1e-4


def test_beams_follow_their_choice(grouped: bool) -> None:
    """Beam search must equal rescoring its own winner greedily, step by step, with the same rule."""
    model, prompts = tiny.llava()
    inputs = prompts(2 if grouped else 1)
    with vlprune.pruning(model, plan(3)):
        out = model.generate(**inputs, num_beams=3, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True,
                             output_scores=True)  # fmt: skip
        ids = out.sequences[:, inputs["input_ids"].shape[1] :]
        replay = _forced(model, inputs, ids)
    score = replay.log_softmax(-1).gather(2, ids[..., None]).sum((1, 2)) / TOKENS
    assert torch.allclose(score, out.sequences_scores, atol=1e-4)


@torch.no_grad()
def _forced(model: Any, inputs: Any, ids: torch.Tensor) -> torch.Tensor:
    out = model(**inputs, position_ids=positions(inputs["attention_mask"]), use_cache=True)
    logits, mask = [out.logits[:, -1]], inputs["attention_mask"]
    for t in range(ids.shape[1] - 1):
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
        out = model(input_ids=ids[:, t : t + 1], attention_mask=mask, past_key_values=out.past_key_values, use_cache=True,
                    position_ids=positions(mask)[:, -1:])  # fmt: skip
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.triton
def test_kernel_engine_equals_reference_engine(model: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with vlprune.pruning(model, plan(3)):
        tokens, logits, _ = decode(model, inputs, 5)
        monkeypatch.setenv("VLPRUNE_KERNELS", "triton")
        with torch.no_grad():
            again, same, _ = decode(model, inputs, 5)
    assert torch.equal(tokens, again)
    assert (logits - same).abs().max() < 1e-4


def test_with_tokens_removed_before(model: Any, inputs: Any) -> None:
    both = Plan((*Plan.parse("random@2:keep=8").steps, *plan(3).steps))
    with vlprune.pruning(model, both):
        _, logits, cache = decode(model, inputs, TOKENS)
    with vlprune.pruning(model, Plan((*Plan.parse("random@2:keep=8").steps, *plan(8).steps))):
        dense = decode(model, inputs, TOKENS)[1]
    with vlprune.pruning(model, "random@2:keep=8"):
        plain = decode(model, inputs, TOKENS)[1]
    # layers 0 and 1 still hold 16 tokens an item and read 8 of them, so only a share of everything is plain
    assert (dense - logits).abs().max() > 0.01
    assert [layer.keys.shape[2] for layer in cache.layers][2] < [layer.keys.shape[2] for layer in cache.layers][1]
    assert plain.shape == dense.shape


def test_needs_a_cache(model: Any, inputs: Any) -> None:
    with vlprune.pruning(model, plan(3)), pytest.raises(vlprune.PruningError, match="use_cache=True"):
        model(**inputs, use_cache=False)


@pytest.mark.parametrize("shape", [(3, 40), (2, 4, 17), (1, 1)])
def test_rows_to_read(shape: tuple[int, ...]) -> None:
    alive = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    most = int(alive.sum(-1).max()) + 2
    found = _rows(alive, most)
    assert found.shape == (*shape[:-1], min(most, shape[-1]))
    for row, slots in zip(alive.flatten(0, -2), found.flatten(0, -2), strict=True):
        wanted = row.nonzero()[:, 0].tolist()
        assert slots.tolist() == wanted + [-1] * (len(slots) - len(wanted))


def test_a_rule_that_answers_for_too_few_items(model: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastOCR, "step_many", lambda self, contexts, states: ([], list(states)))
    with (
        vlprune.pruning(model, "fastocr:keep=0.5:least=0"),
        pytest.raises(vlprune.PruningError, match="with 0 selections"),
    ):
        decode(model, inputs, 2)
