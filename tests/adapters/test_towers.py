"""The vision side of every family: which rows of the tower make which token, what is read there, what is dropped there."""

from __future__ import annotations

import inspect
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import tiny
import torch
from reference import MATTERS, TOLERANCE, apart, decode, kept, masked

import vlprune
from vlprune import Budget, EncoderPruner, Merge, Plan, Pruner, Selection, Stage, Step, UnsupportedStage
from vlprune.adapters.base import find
from vlprune.engine.tap import TapConfig, delegate

READS = frozenset({"features", "encoder_features", "received_attention", "queries", "keys", "values", "newline"})
QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
PROGRESSIVE = ["llava", "paligemma", *QWEN, *(f"{q}+video" for q in QWEN)]


def name_of(case):
    return case.partition("+")[0]


class Look(Pruner):
    """Keeps every other token, and what it was shown."""

    name = "look"
    needs = READS

    def __init__(self, merge=False):
        object.__setattr__(self, "seen", [])
        object.__setattr__(self, "merge", merge)

    def select(self, ctx):
        self.seen.append(ctx)
        n = torch.arange(0, ctx.tokens, 2)[: ctx.keep]
        if not self.merge:
            return Selection(n)
        slots = torch.arange(len(n))  # a kept token takes half of the one behind it, where there is one
        last = n + 1 < ctx.tokens
        source, slot = torch.cat([n, n[last] + 1]), torch.cat([slots, slots[last]])
        return Selection(n, Merge(source, slot, torch.full((len(source),), 0.5)))


def at(stage, pruner, keep=0.5):
    return Plan((Step(pruner, Stage(stage), Budget(keep)),))


def calls(x):
    """The feature methods a prompt needs, with their arguments; the pixels come first, whatever a release calls them."""
    names = ("image_sizes", "image_grid_thw", "batch_num_images")
    out = {"image": ([x["pixel_values"]], {k: x[k] for k in names if k in x})}
    if "pixel_values_videos" in x:
        out["video"] = ([x["pixel_values_videos"]], {k: x[k] for k in ("video_grid_thw",) if k in x})
    return out


def features_of(m, modality, call):
    """The output of a feature method, with all its tokens in one tensor."""
    args, kwargs = call
    out = getattr(m.model, f"get_{modality}_features")(*args, **kwargs, return_dict=True)
    return out, torch.cat([f.flatten(0, -2) for f in out.pooler_output])


def encode(m, modality, call):
    """The tape of a wrapped model's feature method, and its features, item by item."""
    out, features = features_of(m, modality, call)
    if len(features) < sum(item.length for item in out.vlprune.items):
        pytest.skip("this transformers adds the separator of a video outside its feature method")
    return out.vlprune, features.split([item.length for item in out.vlprune.items])


def test_rows_are_the_tokens(model, inputs, case):
    """Every row through the projector and into the order of the prompt: the features the language model is given."""
    m, x = model(name_of(case)), inputs(case)
    adapter = find(m)
    plain = {modality: features_of(m, modality, call)[1] for modality, call in calls(x).items()}
    vlprune.wrap(m, at("projector", Look()))
    for modality, call in calls(x).items():
        tape, features = encode(m, modality, call)
        tokens = adapter.tokens(tape.call, tape.items, adapter.project(tape.rows))
        assert len(tokens) == len(features)
        assert torch.equal(plain[modality], torch.cat(features))
        for item, got, want in zip(tape.items, tokens, features, strict=True):
            picture = torch.ones(len(want), dtype=torch.bool) if item.newline is None else ~item.newline
            assert apart(got[picture], want[picture]) < 1e-5
            assert bool(got[~picture].isnan().all())
            if len(want[~picture]):
                assert bool((want[~picture] == m.model.image_newline).all())
            if item.rows is not None:
                assert torch.equal(item.rows[~picture], torch.full_like(item.rows[~picture], -1))
                assert len(item.rows[picture].unique()) == int(picture.sum())


