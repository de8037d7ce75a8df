"""What one family alone does."""

from __future__ import annotations

from copy import deepcopy

import pytest
import tiny
import torch
import transformers as tf
from PIL import Image
from reference import MATTERS, TOLERANCE, apart, decode, kept, masked, text_model, uneven

import vlprune
from vlprune import Budget, Grid, Plan, Pruner, PruningError, Selection, Stage, Step, UnsupportedModel, UnsupportedStage
from vlprune.adapters.base import find
from vlprune.adapters.families import FAMILIES

MROPE = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}


def name_of(case):
    return case.partition("+")[0]


class Look(Pruner):
    """Keeps the first tokens, and what it was shown."""

    name = "look"
    needs = frozenset({"features", "newline"})

    def __init__(self):
        object.__setattr__(self, "seen", [])

    def select(self, ctx):
        self.seen.append(ctx)
        return Selection(torch.arange(ctx.keep))


def shown(m, x, stage="projector", keep=0.5):
    """The Contexts of a prompt's pictures, in its order if all sizes differ."""
    look = Look()
    with vlprune.pruning(m, Plan((Step(look, Stage(stage), Budget(keep)),))):
        m(**x)
    return look.seen


# ---- grids


def test_a_grid_per_tile(model, inputs):
    for family in ("llava", "internvl", "idefics3", "smolvlm", "gemma3", "paligemma", "mistral3"):
        assert [ctx.grids for ctx in shown(model(family), inputs(family))] == [(Grid(1, 4, 4),)] * 3


def test_llava_that_hands_over_its_cls_token(model, reference):
    """It stands in front of the grid, has no score, and keeps tokens from leaving in the tower."""
    m, twin = model("llava", strategy="full"), reference("llava", strategy="full")
    x = tiny.llava(strategy="full")[1]()
    assert {ctx.grids for ctx in shown(m, x)} == {(Grid(1, 1, 1), Grid(1, 4, 4))}
    with pytest.raises(UnsupportedStage, match="use stage 'projector'"):
        vlprune.wrap(m, "fastervlm:keep=5")
    for plan in ("fastervlm@projector:keep=5", "fastervlm@projector:keep=5:attention=received"):
        vlprune.wrap(m, plan)
        tokens, logits, _ = decode(m, x)
        trace = vlprune.trace(m)
        assert all(0 not in item.cells_kept() for item in trace.stages[0].items)
        with masked(twin, kept(trace, x["input_ids"], tiny.VISUAL)):
            want_tokens, want_logits, _ = decode(twin, x)
        assert torch.equal(tokens, want_tokens)
        assert apart(logits, want_logits) < TOLERANCE


def test_llava_with_pictures_of_any_size_is_refused():
    vision = {"model_type": "pixtral", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 12,
              "num_attention_heads": 2, "image_size": 64, "patch_size": 4}  # fmt: skip
    config = tf.LlavaConfig(
        vision_config=vision, text_config=dict(tiny.TEXT, model_type="llama"), image_token_id=tiny.IMG
    )
    with pytest.raises(UnsupportedModel, match="pictures of any size"):
        find(tiny.build(tf.LlavaForConditionalGeneration, config, "sdpa"))


def test_llava_next_grids_and_separators(model, inputs):
    """40 x 64 fits 2 x 2 crops of 4 x 4 patches; without padding 6 of 8 rows are left, 9 with the separator in each."""
    seen = shown(model("llava_next"), inputs("llava_next"))
    assert [ctx.grids for ctx in seen] == [
        (Grid(1, 4, 4), Grid(1, 6, 9)),
        (Grid(1, 4, 4), Grid(1, 8, 5)),
        (Grid(1, 4, 4), Grid(1, 4, 9)),
    ]
    for ctx in seen:
        rows = torch.arange(ctx.grids[1].tokens) % ctx.grids[1].width
        assert torch.equal(ctx.newline, torch.cat([torch.zeros(16, dtype=torch.bool), rows == ctx.grids[1].width - 1]))


