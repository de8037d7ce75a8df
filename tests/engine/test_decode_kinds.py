"""Stage "decode" where layers choose for themselves, head by head, or narrow the choice of the layer before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
import transformers.models.llama.modeling_llama as llama
from reference import MATTERS, TOLERANCE, apart, decode
from torch import Tensor

import vlprune
from tests.engine.test_decode import Ranked, _forced
from vlprune import Budget, Context, DecodePruner, Heads, Plan, Selection, Stage, Step, UnsupportedStage, top

TOKENS, KEEP = 6, 4


@dataclass(frozen=True)
class Own(DecodePruner):
    """Layers 1 and 3 keep, by head, the largest logits of the query; the others are not named and so are dense."""

    name = "own"
    reads = "own"
    needs = frozenset({"last_query", "keys"})

    def focal(self, layers: int) -> tuple[int, ...]:
        return tuple(range(1, layers, 2))

    def step(self, ctx: Context, state: Any) -> tuple[Selection, Any]:
        logits = torch.einsum("hgd,hnd->hn", ctx.last_query.unflatten(0, (len(ctx.keys), -1)), ctx.keys)
        return Selection(top(logits.sum(0), ctx.keep), heads=Heads(top(logits, ctx.keep))), state


@dataclass(frozen=True)
class Narrowing(DecodePruner):
    """Each layer hands on half of what it has read, at last the budget; counts what it was asked."""

    name = "narrowing"
    reads = "choice"

    def focal(self, layers: int) -> tuple[int, ...]:
        return tuple(range(layers))

    def count(self, keep: int, tokens: int, layer: int, layers: int) -> int:
        return max(keep, tokens >> (layer + 1))

    def start(self, ctx: Context) -> Any:
        return 0

    def step(self, ctx: Context, state: Any) -> tuple[Selection, Any]:
        return Selection(top(ctx.last_attention.mean(0), ctx.keep)), state + 1


@dataclass(frozen=True)
class Groups(Ranked):
    """Layer 0 reads everything and chooses nothing, layer 1 chooses for layers 2 and 3."""

    name = "groups"

    def focal(self, layers: int) -> tuple[int, ...]:
        return (1,)

    def dense(self, layers: int) -> tuple[int, ...]:
        return (0,)


def plan(rule: DecodePruner, keep: float | int = KEEP) -> Plan:
    return Plan((Step(rule, Stage("decode"), Budget(keep)),))


def attention_by_hand(monkeypatch: pytest.MonkeyPatch, rule: str, ids: Tensor) -> None:
    """Let eager Llamas choose by themselves in decode steps of a prompt whose pictures have 16 tokens each."""
    original = llama.eager_attention_forward
    pictures = [(b, p) for b, row in enumerate(ids) for p in (row == tiny.IMG).nonzero()[:, 0].split(16)]
    read: dict[int, Tensor] = {}  # picture -> tokens the last layer handed on

    def forward(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kw: Any) -> Any:
        if query.shape[2] > 1:
            return original(module, query, key, value, mask, **kw)
        layer, (batch, heads) = module.layer_idx, query.shape[:2]
        dead = torch.zeros(batch, heads, 1, key.shape[2], dtype=torch.bool)
        for n, (b, places) in enumerate(pictures):
            alive = torch.ones(heads, 16, dtype=torch.bool)
            if rule == "own" and layer % 2:
                logits = torch.einsum("hgd,hnd->hn", query[b, :, 0].unflatten(0, (2, -1)), key[b][:, places])
                alive = torch.zeros(2, 16, dtype=torch.bool).scatter(1, top(logits, KEEP), True).repeat_interleave(2, 0)
            elif (rule == "narrowing" and layer) or (rule == "groups" and layer > 1):
                alive = torch.isin(torch.arange(16), read[n]).expand(heads, -1)
            dead[b, :, 0, places] = ~alive
        out = original(
            module,
            query,
            key,
            value,
            mask.expand(-1, heads, -1, -1).masked_fill(dead, torch.finfo(mask.dtype).min),
            **kw,
        )
        for n, (b, places) in enumerate(pictures):
            ranking = out[1][b, :, 0][:, places].mean(0)
            if rule == "narrowing":
                read[n] = top(ranking, max(KEEP, 16 >> (layer + 1)))
            elif rule == "groups" and layer == 1:
                read[n] = top(ranking, KEEP)
        return out

    monkeypatch.setattr(llama, "eager_attention_forward", forward)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llava()[0]


@pytest.fixture(scope="module")
def inputs() -> Any:
    return tiny.llava()[1](3)


RULES = [Own(), Narrowing(), Groups()]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_equals_choosing_by_hand(model: Any, inputs: Any, rule: DecodePruner, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = decode(model, inputs, TOKENS)[1]
    with vlprune.pruning(model, plan(rule)):
        tokens, got, cache = decode(model, inputs, TOKENS)
        alone = {k: v[:1] for k, v in inputs.items()}
        alone = dict(alone, pixel_values=inputs["pixel_values"][:1])
        one = decode(model, alone, TOKENS)[1]
    twin = tiny.llava("eager")[0]
    attention_by_hand(monkeypatch, rule.name, inputs["input_ids"])
    want_tokens, want, _ = decode(twin, inputs, TOKENS)
    assert torch.equal(tokens, want_tokens)
    assert apart(got, want) < TOLERANCE
    assert apart(got[:1], one) < TOLERANCE
    assert apart(got[:, 0], dense[:, 0]) == 0
    assert apart(got[:, 1], dense[:, 1]) > MATTERS
    assert {layer.keys.shape[2] for layer in cache.layers} == {inputs["input_ids"].shape[1] + TOKENS - 1}


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_everything_read_is_dense_decode(model: Any, inputs: Any, rule: DecodePruner) -> None:
    tokens, logits, _ = decode(model, inputs, TOKENS)
    with vlprune.pruning(model, plan(rule, 16)):
        again, same, _ = decode(model, inputs, TOKENS)
    assert torch.equal(tokens, again)
    assert torch.equal(logits, same)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_static_cache_and_beams(model: Any, grouped: bool, rule: DecodePruner) -> None:
    inputs = tiny.llava()[1](3 if grouped else 1)
    with vlprune.pruning(model, plan(rule)):
        tokens, logits, _ = decode(model, inputs, TOKENS)
        static, same, _ = decode(model, inputs, TOKENS, cache_implementation="static")
        beams = model.generate(**inputs, num_beams=3, max_new_tokens=TOKENS, do_sample=False, output_scores=True,
                               return_dict_in_generate=True)  # fmt: skip
        ids = beams.sequences[:, inputs["input_ids"].shape[1] :]
        replay = _forced(model, inputs, ids)
    assert torch.equal(tokens, static)
    assert apart(logits, same) < TOLERANCE
    score = replay.log_softmax(-1).gather(2, ids[..., None]).sum((1, 2)) / TOKENS
    assert torch.allclose(score, beams.sequences_scores, atol=1e-4)


@pytest.mark.triton
@pytest.mark.parametrize(("rule", "static"), [(Own(), False), (Own(), True), (Narrowing(), False), (Groups(), False)])
def test_kernel_engine_equals_reference_engine(
    model: Any, inputs: Any, rule: DecodePruner, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"cache_implementation": "static"} if static else {}
    with vlprune.pruning(model, plan(rule)):
        tokens, logits, _ = decode(model, inputs, 2, **options)
        monkeypatch.setenv("VLPRUNE_KERNELS", "triton")
        again, same, _ = decode(model, inputs, 2, **options)
    assert torch.equal(tokens, again)
    assert apart(logits, same) < TOLERANCE


@pytest.mark.triton
def test_rows_to_read_when_later_layers_hold_less(model: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 0 chooses among 16 tokens; layers 2 and 3 hold 8 of them, and all the text must still be read."""
    both = Plan((*Plan.parse("random@2:keep=8").steps, *plan(Ranked(4), 3).steps))
    with vlprune.pruning(model, both):
        logits = decode(model, inputs, 2)[1]
        monkeypatch.setenv("VLPRUNE_KERNELS", "triton")
        assert apart(logits, decode(model, inputs, 2)[1]) < TOLERANCE