def test_rows_are_means_of_their_patches(model, inputs, case):
    """`pool` maps patches to rows as the model does: a row holds, or averages, the patches it is pooled from."""
    m, x = model(name_of(case)), inputs(case)
    adapter, hidden = find(m), []
    module = getattr(adapter.tower, "vision_model", adapter.tower)
    vlprune.wrap(m, at("projector", Look()))
    handle = module.register_forward_hook(lambda _, args, out: hidden.append(out))
    try:
        for modality, call in calls(x).items():
            hidden.clear()
            tape = encode(m, modality, call)[0]
            out, layer = hidden[0], getattr(adapter, "layer", None)
            patches = out.last_hidden_state if layer is None else out.hidden_states[layer]
            patches = patches[None] if patches.dim() == 2 else patches[:, adapter.cls_tokens :]
            if name_of(case) == "mistral3":  # normalised first
                patches = m.model.multi_modal_projector.norm(patches)
            pooled = adapter.pool(tape.call, patches)
            parts = tape.rows.shape[-1] // patches.shape[-1]
            chunks = (parts, -1) if name_of(case) != "mistral3" else (-1, parts)
            assert apart(pooled, tape.rows.unflatten(-1, chunks).mean(1 if chunks[1] == -1 else 2)) < 1e-5
    finally:
        handle.remove()


def test_contexts_hold_what_belongs_to_their_picture(model, inputs, case):
    m, x, look = model(name_of(case)), inputs(case), Look()
    adapter = find(m)
    vlprune.wrap(m, at("projector", look))
    m(**x)
    assert len(look.seen) == len(vlprune.trace(m).pictures)
    blends = 0
    for ctx in look.seen:
        picture = torch.ones(ctx.tokens, dtype=torch.bool) if ctx.newline is None else ~ctx.newline
        if name_of(case) == "llava_onevision" and ctx.grids[0].frames > 1:
            blends += 1  # pooled behind the projector
            continue
        assert apart(adapter.project(ctx.encoder_features)[picture], ctx.features[picture]) < 1e-5
        assert not ctx.encoder_features[~picture].any()
        assert not any(getattr(ctx, name)[:, ~picture].any() for name in ("queries", "keys", "values"))
    assert blends == (2 if case == "llava_onevision+video" else 0)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_attention_equals_eager_weights(model, reference, inputs, case, attn):
    m, twin, x = model(name_of(case), attn), reference(name_of(case)), inputs(case)
    adapter, look = find(m), Look()
    names = adapter.offers(Stage("projector")) & {"received_attention", "cls_attention"}
    object.__setattr__(look, "needs", READS | names)
    vlprune.wrap(m, at("projector", look))
    for modality, call in calls(x).items():
        tape = encode(m, modality, call)[0]
        with eager_weights(twin) as weights:
            features_of(twin, modality, call)
        segments = adapter.segments(tape.call)
        if segments is not None:  # one masked call: the blocks on its diagonal
            weights = [weights[0].split(segments, -2)[i].split(segments, -1)[i] for i in range(len(segments))]
        for name in names:
            rows = [w.mean(2) if name == "received_attention" else w[:, :, 0] for w in weights]
            patches = torch.cat([r[..., adapter.cls_tokens :].transpose(1, 2) for r in rows], 1)
            want = adapter.tokens(tape.call, tape.items, adapter.pool(tape.call, patches))
            for i, item in enumerate(tape.items):
                got = m._vlprune.vision.fields(tape, i, frozenset({name}), want[i].device)[name].T
                picture = torch.ones(item.length, dtype=torch.bool) if item.newline is None else ~item.newline
                assert apart(got[picture], want[i][picture]) < 1e-6
                assert bool((got[picture] > 0).all())
                assert bool(got[~picture].isnan().all())