def test_llava_next_draws_the_whole_picture_and_its_tiles(model, inputs):
    m = model("llava_next")
    vlprune.wrap(m, "uniform:keep=0.5")
    m(**inputs("llava_next"))
    trace = vlprune.trace(m)
    assert trace.pictures[0].grid == Grid(1, 4, 4)
    assert trace.pictures[0].grids == (Grid(1, 4, 4), Grid(1, 6, 9))
    assert trace.draw(Image.new("RGB", (64, 40))).width > 2 * 64


def test_onevision_pictures_and_videos(model, inputs):
    seen = shown(model("llava_onevision"), inputs("llava_onevision+video"))
    alone, several, video = (
        (Grid(1, 4, 4), Grid(1, 6, 9)),
        (Grid(1, 4, 4), Grid(1, 1, 1)),
        (Grid(3, 2, 2), Grid(1, 1, 1)),
    )
    assert sorted(ctx.grids for ctx in seen) == sorted([alone, video, several, several, video])
    assert {tuple(ctx.newline.tolist()) for ctx in seen if ctx.grids == video} == {(False,) * 12 + (True,)}


def test_qwen_grids_are_of_merged_patches(model, inputs):
    for family in ("qwen2_vl", "qwen2_5_vl"):
        seen = shown(model(family), inputs(f"{family}+video"))
        assert [ctx.grids for ctx in seen] == [(Grid(1, 2, 3),), (Grid(2, 2, 4),), (Grid(1, 4, 2),), (Grid(1, 3, 3),)]
    seen = shown(model("qwen3_vl"), inputs("qwen3_vl+video"))
    assert sorted(ctx.grids for ctx in seen) == sorted((Grid(1, *g),) for g in [(2, 3), (2, 4), (2, 4), (4, 2), (3, 3)])


# ---- LLaVA-OneVision: tokens that blend several patches


@pytest.mark.parametrize("stage", ["projector", "encoder", "2"])
def test_onevision_shrinks_large_pictures(model, reference, stage):
    m, twin = model("llava_onevision", aspect="anyres_max_1"), reference("llava_onevision", aspect="anyres_max_1")
    x = tiny.llava_onevision("sdpa", "anyres_max_1")[1]()
    plan = "fastervlm:keep=0.4:attention=received" if stage != "2" else "fastv:keep=0.4"
    assert shown(m, x)[0].grids == (Grid(1, 4, 4), Grid(1, 3, 5))  # 6 x 8 patches above the limit of 4 x 4
    vlprune.wrap(m, plan, stage=stage)
    tokens, logits, _ = decode(m, x)
    trace = vlprune.trace(m)
    assert trace.kept < trace.visual
    with masked(twin, kept(trace, x["input_ids"], tiny.VISUAL)):
        want_tokens, want_logits, _ = decode(twin, x)
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE


def test_onevision_scores_are_resampled_like_the_picture(model):
    """A constant stays one; a gradient across the picture stays one."""
    m = model("llava_onevision", aspect="anyres_max_1")
    x = tiny.llava_onevision("sdpa", "anyres_max_1")[1](batch=1)
    adapter = find(m)
    call = {"image_sizes": x["image_sizes"]}
    items = adapter.items("image", call, 0)
    assert items[0].rows is None
    ones = adapter.tokens(call, items, torch.ones(5 * 16, 1))[0][:, 0]
    assert torch.equal(ones.isnan(), items[0].newline)
    assert bool((ones[~items[0].newline] == 1).all())
    crops = torch.arange(8.0).expand(8, 8).unflatten(1, (2, 4)).unflatten(0, (2, 4)).transpose(1, 2).reshape(4, 16)
    tokens = adapter.tokens(call, items, torch.cat([torch.zeros(16), crops.flatten()])[:, None])[0][:, 0]
    ramp = tokens[16:].view(3, 5)[:, :4]
    assert torch.equal(ramp[0], ramp[2])
    assert bool((ramp.diff() > 1).all())


