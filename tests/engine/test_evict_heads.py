"""Stage "cache" where key heads keep different tokens, merge what leaves, or where text may leave as well."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch
from reference import MATTERS, TOLERANCE, apart, decode

import vlprune
from tests.engine.test_evict import rescored
from vlprune import Budget, CachePruner, Context, Heads, Merge, Plan, PruningError, Selection, Stage, Step, top

HKV = 2


@dataclass(frozen=True)
class PerHead(CachePruner):
    """Every key head keeps the tokens of the largest value in one channel of its keys; notes what it chose."""

    notes: dict
    tokens: str = "visual"
    merging: bool = False

    name = "per_head"
    needs = frozenset({"keys", "values", "queries", "last_attention", "text_attention", "prompt_attention", "query_sum", "is_text"})  # fmt: skip

    def select(self, ctx: Context) -> Selection:
        scores = ctx.keys[:, :, ctx.layer % 4].float()
        kept = top(scores, ctx.keep)
        merge = None
        if self.merging:  # the first kept token takes half of every token
            n = scores.shape[1]
            source = torch.cat([kept, torch.arange(n).expand(HKV, -1)], 1)
            slot = torch.cat([torch.arange(ctx.keep).expand(HKV, -1), torch.zeros(HKV, n, dtype=torch.int64)], 1)
            merge = Merge(source, slot, torch.where(torch.arange(source.shape[1]) < ctx.keep, 1.0, 0.5).expand(HKV, -1))
        self.notes.setdefault(ctx.layer, []).append((ctx, kept))
        return Selection(top(scores.sum(0), ctx.keep), heads=Heads(kept, merge))


def plan(notes, keep=5, **options):
    return Plan((Step(PerHead(notes, **options), Stage("cache"), Budget(keep)),))


def items(x, tokens):
    """(row, positions) of what one Context showed: a picture of 16 tokens, or all tokens of a row."""
    for row, ids in enumerate(x["input_ids"]):
        if tokens == "all":
            yield row, x["attention_mask"][row].nonzero()[:, 0]
        else:
            yield from ((row, p) for p in (ids == tiny.IMG).nonzero()[:, 0].split(16))


def alive_heads(notes, x, tokens="visual"):
    """[B, Hkv, T] bool for each layer from what `PerHead` noted."""
    alive = []
    for layer in range(4):
        keep = torch.ones(len(x["input_ids"]), HKV, x["input_ids"].shape[1], dtype=torch.bool)
        for (row, places), (ctx, kept) in zip(items(x, tokens), notes[layer], strict=True):
            assert ctx.tokens == len(places)
            for h in range(HKV):
                keep[row, h, places] = torch.isin(torch.arange(len(places)), kept[h])
        alive.append(keep)
    return alive


def masked_in_decode(twin, alive, heads=4):
    """Mask each layer's and each head's own columns, in steps after the prefill only."""

    def hook(keep):
        def mask(module, args, kwargs):
            if args[0].shape[1] > 1:
                return None
            m = kwargs["attention_mask"]
            dead = torch.zeros(len(keep), heads, m.shape[-1], dtype=torch.bool)
            dead[..., : keep.shape[-1]] = ~keep.repeat_interleave(heads // HKV, 1)
            m = m.expand(-1, heads, -1, -1).masked_fill(dead[:, :, None], torch.finfo(m.dtype).min)
            return args, {**kwargs, "attention_mask": m}

        return mask

    return [
        layer.register_forward_pre_hook(hook(keep), with_kwargs=True)
        for layer, keep in zip(twin.model.language_model.layers, alive, strict=True)
    ]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", ["visual", "all"])
@pytest.mark.parametrize("batch", [1, 3])
def test_eviction_by_head_equals_masking_by_head(llava, reference, inputs, batch, tokens, attn):
    twin, model, x = reference(), llava(attn), inputs(batch)
    notes = {}
    vlprune.wrap(model, plan(notes, 5 if tokens == "visual" else 0.4, tokens=tokens))
    got, logits, cache = decode(model, x)
    alive = alive_heads(notes, x, tokens)
    assert any(not torch.equal(keep[:, 0], keep[:, 1]) for keep in alive)
    unpruned = decode(twin, x)[1]
    hooks = masked_in_decode(twin, alive)
    want, want_logits, _ = decode(twin, x)
    for hook in hooks:
        hook.remove()
    assert torch.equal(got, want)
    assert apart(logits, want_logits) < TOLERANCE
    assert apart(logits[:, 0], unpruned[:, 0]) < TOLERANCE
    assert apart(want_logits[:, 1], unpruned[:, 1]) > MATTERS
    for layer, keep in zip(cache.layers, alive, strict=True):
        real = keep & x["attention_mask"].bool()[:, None]
        assert layer.keys.shape[2] == int(real.sum(2).max()) + 7


@pytest.mark.parametrize("tokens", ["visual", "all"])
def test_static_cache_and_row_alone(llava, inputs, tokens):
    model, x = llava(), inputs(3)
    vlprune.wrap(model, plan({}, 0.4, tokens=tokens))
    want, logits, _ = decode(model, x)
    got, same, cache = decode(model, x, cache_implementation="static")
    assert torch.equal(got, want)
    assert apart(logits, same) < TOLERANCE
    assert cache.layers[0].keys.shape[2] < cache.layers[0].logical_max
    mask = x["attention_mask"][0].bool()
    alone = {"input_ids": x["input_ids"][:1, mask], "pixel_values": x["pixel_values"][:1]}
    assert apart(decode(model, alone)[1], logits[:1]) < TOLERANCE


@pytest.mark.parametrize("tokens", ["visual", "all"])
def test_beams(llava, inputs, grouped, tokens):
    model, x = llava(), inputs(3 if grouped else 1)
    vlprune.wrap(model, plan({}, 0.4, tokens=tokens))
    beams = model.generate(
        **x, num_beams=3, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    new = beams.sequences[:, x["input_ids"].shape[1] :]
    assert apart(beams.sequences_scores, rescored(model, x, new) / 5) < TOLERANCE


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("tokens", ["visual", "all"])
def test_merged_rows_are_in_the_cache(llava, inputs, tokens, static):
    model, x = llava(), inputs(2)
    notes = {}
    vlprune.wrap(model, plan(notes, 4, tokens=tokens, merging=True))
    cache = tiny.tf.StaticCache(config=model.config.text_config, max_cache_len=64) if static else None
    cache = model(**x, past_key_values=cache).past_key_values
    for layer in range(4):
        for (row, _), (ctx, kept) in zip(items(x, tokens), notes[layer], strict=True):
            for name in ("keys", "values"):
                held = getattr(cache.layers[layer], name)[row]
                own = getattr(ctx, name)
                want = own.gather(1, kept[..., None].expand(-1, -1, own.shape[2])).clone()
                want[:, 0] += own.sum(1) / 2
                place = (held[:, :, None] - want[:, None]).abs().amax(3).argmin(1)  # where each wanted row lies
                found = held.gather(1, place[..., None].expand(-1, -1, want.shape[2]))
                assert apart(found, want) < TOLERANCE, name


def test_what_a_prompt_shows(llava, reference, inputs):
    """All tokens of the row: padding is none of them, and rows of attention run over all of them."""
    twin, model, x = reference(), llava(), inputs(2)
    notes = {}
    vlprune.wrap(model, plan(notes, 0.5, tokens="all"))
    model(**x)
    out = twin(**x, output_attentions=True, use_cache=True)
    for layer in range(4):
        for (row, places), (ctx, _) in zip(items(x, "all"), notes[layer], strict=True):
            attention = out.attentions[layer][row]
            last = int((x["input_ids"][row] == tiny.IMG).nonzero()[-1])
            assert ctx.keep == (len(places) + 1) // 2
            assert torch.equal(ctx.is_text, x["input_ids"][row, places] != tiny.IMG)
            assert apart(ctx.keys, out.past_key_values.layers[layer].keys[row][:, places]) < TOLERANCE
            assert apart(ctx.prompt_attention, attention[:, places][:, :, places].sum(1)) < 1e-5
            assert apart(ctx.text_attention, attention[:, last + 1 :][:, :, places].transpose(0, 1)) < 1e-5
            assert apart(ctx.query_sum, ctx.queries.sum(1)) < TOLERANCE


def test_what_a_picture_shows(llava, reference, inputs):
    twin, model, x = reference(), llava(), inputs(2)
    notes = {}
    vlprune.wrap(model, plan(notes))
    model(**x)
    out = twin(**x, output_attentions=True)
    for layer in range(4):
        for (row, places), (ctx, _) in zip(items(x, "visual"), notes[layer], strict=True):
            real = x["attention_mask"][row].bool()
            attention = out.attentions[layer][row]
            assert apart(ctx.prompt_attention, attention[:, real][:, :, places].sum(1)) < 1e-5
            assert ctx.is_text is None


def test_the_trace_counts_text_that_left(llava, inputs):
    model, x = llava(), inputs(3)
    notes = {}
    vlprune.wrap(model, plan(notes, 0.4, tokens="all"))
    cache = model(**x).past_key_values
    trace = vlprune.trace(model)
    held = [sum(ctx.keep for ctx, _ in notes[layer]) for layer in range(4)]
    assert [a + b for a, b in zip(trace.layer_tokens, trace.text_tokens, strict=True)] == held
    for layer, keep in enumerate(alive_heads(notes, x, "all")):
        visual = (keep & (x["input_ids"] == tiny.IMG)[:, None]).sum((0, 2)).float().mean()
        assert trace.layer_tokens[layer] == round(float(visual))
    one = cache.layers[0].keys[0, :, 0].numel() * 2 * 4
    assert trace.kv_bytes == one * sum(held)
    assert trace.kv_bytes_unpruned == one * int(x["attention_mask"].sum()) * 4
    kept = [sum(len(i.cells_kept()) for i in trace.stages[-1].items)]
    shared = sum(int(torch.isin(top(ctx.keys[:, :, 3].sum(0), ctx.keep), (~ctx.is_text).nonzero()[:, 0]).sum())
                 for ctx, _ in notes[3])  # fmt: skip
    assert kept == [shared]


def test_after_a_stage_in_the_model(llava, inputs):
    """Layers that hold less than the budget keep it all."""
    model, x = llava(), inputs(1)
    steps = (*Plan.parse("uniform@2:keep=4").steps, *plan({}, 15, tokens="all").steps)
    vlprune.wrap(model, Plan(steps))
    _, _, cache = decode(model, x, 3)
    assert [layer.keys.shape[2] - 2 for layer in cache.layers] == [15, 15, 11, 11]
    trace = vlprune.trace(model)
    assert [a + b for a, b in zip(trace.layer_tokens, trace.text_tokens, strict=True)] == [15, 15, 11, 11]


def test_a_window_shares_one_choice(llava, inputs):
    model, x = llava(text="mistral", sliding_window=20), inputs(1)
    notes = {}
    vlprune.wrap(model, plan(notes))
    cache = model(**x).past_key_values
    for layer in range(4):
        ((ctx, kept),) = notes[layer]
        assert not torch.equal(kept[0], kept[1])
        shared = top(ctx.keys[:, :, layer % 4].sum(0), 5)
        assert apart(cache.layers[layer].keys[0][:, 3:8], ctx.keys[:, shared]) == 0


def test_padding_inside_a_prompt(llava, inputs):
    model, x = llava(), inputs(1)
    x["attention_mask"] = x["attention_mask"].clone()
    x["attention_mask"][0, 1] = 0
    with vlprune.pruning(model, plan({}, 0.5, tokens="all")), pytest.raises(PruningError, match="tokens=visual"):
        model(**x)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("snapkv@2:keep=0.5", "stage 'cache' only"),
        ("h2o@projector:keep=0.5", "stage 'cache' only"),
        ("snapkv:keep=0.5:scope=prompt:tokens=all", "use scope=image"),
    ],
)
def test_only_the_cache(llava, text, why):
    assert why in vlprune.why_unsupported(llava(), text)


@pytest.mark.parametrize("both", ["snapkv:keep=0.5+fastocr:keep=0.5:least=0", "fastv@cache:keep=0.5+delta:keep=0.5"])
def test_not_with_a_per_step_pruner(llava, both):
    assert "one of the two" in vlprune.why_unsupported(llava(), both)