@dataclass(frozen=True)
class Three:
    """Rows of the three patches that receive most, and how much of each."""

    shares: tuple[float, ...] = (0.5, 0.4, 0.2)

    def __call__(self, received):
        rows = received.topk(3, dim=-1).indices
        return rows, torch.tensor(self.shares).expand(rows.shape)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_chosen_rows_equal_eager_weights(model, reference, inputs, case, attn):
    m, twin, x = model(name_of(case), attn), reference(name_of(case)), inputs(case)
    adapter, look = find(m), Look()
    object.__setattr__(look, "needs", READS | {"encoder_rows"})
    vlprune.wrap(m, at("projector", look))
    for modality, call in calls(x).items():
        tape = encode(m, modality, call)[0]
        with eager_weights(twin) as weights:
            features_of(twin, modality, call)
        segments = adapter.segments(tape.call)
        if segments is not None:
            weights = [weights[0].split(segments, -2)[i].split(segments, -1)[i] for i in range(len(segments))]
        sums = []
        for w in weights:
            w = w[..., adapter.cls_tokens :]  # [B, H, cls + P, P]
            rows, shares = Three()(w.mean((1, 2)))
            at_patch = (rows + adapter.cls_tokens)[:, None, :, None].expand(-1, w.shape[1], -1, w.shape[-1])
            sums.append((w.gather(2, at_patch) * shares[:, None, :, None]).sum(2).transpose(1, 2))
        want = adapter.tokens(tape.call, tape.items, adapter.pool(tape.call, torch.cat(sums, 1)))
        for i, item in enumerate(tape.items):
            read = m._vlprune.vision.fields(tape, i, frozenset({"encoder_rows"}), want[i].device)["encoder_rows"]
            got = read(Three()).T
            picture = torch.ones(item.length, dtype=torch.bool) if item.newline is None else ~item.newline
            assert apart(got[picture], want[i][picture]) < 1e-6
            assert bool((got[picture] > 0).all())
            assert bool(got[~picture].isnan().all())
            assert read(Three()) is read(Three()), "equal rules share the answer"
        assert len(tape.mixed) == 1


@pytest.mark.parametrize("scope", ["image", "prompt"])
def test_chosen_rows_behind_another_stage(model, inputs, family, scope):
    """They are of the tokens that are left, and of all pictures of a prompt. All rows, with CLS', are what is received."""
    m, x, look, patches = model(family), inputs(family), Look(), []
    cls = find(m).offers(Stage("1")) & {"cls_attention"}
    object.__setattr__(look, "needs", frozenset({"encoder_rows", "received_attention", "index"}) | cls)

    def everything(received):
        patches.append(received.shape[-1])
        return torch.arange(patches[-1]).expand(received.shape), torch.full(
            received.shape, 1 / (patches[-1] + len(cls))
        )

    first = Step(vlprune.Plan.parse("random:keep=0.5").steps[0].pruner, Stage("projector"), Budget(0.5))
    vlprune.wrap(m, Plan((first, Step(look, Stage("1"), Budget(0.25, scope)))))
    m(**x)
    assert look.seen
    for ctx in look.seen:
        rows = ctx.encoder_rows(everything)
        if cls:
            rows = rows + ctx.cls_attention / (patches[-1] + 1)
        assert rows.shape == ctx.received_attention.shape == (len(rows), len(ctx.index))
        assert torch.equal(rows.isnan(), ctx.received_attention.isnan())
        assert apart(rows.nan_to_num(), ctx.received_attention.nan_to_num()) < 1e-6


@contextmanager
def eager_weights(model):
    """What the feature block's attention returns as weights, call by call."""
    adapter = find(model)
    block = adapter.block_attention(adapter.blocks[adapter.feature_block])
    module = sys.modules[type(block).__module__]
    eager, weights = module.eager_attention_forward, []

    def spy(self, *args, **kwargs):
        out = eager(self, *args, **kwargs)
        if self is block:
            weights.append(out[1])
        return out

    module.eager_attention_forward = spy
    try:
        yield weights
    finally:
        module.eager_attention_forward = eager


# ---- stage "encoder", chosen once


