from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.pruners.golden import Golden, load, names
from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruners.flowcut import FlowCut, drop, flow_score, strength
from vlprune.selection import top


def rounded(x: Tensor) -> int:
    return round(float(x))


# ---- the authors' functions


@pytest.mark.parametrize("name", names("flowcut_unit"))
def test_golden_score_and_drop(name: str):
    g = load(name)
    target, attention = g.params["target"], g["cls_attn"]
    for b in range(len(attention)):
        m = strength(g["value"][b, None])  # the file holds the mean over heads
        torch.testing.assert_close(flow_score(attention[b], g["semantic"][b], m), g["score"][b], rtol=1e-4, atol=0)
        torch.testing.assert_close(attention[b] * m, g["qwen_vit_score"][b], rtol=1e-4, atol=0)
    for i, remaining in enumerate(g.params["rpls"]):
        counts = torch.stack([drop(a, target, remaining) for a in attention])
        assert [rounded(c) for c in counts] == g["prune_num_each"][:, i].tolist()
        assert rounded(counts.max()) == g["prune_num_batch"][i]
        qwen = [rounded(drop(a, target, remaining, epsilon=1e-7)) for a in attention]
        assert qwen == g["qwen_prune_num_each"][:, i].tolist()


# ---- the authors' schedules


class Replay:
    """One picture of a flowcut_sched file: tensors of the patches that are still alive."""

    def __init__(self, g: Golden, picture: int, keep: int) -> None:
        self.logits, self.values = g["cls_logits"][:, picture], g["values"][:, picture]
        self.alive = torch.arange(self.logits.shape[-1] - 1)
        self.keep, self.layers = keep, g.params["n_layers"]

    def context(self, layer: int) -> Context:
        columns = torch.cat([torch.zeros(1, dtype=torch.int64), self.alive + 1])
        attention = self.logits[layer][:, columns].softmax(-1)[:, 1:]
        values = self.values[layer][:, columns]
        return Context(keep=self.keep, cls_attention=attention, cls_value=values[:, 0], values=values[:, 1:],
                       layer=layer, layers=self.layers)  # fmt: skip


@pytest.mark.parametrize("name", names("flowcut_sched"))
def test_golden_schedule(name: str):
    """One picture goes through `step`; pictures of a batch get the authors' common count through `flow` and `drop`."""
    g = load(name)
    layers, keep, feature = g.params["n_layers"], g["keep"].shape[1], g.params["select_layer"]
    assert feature == layers - 2, "last=3 is the place for towers read at layer -2"
    pruner = FlowCut()
    replays = [Replay(g, b, keep) for b in range(len(g["keep"]))]
    states: list[Tensor | None] = [pruner.start() for _ in replays]
    for layer in range(layers):
        if len(replays) == 1:
            selection, states[0] = pruner.step(replays[0].context(layer), states[0])
            if selection is not None:
                replays[0].alive = replays[0].alive[selection.kept]
        else:
            flows = [pruner.flow(r.context(layer), s) for r, s in zip(replays, states, strict=True)]
            n, remaining = len(replays[0].alive), feature - layer - 1
            left = n
            if n > keep and remaining >= 0 and remaining % 2 == 0:
                most = rounded(max(drop(a, keep, remaining) for a, _ in flows)) if remaining else n
                left = max(n - most, keep)
            for b, (_, cum) in enumerate(flows):
                kept = top(cum, left)
                replays[b].alive, states[b] = replays[b].alive[kept], cum[kept]
        for b, r in enumerate(replays):
            assert len(r.alive) + 1 == g["n_tokens_after"][layer]
            assert r.alive.tolist() == g["kept_mask"][layer, b].nonzero().squeeze(1).tolist()
    for b, r in enumerate(replays):
        assert r.alive.tolist() == g["keep"][b].tolist()