@pytest.mark.parametrize("rule", [*RULES, Ranked(2)], ids=lambda r: r.name)
def test_a_second_picture(model: Any, inputs: Any, rule: DecodePruner) -> None:
    """Read whole, both turns are as unpruned; chosen from, a step after the second turn differs and is finite."""
    g = torch.Generator().manual_seed(9)
    first = {k: v[:1] for k, v in tiny.llava()[1](1).items()}
    ids = torch.cat([torch.tensor([[20, 21]]), torch.full((1, 16), tiny.IMG), torch.tensor([[22, 23, 24]])], 1)
    second = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32, generator=g)}

    def run(keep: int | None) -> Tensor:
        with torch.no_grad(), vlprune.pruning(model, plan(rule, keep) if keep else Plan.parse("random:keep=1.0")):
            cache = model(**first).past_key_values
            cache = model(input_ids=torch.tensor([[33]]), past_key_values=cache).past_key_values
            cache = model(**second, past_key_values=cache).past_key_values
            return model(input_ids=torch.tensor([[34]]), past_key_values=cache).logits

    dense, whole, chosen = run(None), run(16), run(KEEP)
    assert torch.equal(dense, whole)
    assert chosen.isfinite().all()
    assert apart(dense, chosen) > 1e-3


def test_own_choices_are_made_before_attention_is_known(model: Any) -> None:
    @dataclass(frozen=True)
    class Late(Own):
        needs = frozenset({"last_attention"})

    with pytest.raises(UnsupportedStage, match="not known when it chooses"):
        vlprune.wrap(model, plan(Late()))


@pytest.mark.parametrize("text", ["fasa", "delta", "spatten", "snapkv", "h2o:tokens=all", "lookm"])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "mistral3"])
def test_families_agree_with_their_eager_twins(family: str, text: str) -> None:
    found = []
    for attn in ("sdpa", "eager"):
        model, inputs = tiny.FAMILIES[family](attn)
        with torch.no_grad(), vlprune.pruning(model, f"{text}:keep=0.3"):
            found.append(decode(model, inputs(), 4)[:2])
    assert torch.equal(found[0][0], found[1][0])
    assert apart(found[0][1], found[1][1]) < 1e-3