def test_onevision_merging_in_the_tower_is_refused_where_tokens_are_blends(model, inputs):
    m, x = model("llava_onevision"), inputs("llava_onevision+video")
    with (
        vlprune.pruning(m, "visionzip:keep=6:attention=received"),
        pytest.raises(PruningError, match="use stage 'projector'"),
    ):
        m(**x)
    with vlprune.pruning(m, "visionzip:keep=6:attention=received", stage="projector"):
        m(**x)


# ---- Qwen


def test_qwen2_5_window_order_is_the_librarys(model):
    m = model("qwen2_5_vl")
    adapter, tower = find(m), m.model.visual
    thw = torch.tensor([[1, 4, 6], [2, 10, 14], [1, 8, 8], [3, 2, 6]])
    if hasattr(tower, "get_window_index") and not hasattr(tower, "permute_input_for_window_attn"):  # before 5.10
        order = tower.get_window_index(thw)[0]
    else:
        from transformers.vision_utils import get_vision_window_index

        order = get_vision_window_index(thw, tower.spatial_merge_size, tower.window_size, tower.patch_size)[0]
    items = adapter.items("image", {"image_grid_thw": thw}, len(order))
    assert torch.equal(torch.cat([item.rows for item in items]), torch.as_tensor(order).argsort())


def test_qwen2_5_removal_at_layer_two_equals_masking_from_layer_two(model, reference, inputs):
    """A batch of two with different resolutions: logits of the prefill and of 16 greedy steps."""
    m, twin, x = model("qwen2_5_vl"), reference("qwen2_5_vl"), inputs("qwen2_5_vl")
    assert len(x["input_ids"]) == 2
    assert len({tuple(grid) for grid in x["image_grid_thw"].tolist()}) == 3
    vlprune.wrap(m, uneven("2"))
    prefill = m(**x).logits
    tokens, logits, _ = decode(m, x, steps=16)
    alive = kept(vlprune.trace(m), x["input_ids"], tiny.VISUAL)
    with masked(twin, alive):
        want_prefill = twin(**x).logits
        want_tokens, want_logits, _ = decode(twin, x, steps=16)
    assert list(alive) == [2]
    left = alive[2] & x["attention_mask"].bool()
    assert apart(prefill[left], want_prefill[left]) < TOLERANCE
    assert apart(logits, want_logits) < TOLERANCE
    assert torch.equal(tokens, want_tokens)
    assert tokens.shape == (2, 16)
    assert apart(twin(**x).logits[left], want_prefill[left]) > MATTERS
    assert apart(decode(twin, x, steps=16)[1], want_logits) > MATTERS


@pytest.mark.parametrize("family", sorted(MROPE))
def test_compact_positions_are_refused_where_they_have_no_meaning(model, family):
    with pytest.raises(UnsupportedStage, match="multi-dimensional positions"):
        vlprune.wrap(model(family), "uniform:keep=0.5", positions="compact")


@pytest.mark.parametrize("stages", [("projector",), ("1",), ("projector", "1")], ids="+".join)
def test_qwen3_deepstack_features_go_to_their_tokens(model, inputs, stages):
    """What is added behind layers 0 and 1 to a surviving token is what is added to it without pruning."""
    m, x = model("qwen3_vl"), inputs("qwen3_vl+video")
    text, added = text_model(m), []
    process = type(text)._deepstack_process

    def spy(self, hidden, masks, embeds):
        added.append(process(self, hidden, masks, embeds) - hidden)
        return added[-1] + hidden

    object.__setattr__(text, "_deepstack_process", spy.__get__(text))
    m(**x)
    text.__dict__.pop("_deepstack_process")
    full = added.copy()
    added.clear()
    vlprune.wrap(m, uneven(*stages))
    ours = text._deepstack_process

    def watch(hidden, masks, embeds):
        out = ours(hidden, masks, embeds)
        added.append(out - hidden)
        return out

    object.__setattr__(text, "_deepstack_process", watch)
    m(**x)
    text.__dict__["_deepstack_process"] = ours
    alive = kept(vlprune.trace(m), x["input_ids"], tiny.VISUAL)
    assert len(added) == len(full) == 2
    for layer in (0, 1):
        here = x["attention_mask"].bool()
        for k, left in alive.items():
            here = here & left if k <= layer else here
        for row in range(2):
            survivors = here[row].nonzero()[:, 0]
            assert apart(added[layer][row, -len(survivors) :], full[layer][row, survivors]) < 1e-5
    assert max(float(f.abs().max()) for f in full) > MATTERS