def attend(x: Tensor, w: dict[str, Tensor], heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attention output [n, C], the CLS row [H, n] and values [H, n, d] of one layer."""
    rows = (F.linear(x, w[f"self_attn__{p}_proj__weight"], w[f"self_attn__{p}_proj__bias"]) for p in "qkv")
    q, k, v = (row.unflatten(-1, (heads, -1)).transpose(0, 1) for row in rows)
    attention = (q * q.shape[-1] ** -0.5 @ k.transpose(1, 2)).softmax(-1)
    out = (attention @ v).transpose(0, 1).flatten(1)
    return F.linear(out, w["self_attn__out_proj__weight"], w["self_attn__out_proj__bias"]), attention[:, 0], v


@pytest.mark.parametrize("name", names("flowcut_tiny"))
def test_golden_tower(name: str):
    """A whole tower, where each layer sees what the layers before it have left."""
    g = load(name)
    p, keep, norm = g.params, g["keep"].shape[1], g["x"].shape[-1:]
    for b, x in enumerate(g["x"]):
        alive, state = torch.arange(len(x) - 1), None
        for layer in range(p["select_layer"] + 1):
            prefix = f"w__layers__{layer}__"
            w = {k.removeprefix(prefix): v for k, v in g.arrays.items() if k.startswith(prefix)}
            eps = p["layer_norm_eps"]
            normed = F.layer_norm(x, norm, w["layer_norm1__weight"], w["layer_norm1__bias"], eps)
            out, cls_row, values = attend(normed, w, p["heads"])
            x = x + out
            y = F.layer_norm(x, norm, w["layer_norm2__weight"], w["layer_norm2__bias"], eps)
            y = F.linear(y, w["mlp__0__weight"], w["mlp__0__bias"])
            x = x + F.linear(y * torch.sigmoid(1.702 * y), w["mlp__2__weight"], w["mlp__2__bias"])
            ctx = Context(keep=keep, cls_attention=cls_row[:, 1:], cls_value=values[:, 0], values=values[:, 1:],
                          layer=layer, layers=p["n_layers"])  # fmt: skip
            if layer == 0:
                first = FlowCut().flow(ctx, None)[1]
                torch.testing.assert_close(first, g["cumulative_after_first"][b], rtol=1e-4, atol=0)
            selection, state = FlowCut().step(ctx, state)
            if selection is not None:
                alive = alive[selection.kept]
                x = torch.cat([x[:1], x[1:][selection.kept]])
            assert len(x) == g["n_tokens_after"][layer]
        assert alive.tolist() == g["keep"][b].tolist()
        torch.testing.assert_close(x, g["hidden_after_select"][b], rtol=1e-3, atol=1e-5)  # seven layers of rounding


@pytest.mark.parametrize("name", names("flowcut_qwen"))
def test_golden_without_cls(name: str):
    g = load(name)
    pruner, blocks = FlowCut(variant="mean_query", last=1), g.params["n_blocks"]
    alive, state = torch.arange(g["q"].shape[2]), None
    for block in range(blocks):
        assert len(alive) == g["n_before_each"][block]
        q, k, v = (g[x][block][:, alive] for x in "qkv")
        ctx = Context(keep=g.params["vision_target_patches"], queries=q, keys=k, values=v, layer=block, layers=blocks)
        selection, state = pruner.step(ctx, state)
        if selection is not None:
            alive = alive[selection.kept]
    assert alive.tolist() == g["keep"].tolist()


# ---- by hand


def test_drop_by_hand():
    half = torch.cat([torch.ones(32), torch.zeros(32)])
    torch.testing.assert_close(drop(half, 8, 4), torch.tensor(28 * (1 - 25 / 36)))
    assert rounded(drop(half, 8, 4)) == 9
    assert rounded(drop(torch.ones(64), 8, 4)) == 0
    assert rounded(drop(F.one_hot(torch.tensor(3), 64), 8, 4)) == 28


def test_strong_values_beat_attention():
    a, b = torch.tensor([0.5, 0.25, 0.25]), torch.ones(3)
    m = strength(torch.tensor([[[1.0, 0.0], [-2.0, 0.0], [1.0, 1.0]]]))
    assert m.tolist() == [1, 2, 2]
    torch.testing.assert_close(flow_score(a, b, m), torch.tensor([5 / 6, 7 / 6, 7 / 6]))


def context(layer: int, layers: int, n: int, keep: int, scale: float = 1.0, seed: int = 0) -> Context:
    g = torch.Generator().manual_seed(seed)
    attention = torch.rand(2, n, generator=g) ** 4
    return Context(
        keep=keep,
        cls_attention=attention / attention.sum(1, keepdim=True),
        cls_value=torch.zeros(2, 4),
        values=scale * torch.randn(2, n, 4, generator=g),
        queries=torch.randn(2, n, 4, generator=g),
        keys=torch.randn(2, n, 4, generator=g),
        layer=layer,
        layers=layers,
    )


def test_accumulates_halves():
    """CLS without a value makes b uniform, so scores scale with the values: 1, 3 and 5 give 1, 2 and 3.5."""
    state, first = None, None
    for scale, expected in ((1.0, 1.0), (3.0, 2.0), (5.0, 3.5)):
        state = FlowCut().flow(context(0, 9, 16, 4, scale), state)[1]
        first = state if first is None else first
        torch.testing.assert_close(state, expected * first)


@pytest.mark.parametrize(("layers", "last", "pruning"), [
    (24, 3, [*range(1, 22, 2)]), (12, 3, [1, 3, 5, 7, 9]), (27, 3, [*range(0, 25, 2)]), (32, 1, [*range(1, 32, 2)]),
])  # fmt: skip
@pytest.mark.parametrize("variant", ["cls", "mean_query"])
def test_pruning_layers(layers: int, last: int, pruning: list[int], variant: str):
    n, state, seen = 400, None, []
    for layer in range(layers):
        ctx = context(layer, layers, n, keep=5, seed=layer)
        ctx.cls_attention[:, 0] = 100  # one bright spot makes the entropy low: something has to go at every chance
        ctx.queries[:], ctx.keys[:, 0] = 1, 2
        selection, state = FlowCut(variant=variant, last=last).step(ctx, state)
        if selection is not None:
            seen.append(layer)
            n = len(selection.check(n, len(selection.kept)).kept)
            assert len(state) == n
    assert n == 5
    assert seen == pruning[: len(seen)]
    assert seen[-1] <= layers - last


def test_uniform_attention_waits_for_the_last_cut():
    state = None
    for layer in range(24):
        ctx = Context(keep=8, cls_attention=torch.full((2, 64), 1 / 65), cls_value=torch.zeros(2, 4),
                      values=torch.ones(2, 64, 4), layer=layer, layers=24)  # fmt: skip
        selection, state = FlowCut().step(ctx, state)
        if layer == 21:
            assert selection.kept.tolist() == list(range(8))  # all equal: the earlier ones
            break
        assert selection is None


def test_a_tower_too_short_for_the_schedule_still_meets_the_count():
    selection, _ = FlowCut().step(context(0, 2, 20, 6), None)
    assert len(selection.check(20, 6).kept) == 6


def test_everything_kept_is_nothing_done():
    for layer in range(24):
        assert FlowCut().step(context(layer, 24, 16, 16), None)[0] is None


def test_underflowed_attention_is_no_nan():
    ctx = context(21, 24, 64, 8)
    ctx.cls_attention[:, 3:] = 0
    assert torch.isfinite(FlowCut().flow(ctx, None)[1]).all()
    assert math.isfinite(float(drop(ctx.cls_attention.mean(0), 8, 4)))
    FlowCut().step(ctx, None)[0].check(64, 8)


def test_heads_may_be_permuted_together():
    ctx = context(1, 24, 64, 8)
    order = torch.tensor([1, 0])
    ctx = Context(**{**vars(ctx), "cls_value": torch.randn(2, 4, generator=torch.Generator().manual_seed(1))})
    turned = Context(**{**vars(ctx), **{f: getattr(ctx, f)[order] for f in ("cls_attention", "cls_value", "values")}})
    torch.testing.assert_close(FlowCut().flow(turned, None)[1], FlowCut().flow(ctx, None)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["cls", "mean_query"])
def test_half_precision(dtype: torch.dtype, variant: str):
    ctx = context(21, 24, 64, 8)
    half = {f: getattr(ctx, f).to(dtype) for f in ("cls_value", "values", "queries", "keys")}
    selection, state = FlowCut(variant=variant).step(Context(**{**vars(ctx), **half}), None)
    selection.check(64, 8)
    assert state.dtype == torch.float32


def test_needs_follow_the_variant():
    assert FlowCut().needs == {"cls_attention", "cls_value", "values"}
    assert FlowCut(variant="mean_query").needs == {"queries", "keys", "values"}
    with pytest.raises(SpecError, match="last"):
        FlowCut(last=0)
