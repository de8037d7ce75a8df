"""What every pruner answers on Contexts of all kinds: K indices, increasing, in range, the same each time."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from laws.every import every_pruner

from vlprune import Context, DecodePruner, EncoderPruner, Grid, Pruner, Selection
from vlprune.context import FIELDS

H, HKV, WIDTH, D, DV, M, LAYERS = 4, 2, 8, 12, 10, 5, 6
GRIDS = {
    "one token": (Grid(1, 1, 1),),
    "row": (Grid(1, 1, 7),),
    "square": (Grid(1, 6, 6),),
    "oblong": (Grid(1, 5, 9),),
    "video": (Grid(3, 4, 4),),
    "base and crops": (Grid(1, 4, 4), Grid(1, 3, 8)),
    "24 x 24": (Grid(1, 24, 24),),
}
PRUNERS = [pytest.param(p, id=name) for name, p in every_pruner().items()]
CHOOSERS = [p for p in PRUNERS if not isinstance(p.values[0], EncoderPruner | DecodePruner)]


def weighted(row: torch.Tensor, choose: Any) -> torch.Tensor:
    """Rows that are all alike, [H, N] each: in sum this one, as often as the weights say."""
    return row * choose(row.mean(0, keepdim=True))[1].sum()


def context(
    grids: tuple[Grid, ...], keep: int, make: Any = None, text: int = M, index: Any = None, **more: Any
) -> Context:
    """All fields a Context can have, filled by `make(*shape)`, random by default; attention rows are positive."""
    g = torch.Generator().manual_seed(7)
    make = make or (lambda *shape: torch.randn(*shape, generator=g))
    cells = sum(grid.tokens for grid in grids)
    n = cells if index is None else len(index)

    def rows(*shape: int) -> torch.Tensor:
        x = make(*shape).float().abs()
        return x / (1 + x.sum(-1, keepdim=True))

    weight = torch.randn(D, DV, generator=torch.Generator().manual_seed(1))
    filled: dict[str, Any] = {
        "grids": grids,
        "index": index,
        "features": make(n, D),
        "encoder_features": make(n, DV),
        "embeddings": make(n, D),
        "text_features": make(text, D),
        "text_embeddings": make(text, D),
        "queries": make(H, n, WIDTH),
        "keys": make(HKV, n, WIDTH),
        "values": make(HKV, n, WIDTH),
        "last_query": make(H, WIDTH),
        "last_value": make(HKV, WIDTH),
        "text_keys": make(HKV, text, WIDTH),
        "query_sum": make(H, WIDTH),
        "cls_attention": rows(H, n),
        "cls_value": make(H, WIDTH),
        "received_attention": rows(H, n),
        "last_attention": rows(H, n),
        "next_attention": rows(H, n),
        "text_attention": rows(text, H, n),
        "text_self_attention": rows(text, H, text),
        "prompt_attention": rows(H, n),
        "early_cls_attention": rows(H, n),
        "early_received_attention": rows(H, n),
        "final_cls_attention": rows(1, n),
        "final_keys": make(H, n, WIDTH),
        "encoder_rows": partial(weighted, rows(H, n)),
        "guide": make(n),
        "is_text": torch.arange(n) % 3 == 0,
        "padding": torch.zeros(n, dtype=torch.bool),
        "newline": torch.zeros(n, dtype=torch.bool),
        "image_size": (40, 30),
        "layer": 2,
        "layers": LAYERS,
        "generator": torch.Generator().manual_seed(0),
        "project": lambda x: x @ weight.T.to(x.dtype),
        "norm": lambda x: torch.nn.functional.rms_norm(x, x.shape[-1:]),
    }
    missing = FIELDS - filled.keys()
    assert not missing, f"Context has {sorted(missing)}, which these tests do not fill yet"
    return Context(keep=keep, **(filled | more))


def shown(pruner: Pruner, ctx: Context) -> Context:
    """Only what the pruner asked for: whatever else it reads is missing on a model as well."""
    hidden = {name: () if name == "grids" else None for name in FIELDS - pruner.needs - {"index", "grids", "newline"}}
    return Context(**{**vars(ctx), **hidden})


def well_formed(pruner: Pruner, ctx: Context) -> Selection:
    n = ctx.tokens
    first = pruner.select(shown(pruner, ctx)).check(n, ctx.keep, pruner.adaptive)
    ctx.generator.manual_seed(0)
    second = pruner.select(shown(pruner, ctx))
    assert torch.equal(first.kept, second.kept), "two calls with one Context must agree"
    if first.merge is not None:
        m = first.merge
        assert pruner.merges, "a pruner that merges says so"
        assert m.source.dtype == m.slot.dtype == torch.int64
        assert 0 <= int(m.source.min()) <= int(m.source.max()) < n
        assert 0 <= int(m.slot.min()) <= int(m.slot.max()) < len(first.kept)
        assert m.weight.isfinite().all()
        assert torch.equal(first.apply(ctx.features), second.apply(ctx.features))
        assert first.apply(ctx.features).shape == (len(first.kept), D)
    if first.scores is not None:
        assert first.scores.shape == (n,)
    if first.heads is not None:
        assert torch.equal(first.heads.kept, second.heads.kept)
        rows = first.heads.apply(ctx.values)
        assert rows.shape == (*first.heads.kept.shape, WIDTH)
        assert rows.dtype == ctx.values.dtype
        assert rows.isfinite().all()
    return first


@pytest.mark.parametrize("pruner", CHOOSERS)
@pytest.mark.parametrize("name", GRIDS)
def test_any_grid_and_any_count(pruner, name):
    n = sum(g.tokens for g in GRIDS[name])
    some = {64} if n > 100 else {1, 2, n // 9, n // 3, n // 2 + 1, n - 1, n}
    for keep in sorted(some & set(range(1, n + 1))):
        well_formed(pruner, context(GRIDS[name], keep))


@pytest.mark.parametrize("pruner", CHOOSERS)
def test_all_of_them(pruner):
    ctx = context(GRIDS["oblong"], 45)
    assert pruner.adaptive or torch.equal(well_formed(pruner, ctx).kept, torch.arange(45))


@pytest.mark.parametrize("pruner", CHOOSERS)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_nothing_to_tell_tokens_apart(pruner, value):
    for keep in (1, 5, 35, 36):
        well_formed(pruner, context(GRIDS["square"], keep, make=lambda *shape: torch.full(shape, value)))


@pytest.mark.parametrize("pruner", CHOOSERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pruner, dtype):
    g = torch.Generator().manual_seed(3)
    for keep in (1, 9, 36):
        ctx = context(GRIDS["square"], keep, make=lambda *shape: torch.randn(*shape, generator=g).to(dtype))
        merged = well_formed(pruner, ctx).apply(ctx.features)
        assert merged.dtype == dtype


@pytest.mark.parametrize("pruner", CHOOSERS)
def test_views(pruner):
    """The engine hands out slices and transposes."""
    g = torch.Generator().manual_seed(7)

    def strided(*shape: int) -> torch.Tensor:
        x = torch.randn(*shape, generator=g)
        wide = torch.zeros(*(s + 2 for s in reversed(shape)))
        view = wide.permute(*reversed(range(len(shape))))[tuple(slice(1, s + 1) for s in shape)]
        return view.copy_(x)

    keep = 9
    plain, views = context(GRIDS["square"], keep), context(GRIDS["square"], keep, make=strided)
    assert not views.features.is_contiguous()
    assert torch.equal(well_formed(pruner, plain).kept, well_formed(pruner, views).kept)


@pytest.mark.parametrize("pruner", CHOOSERS)
def test_after_an_earlier_stage(pruner):
    """Tokens left on some cells of the grid; `index` says which."""
    index = torch.tensor([0, 1, 4, 7, 8, 12, 13, 20, 22, 30, 31, 35])
    for keep in (1, 4, 11, 12):
        well_formed(pruner, context(GRIDS["square"], keep, index=index))


@pytest.mark.parametrize("pruner", CHOOSERS)
def test_inputs_are_left_alone(pruner):
    ctx = context(GRIDS["square"], 9)
    before = {k: v.clone() for k, v in vars(ctx).items() if isinstance(v, torch.Tensor)}
    pruner.select(shown(pruner, ctx))
    for name, value in before.items():
        assert torch.equal(getattr(ctx, name), value), name


@pytest.mark.parametrize("pruner", [p for p in PRUNERS if isinstance(p.values[0], EncoderPruner)])
@pytest.mark.parametrize("name", ["square", "oblong", "24 x 24"])
def test_leaving_a_tower(pruner, name):
    """Asked after every layer, it ends with K tokens, in reading order, the same each time."""
    grids = GRIDS[name]
    n = sum(g.tokens for g in grids)
    for keep in (1, n // 9, n // 2, n - 1):
        runs = []
        for _ in range(2):
            index, state = torch.arange(n), pruner.start()
            for layer in range(LAYERS):
                g = torch.Generator().manual_seed(layer)
                keys, values = torch.randn(
                    2, H, len(index), WIDTH, generator=g
                )  # towers have as many key heads as query heads
                ctx = context(grids, keep, index=index, layer=layer, keys=keys, values=values)
                selection, state = pruner.step(shown(pruner, ctx), state)
                if selection is not None:
                    kept = selection.kept
                    assert kept.dtype == torch.int64
                    assert bool((kept[1:] > kept[:-1]).all())
                    assert 0 <= int(kept[0]) <= int(kept[-1]) < len(index)
                    index = index[kept]
            assert len(index) == keep or (pruner.adaptive and len(index) < keep)
            runs.append(index)
        assert torch.equal(*runs)


@pytest.mark.parametrize("pruner", [p for p in PRUNERS if isinstance(p.values[0], DecodePruner)])
def test_choosing_step_by_step(pruner):
    grids = GRIDS["24 x 24"]
    n = 576
    focal = pruner.focal(LAYERS)
    assert list(focal) == sorted(set(focal))
    assert all(0 <= i < LAYERS for i in focal)
    runs = []
    for _ in range(2):
        state = pruner.start(shown(pruner, context(grids, 64, layer=focal[-1])))
        chosen = []
        for step in range(6):
            g = torch.Generator().manual_seed(step)
            ctx = context(
                grids, 64, make=lambda *shape, g=g: torch.randn(*shape, generator=g), layer=focal[step % len(focal)]
            )
            selection, state = pruner.step(shown(pruner, ctx), state)
            chosen.append(selection.check(n, 64, pruner.adaptive).kept)
        runs.append(torch.cat(chosen))
    assert torch.equal(*runs)