@pytest.mark.parametrize("stages", [("projector",), ("projector", "1", "3"), ("encoder",)], ids="+".join)
def test_qwen3_of_experts(model, reference, inputs, stages):
    m, twin, x = model("qwen3_vl", moe=True), reference("qwen3_vl", moe=True), inputs("qwen3_vl+video")
    vlprune.wrap(m, uneven(*stages))
    tokens, logits, _ = decode(m, x)
    with masked(twin, kept(vlprune.trace(m), x["input_ids"], tiny.VISUAL)):
        want_tokens, want_logits, _ = decode(twin, x)
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE


@pytest.mark.parametrize("stages", [("projector",), ("2",)], ids="+".join)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava_next"])
def test_chat_goes_on_with_the_pruned_cache(model, reference, inputs, family, stages):
    m, twin, x = model(family), reference(family), inputs(family, batch=1)
    vlprune.wrap(m, uneven(*stages))
    answers = []
    for one in (m, twin):
        alive = kept(vlprune.trace(m), x["input_ids"], tiny.VISUAL) if one is twin else {}
        with masked(one, alive):
            first = one.generate(**x, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
            ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13]])], 1)
            again = one.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values,
                                 max_new_tokens=6, do_sample=False)  # fmt: skip
        answers.append(again[:, -6:])
    assert torch.equal(*answers)


# ---- positions


def loop(m, x, counted=True, steps=7):
    """Greedy logits [B, steps, V] of a hand-written loop; `counted`: it says which positions its tokens have."""
    mask, logits, out = x.get("attention_mask"), [], None
    for step in range(steps):
        given = dict(x)
        if step:
            given = {"input_ids": logits[-1].argmax(-1, keepdim=True), "past_key_values": out.past_key_values}
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            if "token_type_ids" in x:
                given["token_type_ids"] = torch.zeros_like(given["input_ids"])
        if counted:
            at = (mask.cumsum(1) - 1).clamp(min=0) + (type(m).__name__ == "PaliGemmaForConditionalGeneration")
            given["position_ids"] = at[:, -1:] if step else at
        if mask is not None:
            given["attention_mask"] = mask
        out = m(**given, use_cache=True)
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f not in MROPE and f != "gemma3"])
def test_compact_positions_equal_the_shorter_prompt(model, reference, inputs, family):
    """The reference is fed the merged embeddings without the removed rows; decode steps go on from the shorter count."""
    m, twin, x = model(family), reference(family), inputs(family)
    vlprune.wrap(m, uneven("projector", positions="compact"))
    logits = loop(m, x)
    assert apart(decode(m, x, steps=7)[1], logits) < TOLERANCE
    alive = kept(vlprune.trace(m), x["input_ids"], tiny.VISUAL)[0] & x["attention_mask"].bool()
    seen = []
    note = lambda module, args, kw: seen.append(kw["inputs_embeds"])  # noqa: E731
    handle = text_model(twin).register_forward_pre_hook(note, with_kwargs=True)
    twin(**x)
    handle.remove()
    width = int(alive.sum(1).max())
    short = {"inputs_embeds": torch.zeros(2, width, seen[0].shape[-1]), "attention_mask": torch.zeros(2, width).long()}
    if "token_type_ids" in x:
        short["token_type_ids"] = torch.zeros(2, width).long()
    for row, left in enumerate(alive):
        n = int(left.sum())
        short["inputs_embeds"][row, width - n :], short["attention_mask"][row, width - n :] = seen[0][row, left], 1
    assert apart(logits, loop(twin, short)) < TOLERANCE
    vlprune.wrap(m, uneven("projector"))
    assert apart(loop(m, x), logits) > MATTERS, "the two numberings must differ, or the test shows nothing"