def test_encoder_stage_equals_masking(model, reference, inputs, case):
    m, twin, x = model(name_of(case)), reference(name_of(case)), inputs(case)
    plain = decode(twin, x)[1]
    look = Look()
    vlprune.wrap(m, at("encoder", look))
    tokens, logits, cache = decode(m, x)
    trace = vlprune.trace(m)
    assert trace.kept < trace.visual
    alive = kept(trace, x["input_ids"], tiny.VISUAL)
    with masked(twin, alive):
        want_tokens, want_logits, _ = decode(twin, x)
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE
    assert apart(logits, plain) > MATTERS
    longest = int((alive[0] & x["attention_mask"].bool()).sum(1).max())
    assert {layer.keys.shape[2] for layer in cache.layers} == {longest + 7}


def test_encoder_stage_projects_survivors_only(model, inputs, case):
    m, x = model(name_of(case)), inputs(case)
    adapter, seen = find(m), []
    vlprune.wrap(m, at("encoder", Look()))
    handle = adapter.projector.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    try:
        for modality, call in calls(x).items():
            seen.clear()
            tape, features = encode(m, modality, call)
            blended = any(item.rows is None for item in tape.items)
            used = sum(len(tape.selections[i].kept) for i in range(len(tape.items)))
            assert seen == [(len(tape.rows) if blended else used) * tape.rows.shape[-1]]
            for i, f in enumerate(features):
                dropped = torch.ones(len(f), dtype=torch.bool).index_fill(0, tape.selections[i].kept, False)
                if tape.items[i].newline is not None:
                    dropped &= ~tape.items[i].newline
                if not blended and name_of(case) != "mistral3":  # two linear layers follow its merging
                    assert not f[dropped].any()
    finally:
        handle.remove()


def test_encoder_stage_merges_before_the_projector(model, inputs, family):
    m, x = model(family), inputs(family)
    adapter = find(m)
    look = Look(merge=True)
    vlprune.wrap(m, at("encoder", look))
    for modality, call in calls(x).items():
        look.seen.clear()
        tape, features = encode(m, modality, call)
        for i, f in enumerate(features):
            selection = tape.selections[i]
            want = adapter.project(selection.apply(look.seen[i].encoder_features))
            picture = torch.ones(len(selection.kept), dtype=torch.bool)
            if tape.items[i].newline is not None:
                picture = ~tape.items[i].newline[selection.kept]
            assert apart(f[selection.kept][picture], want[picture]) < 1e-5
    decode(m, x)
    assert vlprune.trace(m).kept < vlprune.trace(m).visual


# ---- stage "encoder", dropping between the blocks


@dataclass(frozen=True)
class Shed(EncoderPruner):
    """After each of the first two blocks the tokens of smallest first channel leave: uneven counts, then down to K."""

    name = "shed"
    needs = frozenset({"received_attention", "queries", "keys", "values"})

    def step(self, ctx, state):
        assert len(ctx.index) == ctx.tokens == len(ctx.features)
        assert bool((ctx.index[1:] > ctx.index[:-1]).all())
        assert all(getattr(ctx, name).shape[1] == ctx.tokens for name in self.needs)
        assert bool(torch.isfinite(ctx.received_attention).all())
        if ctx.layer > 1:
            return None, state
        x = ctx.features[:, 0].float()
        left = max(ctx.keep, int((x > x.mean()).sum())) if ctx.layer == 0 else ctx.keep
        chosen = x.topk(left).indices.sort().values
        LOG.append((ctx.layer, ctx.index[chosen]))
        return Selection(chosen), state


