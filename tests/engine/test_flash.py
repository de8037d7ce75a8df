"""The library's own flash glue (2-D masks, unpadding, packed sequences) with stand-in kernels on the CPU."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers.integrations.flash_attention as integration
import transformers.modeling_flash_attention_utils as flash
from reference import TOLERANCE, apart, decode, kept, masked, uneven

import vlprune
from vlprune import Pruner, PruningError, Selection


def attend(q, k, v, causal, scale, window):
    """[L, H, d]; causal is aligned at the bottom right, as flash attention aligns it."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (t.transpose(0, 1) for t in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    last = k.shape[1] - q.shape[1]
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(last) if causal else None
    if mask is not None and window is not None:
        mask = mask.triu(last - window + 1)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)[0].transpose(0, 1)


@pytest.fixture
def kernels(monkeypatch):
    """Installs the stand-ins; yields the list of kernels that ran."""
    ran = []

    def dense(q, k, v, causal=False, softmax_scale=None, window=None, **options):
        ran.append("dense")
        return torch.stack([attend(*row, causal, softmax_scale, window) for row in zip(q, k, v, strict=True)])

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, causal=False, softmax_scale=None,
               window=None, **options):  # fmt: skip
        ran.append("varlen")
        ends = zip(
            cu_seqlens_q.tolist(),
            cu_seqlens_q.tolist()[1:],
            cu_seqlens_k.tolist(),
            cu_seqlens_k.tolist()[1:],
            strict=False,
        )
        return torch.cat([attend(q[a:b], k[c:d], v[c:d], causal, softmax_scale, window) for a, b, c, d in ends])

    def options(query_length, key_length, is_causal, dropout=0.0, softmax_scale=None, sliding_window=None, **rest):
        return {"causal": is_causal, "softmax_scale": softmax_scale, "window": sliding_window}

    several = hasattr(flash, "_process_with_kvcache_kwargs_fn")  # older releases have one such function
    functions = (dense, varlen, None, flash._pad_input, flash._unpad_input), (options, options) if several else options
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *a, **k: functions)
    monkeypatch.setattr(flash, "fa_peft_integration_check", lambda q, k, v, t: (q, k, v))
    monkeypatch.setattr(integration, "get_target_dtype", lambda q, m: None)
    return ran


def flashing(**config):
    model = tiny.llava(**config)[0]
    for c in (model.config.text_config, model.model.language_model.config):
        c._attn_implementation = "flash_attention_2"
    return model


@pytest.mark.parametrize(
    "stages", [(), ("projector",), ("2",), ("projector", "1", "3")], ids=lambda s: "+".join(s) or "none"
)
@pytest.mark.parametrize("batch", [1, 3])
def test_flash_equals_masking(reference, inputs, kernels, stages, batch):
    twin, model, x = reference(), flashing(), inputs(batch)
    alive = {}
    if stages:
        vlprune.wrap(model, uneven(*stages))
    tokens, logits, _ = decode(model, x)
    if stages:
        alive = kept(vlprune.trace(model), x["input_ids"], tiny.VISUAL)
    with masked(twin, alive):
        want_tokens, want_logits, _ = decode(twin, x)
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE
    assert set(kernels) == ({"varlen"} if batch > 1 else {"dense"}), (
        "one row without padding must stay on the dense kernel"
    )


@pytest.mark.parametrize("stages", [("projector",), ("2",)], ids="+".join)
def test_static_cache(reference, inputs, kernels, stages):
    """The library hands a static cache's mask over without the slots that are still empty."""
    twin, model, x = reference(), flashing(), inputs(3)
    vlprune.wrap(model, uneven(*stages))
    tokens, logits, _ = decode(model, x, cache_implementation="static")
    with masked(twin, kept(vlprune.trace(model), x["input_ids"], tiny.VISUAL)):
        want_tokens, want_logits, _ = decode(twin, x)
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE


@pytest.mark.parametrize("stages", [("projector",), ("2",)], ids="+".join)
@pytest.mark.parametrize("batch", [1, 2])
def test_sliding_window(reference, inputs, kernels, stages, batch):
    """Flash counts the window in slots: steps beyond it read by position, a longer prompt is refused."""
    length = inputs(batch)["input_ids"].shape[1]
    config = {"text": "mistral", "sliding_window": length + 2}
    twin, model, x = reference(**config), flashing(**config), inputs(batch)
    vlprune.wrap(model, uneven(*stages))
    tokens, logits, _ = decode(model, x, 16)
    with masked(twin, kept(vlprune.trace(model), x["input_ids"], tiny.VISUAL)):
        want_tokens, want_logits, _ = decode(twin, x, 16)
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE
    model.model.language_model.config.sliding_window = length - 1
    with pytest.raises(PruningError, match="longer than the sliding window"):
        model(**x)


class Look(Pruner):
    name = "look"
    needs = frozenset({"text_attention"})

    def __init__(self):
        self.__dict__["rows"] = []

    def select(self, ctx):
        self.rows.append(ctx.text_attention)
        return Selection(torch.arange(ctx.keep))


@pytest.mark.parametrize("window", [20, 64])
def test_attention_rows_know_the_window(llava, inputs, kernels, window):
    """Under flash no mask tells it; the rows are those of sdpa even where the prompt is then refused."""
    config = {"text": "mistral", "sliding_window": window}
    looks = []
    for model in (llava(**config), flashing(**config)):
        looks.append(Look())
        vlprune.wrap(model, looks[-1], 6, stage="1")
        with pytest.raises(PruningError) if window == 20 and len(looks) == 2 else nullcontext():
            model(**inputs(3))
    for a, b in zip(*(look.rows for look in looks), strict=True):
        assert apart(a, b) < 1e-5


@pytest.mark.parametrize("batch", [1, 3])
def test_attention_is_read_from_two_dimensional_masks(llava, inputs, kernels, batch):
    """The tap sees [B, T] masks under flash; the rows it computes are those of sdpa."""
    model, other, x = llava(), flashing(), inputs(batch)
    for plan in ("fastv@2:keep=6+fastv@3:keep=3", "fastv@2:query=text:keep=6", "himap@2:keep=6"):
        scores = []
        for m in (model, other):
            with vlprune.pruning(m, plan):
                decode(m, x)
                scores.append([i for s in vlprune.trace(m).stages for i in s.items])
        for a, b in zip(*scores, strict=True):
            assert a.cells_kept() == b.cells_kept()
            assert apart(a.scores, b.scores) < 1e-5
    assert kernels


@pytest.mark.parametrize("plan", ["visionzip:keep=6", "flowcut:keep=6", "fastervlm@projector:keep=6"])
def test_towers_under_flash(llava, inputs, kernels, plan):
    model, other, x = llava(), tiny.llava()[0], inputs(3)
    for config in (other.config.vision_config, other.model.vision_tower.config):
        config._attn_implementation = "flash_attention_2"
    found = []
    for m in (model, other):
        with vlprune.pruning(m, plan):
            found.append(decode(m, x))
    assert kernels
    assert torch.equal(found[0][0], found[1][0])
    assert apart(found[0][1], found[1][1]) < TOLERANCE