def test_compact_positions_are_refused_where_a_window_counts_them(model):
    windowed = tiny.llava(text="mistral", sliding_window=20)[0]
    for m in (model("gemma3"), windowed):
        with pytest.raises(UnsupportedStage, match="sliding window, which is measured in original positions"):
            vlprune.wrap(m, "uniform:keep=0.5", positions="compact")


@pytest.mark.parametrize("stages", [("projector",), ("2",)], ids="+".join)
def test_a_loop_that_counts_no_positions(model, reference, inputs, case, stages):
    """The model counts them itself: from its cache, or from what it noted of the pictures (M-RoPE)."""
    m, twin, x = model(name_of(case)), reference(name_of(case)), inputs(case, batch=1)
    x = {k: v for k, v in x.items() if k != "attention_mask"}
    vlprune.wrap(m, uneven(*stages))
    logits, plain = loop(m, x, counted=False), loop(twin, x, counted=False)
    with masked(twin, kept(vlprune.trace(m), x["input_ids"], tiny.VISUAL)):
        want = loop(twin, x, counted=False)
    assert apart(logits, want) < TOLERANCE
    assert apart(plain, want) > MATTERS


@pytest.mark.parametrize("stages", [("projector",), ("2",)], ids="+".join)
def test_right_padding(model, reference, inputs, family, stages):
    m, twin, x = model(family), reference(family), padded_right(inputs(family))
    vlprune.wrap(m, uneven(*stages))
    logits = m(**x).logits
    alive = kept(vlprune.trace(m), x["input_ids"], tiny.VISUAL)
    with masked(twin, alive):
        want = twin(**x).logits
    left = next(iter(alive.values())) & x["attention_mask"].bool()
    assert apart(logits[left], want[left]) < TOLERANCE


def padded_right(x):
    out = dict(x)
    for row, mask in enumerate(x["attention_mask"]):
        pads = int((mask == 0).sum())
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
            if name in x:
                out[name] = out[name].clone()
                out[name][row] = x[name][row].roll(-pads)
    return out


def test_text_alone_is_left_alone(model, family):
    m, ids = model(family), torch.arange(20, 32)[None]
    x = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family in ("gemma3", "paligemma"):
        x["token_type_ids"] = torch.zeros_like(ids)
    before = decode(m, x)
    vlprune.wrap(m, uneven("projector", "2"))
    after = decode(m, x)
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_a_copy_of_a_wrapped_model_is_its_own(model, inputs, family):
    m, x = model(family), inputs(family)
    plain = m(**x).logits
    vlprune.wrap(m, uneven("projector", "1"))
    pruned = m(**x).logits
    copy = deepcopy(m)
    vlprune.unwrap(m)
    assert torch.equal(m(**x).logits, plain)
    assert torch.equal(copy(**x).logits, pruned)
    assert vlprune.trace(copy).kept < vlprune.trace(copy).visual
    vlprune.unwrap(copy)
    assert torch.equal(copy(**x).logits, plain)


# ---- refusals


def test_a_stranger_is_told_who_is_known():
    with pytest.raises(UnsupportedModel, match="Qwen2_5_VLForConditionalGeneration"):
        find(torch.nn.Linear(2, 2))


def test_every_family_has_a_tiny_model(model):
    assert [type(find(model(f))).family for f in tiny.FAMILIES] == [adapter.family for adapter in FAMILIES]


def test_a_missing_field_is_refused_with_what_fits(model):
    for family in ("llava_onevision", "qwen2_5_vl", "gemma3", "mistral3"):
        with pytest.raises(UnsupportedStage, match=r"'cls_attention'.*\n.*received_attention.*Pruners that fit here"):
            vlprune.wrap(model(family), "fastervlm:keep=0.5")