LOG = []  # (block that has run, tokens of an item that go on), item by item


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", PROGRESSIVE)
def test_tokens_leave_inside_the_tower(model, reference, inputs, case, attn):
    """Equal to hiding them as keys from the block on, in the features and in what is generated from them."""
    m, twin, x = model(name_of(case), attn), reference(name_of(case)), inputs(case)
    adapter = find(twin)
    vlprune.wrap(m, at("encoder", Shed()))
    for modality, call in calls(x).items():
        LOG.clear()
        tape, got = encode(m, modality, call)
        rows = rows_left(tape, LOG)
        with hidden_keys(twin, adapter, tape, rows):
            want = features_of(twin, modality, call)[1].split([len(f) for f in got])
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            left = tape.selections[i].kept
            assert len(left) == Budget(0.5).count(len(a)) < len(a)
            assert apart(a[left], b[left]) < 3e-5
            assert apart(a, b) > 1e-2  # the others are zero here
    tokens, logits, _ = decode(m, x)
    alive = kept(vlprune.trace(m), x["input_ids"], tiny.VISUAL)
    with encoded(twin, m, adapter, x), masked(twin, alive):
        want_tokens, want_logits, _ = decode(twin, x)
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE


def rows_left(tape, log):
    """{block that has run: [U] bool, the rows that went on}."""
    out = {}
    for layer in (0, 1):
        alive = torch.zeros(sum(item.length for item in tape.items), dtype=torch.bool)
        for item, tokens in zip(tape.items, [k for n, k in log if n == layer], strict=True):
            alive[item.rows[tokens]] = True
        out[layer] = alive
    return out


@contextmanager
def hidden_keys(model, adapter, tape, rows):
    """In block j, hide the patches that left behind earlier blocks from all queries; `model` must run eager."""
    saved = []
    for j, block in enumerate(adapter.blocks[: adapter.feature_block + 1]):
        left = [alive for layer, alive in rows.items() if layer < j]
        if not left:
            continue
        attention = adapter.block_attention(block)
        patches = torch.stack(left).all(0).repeat_interleave(adapter.group)
        saved.append((attention, attention.config))
        attention.config = TapConfig(attention.config, Hide(patches, adapter.cls_tokens))
    try:
        yield
    finally:
        for attention, config in saved:
            attention.config = config


class Hide:
    def __init__(self, patches, cls):
        self.patches, self.cls, self.at = patches, cls, 0

    def __call__(self, module, query, key, value, mask, *args, **kw):
        images, length = len(key), key.shape[2] - self.cls
        visible = self.patches.roll(-self.at)[: images * length].view(images, length)
        self.at = (self.at + images * length) % len(self.patches)
        visible = torch.cat([torch.ones(images, self.cls, dtype=torch.bool), visible], 1)
        hide = torch.zeros(images, 1, 1, visible.shape[1]).masked_fill(
            ~visible[:, None, None], torch.finfo(torch.float).min
        )
        return delegate(module, query, key, value, hide.expand(-1, -1, query.shape[2], -1), *args, **kw)


@contextmanager
def encoded(twin, m, adapter, x):
    """Lets the twin encode its pictures with the tokens hidden that leave in `m`."""
    inside = []
    for modality, call in calls(x).items():
        LOG.clear()
        tape = encode(m, modality, call)[0]
        rows, name = rows_left(tape, LOG), f"get_{modality}_features"
        method = getattr(type(twin.model), name).__get__(twin.model)

        def hiding(*args, method=method, tape=tape, rows=rows, **kwargs):
            if inside:  # the method for videos calls the one for images
                return method(*args, **kwargs)
            inside.append(True)
            with hidden_keys(twin, adapter, tape, rows):
                out = method(*args, **kwargs)
            inside.clear()
            return out

        hiding.__signature__ = inspect.signature(method)
        object.__setattr__(twin.model, name, hiding)
    try:
        yield
    finally:
        for modality in calls(x):
            twin.model.__dict__.pop(f"get_{modality}_features")


@pytest.mark.parametrize("family", sorted(set(tiny.FAMILIES) - {name_of(c) for c in PROGRESSIVE}))
def test_what_cannot_leave_inside_the_tower_is_refused(model, family):
    m = model(family)
    with pytest.raises(UnsupportedStage, match="chooses once"):
        vlprune.wrap(m, at("encoder", Shed()))
    assert not hasattr(m, "_vlprune")
    assert vlprune.supported(m, "fastervlm:keep=0.5:attention=received")
