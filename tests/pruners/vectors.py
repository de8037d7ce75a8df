"""Golden vectors as cases: which tokens a rule keeps of a file's tensors, wherever these lie, however precise.

The tests of each method hold the vectors against the authors' results. Here the same inputs serve to compare our own
results with each other: on another device, in another dtype, cut out of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.pruners.golden import Golden, load, names
from vlprune.context import Choose, Context, Grid
from vlprune.plan import Plan
from vlprune.pruner import DecodePruner, EncoderPruner, Pruner
from vlprune.pruners.dart import Dart
from vlprune.pruners.debias import Debias
from vlprune.pruners.delta import Delta
from vlprune.pruners.fasa import Fasa
from vlprune.pruners.fastv import FastV
from vlprune.pruners.himap import HiMAP
from vlprune.pruners.pyramiddrop import PyramidDrop
from vlprune.pruners.sparsevlm import SparseVLM
from vlprune.pruners.spatten import SpAttenRelease
from vlprune.pruners.zoo_prune import ZooPrune
from vlprune.selection import Selection

Change = Callable[[Tensor], Tensor]  # what happens to every tensor of a Context
GRID = Grid(1, 24, 24)


@dataclass(frozen=True, eq=False)
class Case:
    """One choice. `contexts` are several for a rule that works layer by layer, each of all N tokens."""

    name: str
    rule: Pruner
    contexts: tuple[Context, ...]

    @property
    def pruner(self) -> str:
        return f"debias({self.rule.inner.name})" if isinstance(self.rule, Debias) else self.rule.name

    def run(self, change: Change = lambda t: t) -> list[int]:
        """Kept tokens after `change` of all inputs, by their numbers among the N; see `tokens`."""
        contexts = [changed(ctx, change) for ctx in self.contexts]
        if not isinstance(self.rule, EncoderPruner):
            (ctx,) = contexts
            step = isinstance(self.rule, DecodePruner)
            selection = self.rule.step(ctx, self.rule.start(ctx))[0] if step else self.rule.select(ctx)
            return tokens(selection.check(ctx.tokens, ctx.keep, self.rule.adaptive))
        values = contexts[0].values
        assert values is not None
        alive, state = torch.arange(values.shape[1], device=values.device), self.rule.start()
        for ctx in contexts:
            selection, state = self.rule.step(left(ctx, alive), state)
            if selection is not None:
                alive = alive[selection.kept]
        assert len(alive) == contexts[0].keep
        return alive.tolist()


def tokens(selection: Selection) -> list[int]:
    """Kept tokens, behind them those of one key head after the other."""
    heads = [] if selection.heads is None else selection.heads.kept.flatten().tolist()
    return selection.kept.tolist() + heads


def changed(ctx: Context, change: Change) -> Context:
    new: dict[str, Any] = {}
    for f in fields(ctx):
        value = getattr(ctx, f.name)
        if isinstance(value, Tensor):
            new[f.name] = change(value)
        elif isinstance(value, nn.Module):
            new[f.name] = module = copy.deepcopy(value)
            for p in module.parameters():
                p.data = change(p.data)
    return replace(ctx, **new)


def left(ctx: Context, alive: Tensor) -> Context:
    """The attention of those patches that are still there, as if the others had never been attended to."""
    out: dict[str, Any] = {n: t[:, alive] for n in ("queries", "keys", "values") if (t := getattr(ctx, n)) is not None}
    if ctx.cls_attention is not None:  # the file's logits: the softmax runs over what is left, CLS included
        out["cls_attention"] = (
            ctx.cls_attention[:, torch.cat([alive.new_zeros(1), alive + 1])].float().softmax(-1)[:, 1:]
        )
    return replace(ctx, **out)


@dataclass(frozen=True)
class Measured(ZooPrune):
    """ZOO-Prune with a file's sensitivities, or its directions."""

    scores: Tensor | None = None
    drawn: Tensor | None = None

    def sensitivity(self, ctx: Context) -> Tensor:
        assert ctx.features is not None
        return super().sensitivity(ctx) if self.scores is None else self.scores.to(ctx.features.device)

    def draw(self, ctx: Context, width: int) -> Tensor:
        return super().draw(ctx, width) if self.drawn is None else self.drawn


class Rows(nn.Module):
    """The field `encoder_rows` of crops whose attention [B, H, P, P] is at hand."""

    def __init__(self, attention: Tensor) -> None:
        super().__init__()
        self.attention = nn.Parameter(attention, requires_grad=False)

    def forward(self, choose: Choose) -> Tensor:
        rows, weights = choose(self.attention.mean(dim=(1, 2)))  # [B, R]
        picked = [a[:, r] * w[:, None] for a, r, w in zip(self.attention, rows, weights, strict=True)]  # [H, R, P]
        return torch.cat([p.sum(dim=1) for p in picked], dim=1)


class Given(nn.Module):
    """The same field whatever is asked for: a file's map."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores, requires_grad=False)

    def forward(self, choose: Choose) -> Tensor:
        return self.scores[None]


@dataclass(frozen=True)
class Visiting(Dart):
    """DART that visits its pivots in a file's order, as long as they are the file's."""

    order: tuple[int, ...] = ()

    def visit(self, visual: Tensor, text: Tensor) -> Tensor:
        pivots = super().visit(visual, text)
        return pivots.new_tensor(self.order) if sorted(self.order) == sorted(pivots.tolist()) else pivots


@dataclass(frozen=True)
class Calibrated(Fasa):
    """FASA with a file's chunks."""

    chunks: Tensor | None = None

    def dominant(self, ctx: Context) -> Tensor:
        assert self.chunks is not None
        assert ctx.keys is not None
        return self.chunks.to(ctx.keys.device)


class Projector(nn.Module):
    """The layout of the LLaVA projectors."""

    def __init__(self, g: Golden) -> None:
        super().__init__()
        self.linear_1, self.act, self.linear_2 = nn.Linear(*g["w1"].T.shape), nn.GELU(), nn.Linear(*g["w2"].T.shape)
        for layer, i in ((self.linear_1, "1"), (self.linear_2, "2")):
            layer.load_state_dict({"weight": g["w" + i], "bias": g["b" + i]})

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


def causal_attention(q: Tensor, k: Tensor) -> Tensor:
    """[H, L, d], [Hkv, L, d] -> [H, L, L]."""
    k = k.repeat_interleave(len(q) // len(k), 0)
    logits = q @ k.mT / q.shape[-1] ** 0.5
    return logits.masked_fill(~torch.ones(logits.shape[1:]).tril().bool(), -torch.inf).softmax(-1)


# ---- what each kind of file holds


def _debias(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    if "sys_len" not in g.params:  # masks and weights alone
        return
    p, start = g.params, g.params["sys_len"]
    size = p.get("image_size_wh")

    def context(**rows: Tensor) -> Context:
        cut = {name: t[..., start : start + p["n_visual"]] for name, t in rows.items()}
        return Context(keep=len(g["keep_sorted"]), grids=(GRID,), image_size=tuple(size) if size else None, **cut)

    if "attn_last_row" in g.arrays:
        if p["tag"] == "after":
            yield Debias(FastV(), trend="cubic", theta=p["pad_threshold"]), context(last_attention=g["attn_last_row"])
        else:
            yield Debias(FastV(), trend="off", padding="rows"), context(last_attention=g["attn_last_row"])
        return
    kappa = -float(g["weight_f64"][-1].log())
    if "attn_text_rows" in g.arrays:
        rows = g["attn_text_rows"].transpose(0, 1)
        yield Debias(HiMAP(), kappa=kappa, theta=p["pad_threshold"]), context(text_attention=rows)
    elif "attn_rater_rows" in g.arrays:  # all text is rater: embeddings of zeros
        rows = g["attn_rater_rows"].transpose(0, 1)
        ctx = context(text_attention=rows)
        flat = {
            "features": torch.zeros(p["n_visual"], 4),
            "embeddings": torch.zeros(p["n_visual"], 4),
            "text_embeddings": torch.zeros(len(rows), 4),
        }
        yield (
            Debias(SparseVLM(version="v2", heads=rows.shape[1]), kappa=kappa, padding="bilinear"),
            replace(ctx, **flat),
        )
    else:
        logits = (g["K"] @ g["q"].transpose(1, 2)).squeeze(-1) / g["q"].shape[-1] ** 0.5
        rule = Debias(PyramidDrop(), kappa=kappa, theta=p["pad_threshold"])
        yield rule, context(next_attention=logits.softmax(-1))


def _flowcut(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    yield (
        _rule("flowcut_llm"),
        Context(
            keep=len(g["keep_sorted"]),
            last_query=g["q_last"],
            last_value=g["v_last"],
            keys=g["k_visual"],
            values=g["v_visual"],
        ),
    )


def _holov(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    ctx = Context(keep=g.params["keep"], features=g["features"], cls_attention=g["attention"][None])
    for compat in ("corrected", "official"):
        yield _rule(f"holov:crops={g.params['num_crops']}:compat={compat}"), ctx


def _entropyprune(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    if "queries" in g.arrays:
        yield _rule("entropyprune"), Context(keep=g.params["keep"], queries=g["queries"])


def _zoo_prune_sads(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    if "keep" in g.params:
        yield Measured(scores=g["sensitivity"]), Context(keep=g.params["keep"], features=g["features"])
        return
    label, per_crop = g["frame_label"], g.params["keep_per_frame"]
    newline = label < 0
    labels = label[~newline].unique().tolist()
    sizes = [int((label == c).sum()) for c in labels]
    cell = torch.zeros_like(label)
    for i, c in enumerate(labels):
        cell[label == c] = sum(sizes[:i]) + torch.arange(sizes[i])
    yield Measured(scores=g["sensitivity"], crops="each"), Context(
        keep=per_crop * len(labels) + int(newline.sum()), grids=tuple(Grid(1, 1, size) for size in sizes),
        features=g["features"], newline=newline, index=cell,
    )  # fmt: skip


def _zoo_prune_rge(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    if "projected" not in g.arrays:  # sensitivities alone
        return
    rule = Measured(drawn=g["directions"], h=g.params["h"])
    yield (
        rule,
        Context(
            keep=g.params["keep"], features=g["projected"], encoder_features=g["features_in"][0], project=Projector(g)
        ),
    )


def _fastv(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    start, n = g.params["image_start"], g.params["image_len"]
    keep = int(((g["keep_hf"] >= start) & (g["keep_hf"] < start + n)).sum())
    yield FastV(), Context(keep=keep, last_attention=g["attn_last_query_row"][:, start : start + n])


def _pdrop(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    start, n = g.params["image_start"], g.params["image_len"]
    logits = (g["k_all"] @ g["q_last"][..., None]).squeeze(-1) / g.params["head_dim"] ** 0.5
    yield PyramidDrop(), Context(keep=g.params["keep_len"], next_attention=logits.softmax(-1)[:, start : start + n])


def _sparsevlm(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    start, n, m = (g.params[k] for k in ("image_start", "image_len", "text_len"))
    rows = g["attn_text_rows"][:, :, start : start + n].transpose(0, 1)
    embeddings = g["embeds"][start : start + n], g["embeds"][start + n : start + n + m]
    yield (
        SparseVLM(version="v1" if g.params["version"][0] == "1" else "v2"),
        Context(
            keep=int(g["keep_mask"].sum()) + len(g.arrays.get("recycled", ())),
            features=g.arrays.get("hidden", g["embeds"])[start : start + n],
            embeddings=embeddings[0],
            text_embeddings=embeddings[1],
            text_attention=rows,
        ),
    )


def _dart(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    p, start = g.params, g.params["image_start"]
    image, text = slice(start, start + p["image_len"]), slice(start + p["image_len"], p["seq_len"])
    order = tuple((g["pivot_visit_order"] - start).tolist())
    yield Visiting(p["pivot_image"], p["pivot_text"], order), Context(
        keep=len(g["keep_abs_sorted"]), keys=g["keys"][:, image], text_keys=g["keys"][:, text],
        features=g["hidden_normed"][image], text_features=g["hidden_normed"][text], norm=lambda h: h,
    )  # fmt: skip


def _divprune(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    if g.params["mode"] != "duplicates":  # its first pick is rounding noise, see the golden README
        yield _rule("divprune"), Context(keep=g.params["keep"], features=g["features"])


def _visionzip(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    keep = g.params["dominant_patches"] + g.params["contextual"]
    for hidden, attention, metric in zip(g["hidden"], g["cls_attn"], g["metric"], strict=True):
        yield (
            _rule(f"visionzip:contextual={g.params['contextual'] / keep}"),
            Context(keep=keep, features=hidden[1:], cls_attention=attention[:, 1:], keys=metric[None, 1:]),
        )


def _scope(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    for x, total in zip(g["features"], g["cls_attn_head_sum"], strict=True):
        yield (
            _rule(f"scope:alpha={g.params['alpha']}"),
            Context(keep=g.params["keep"], features=x, cls_attention=total[None]),
        )


def _vispruner(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    for x, attention in zip(g["features"], g["cls_attn"], strict=True):
        rule = _rule(f"vispruner:important={g.params['important_ratio']}")
        yield rule, Context(keep=g.params["keep"], features=x, cls_attention=attention)


def _fastervlm(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    for attention in g["cls_attn"]:
        yield _rule("fastervlm"), Context(keep=g.params["keep"], cls_attention=attention)


def _adaptinfer(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    if "pre" not in g.arrays:  # the search for layers
        return
    prefix, text = int(g["pre"]), int(g["n_text"])
    for i, budget in enumerate(g["budgets"].tolist()):
        rows = g[f"attn{i}"][0][:, -text:].transpose(0, 1)  # [M, H, S]
        cut = {"text_attention": rows[..., prefix:-text], "text_self_attention": rows[..., -text:]}
        yield _rule("adaptinfer"), Context(keep=min(budget, cut["text_attention"].shape[-1] - 1), **cut)


def _cdpruner(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    """The file's relevance is CLIP's, which no Context carries: here the words are a mean of tokens."""
    for x in g["features_projected"]:
        yield (
            _rule("cdpruner"),
            Context(keep=g.params["keep"], features=x, text_embeddings=x[::7].mean(0, keepdim=True)),
        )


def _kv(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    """Three rules for one cache, all tokens of which compete."""
    rows = causal_attention(g["q"], g["k"])
    window = f"tokens=all:window={g.params['window_share']}"
    ctx = Context(keep=g.params["capacity"], keys=g["k"])
    last = rows[:, -g.params["window"] :].transpose(0, 1)  # [w, H, L]
    yield _rule(f"snapkv:{window}:kernel={g.params['snapkv_kernel']}"), replace(ctx, text_attention=last)
    yield _rule(f"h2o:{window}"), replace(ctx, prompt_attention=rows.sum(1))
    yield _rule(f"streaming:{window}"), ctx


def _lookm(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    keep = g.params["hh"] + g.params["recent"]
    rule = _rule(f"lookm:tokens=all:window={g.params['recent'] / keep}")
    sums = causal_attention(g["q"], g["k"]).sum(1)
    yield rule, Context(keep=keep, prompt_attention=sums, keys=g["k"], is_text=g["text_mask"])


def _prumerge(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    """With the authors' number of tokens as a budget, and with their own count."""
    keys, query = g["k_proj"], g["q_proj_cls"]
    attention = (keys @ query / len(query) ** 0.5).softmax(0)[None, 1:]
    ctx = Context(keep=len(g["output"]), features=g["features_with_cls"][1:], final_cls_attention=attention,
                  final_keys=keys[None, 1:])  # fmt: skip
    plus = f"prumerge:plus={str(g.params['plus']).lower()}:neighbours={g.params['k_neighbours']}"
    yield _rule(plus), ctx
    yield _rule(f"{plus}:count=outliers"), ctx


def _hiprune(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    early, deep = g["shallow_colmean"][None, 1:], g["deep_colmean"][None, 1:]
    yield (
        _rule(f"hiprune:alpha={g.params['alpha']}"),
        Context(keep=g.params["keep"], grids=(GRID,), early_received_attention=early, received_attention=deep),
    )


def _dycoke(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    grid = Grid(g.params["frames"], 1, g.params["tokens_per_frame"])
    yield _rule("dycoke:compat=official"), Context(keep=len(g["out"]), grids=(grid,), features=g["features"])


def packed(crops: Tensor, columns: int, separator: float) -> Tensor:
    """A value per patch of the whole view and its crops, [1 + C, P], as one picture: [N], with a separator in each row."""
    side = round(crops.shape[1] ** 0.5)
    rows = crops[1:].view(-1, columns, side, side).transpose(1, 2).reshape(-1, columns * side)
    rows = torch.cat([rows, torch.full_like(rows[:, :1], separator)], 1)
    return torch.cat([crops[0], rows.flatten()])


def _hired(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    columns, rows = g.params["grid_w_h"]
    side = round(g.params["tokens_per_partition"] ** 0.5)
    early, late = (
        torch.stack([packed(x[:, h], columns, torch.nan) for h in range(g.params["heads"])])
        for x in (g["cls_attn_first_layer"], g["cls_attn_layer22"])
    )
    keep = int((1 + rows * columns) * side * side * g.params["budget_rate"])
    grids = (Grid(1, side, side), Grid(1, rows * side, columns * side + 1))
    rule = _rule(f"hired:parts=bands:alpha={g.params['alpha']}")
    yield rule, Context(keep=keep, grids=grids, early_cls_attention=early, cls_attention=late)


def _mustdrop(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    start, n = g.params["image_start"], g.params["image_len"]
    rows = g["attn_text_rows"][..., start : start + n].transpose(0, 1)
    rule = f"mustdrop:overall={g.params['global_thr']}:single={g.params['individual_thr']}"
    yield _rule(f"{rule}:count=thresholds"), Context(keep=n, text_attention=rows)
    yield _rule(rule), Context(keep=len(g["kept_image_idx"]), text_attention=rows)


def _delta(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    """One step for each sequence, whose pages are chosen whole; the last one may be short, and is always chosen."""
    page, count = int(g["page_size"]), int(g["subset_pages"])
    for logits, length, pages in zip(g["logits"], g["lengths"].tolist(), g["page_counts"].tolist(), strict=True):
        attention = logits.softmax(-1)[:, :length]  # -inf behind the length
        keep = min(count, pages) * page - (pages * page - length)
        yield Delta(page=page, recent=int(g["last_pages"])), Context(keep=keep, last_attention=attention)


def _fasa(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    budget = float(g["budget"])
    keep = int(budget) if budget >= 1 else int(budget * g["k"].shape[1])
    chunks = torch.stack([(dims // 2).unique() for dims in g["dims"]])
    yield Calibrated(pairing="adjacent", chunks=chunks), Context(keep=keep, last_query=g["q"], keys=g["k"], layer=1)


def _spatten(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    """Layer by layer; a file's logits are keys [H, S, q], seen by queries of ones."""
    recent = int(g["recent"]) - int(g["num_coming"])
    keep = int(g["start"]) + int(g["important"]) + recent
    for logits in g["logits"]:
        rule = SpAttenRelease(tokens="all", first=int(g["start"]), window=recent / keep)
        yield rule, Context(keep=keep, keys=logits.mT, query_sum=torch.ones(logits.shape[:2]))


def _vflowopt(g: Golden) -> Iterator[tuple[Pruner, Context]]:
    """The map of one crop, of which half the tokens stay; a picture whose tokens are recycled; two decoder stages."""
    grid = Grid(1, *g["entropy"].shape)
    rule = _rule(f"vflowopt:threshold={float(g['t'])}")
    yield rule, Context(keep=grid.tokens // 2, grids=(grid,), encoder_rows=Rows(g["attn"]))

    across = int(g["merge_local_w"])
    grids = (Grid(1, 27, 27), Grid(1, (len(g["merge_map"]) - 27 * 27) // across, across))
    rule = _rule(f"vflowopt:cell={float(g['merge_m'])}")
    yield (
        rule,
        Context(
            keep=len(g["merge_keep"]),
            grids=grids,
            features=g["merge_features"],
            newline=g["merge_map"] == 1.0,
            encoder_rows=Given(g["merge_map"]),
        ),
    )

    n, text = len(g["llm_map"]), int(g["llm_start"]) + int(g["llm_tail"])
    index = torch.arange(n)
    for layer in range(2):
        keep, scores = len(g[f"llm_seq_keep{layer}"]) - text, g["llm_map"][index]
        ctx = Context(keep=keep, index=index, grids=(Grid(1, 1, n),), encoder_rows=Given(scores), layer=9 * (layer + 1))
        yield rule, ctx
        index = _visual(g, layer)


def _visual(g: Golden, layer: int) -> Tensor:
    """The visual tokens that a file's decoder stage keeps, from 0."""
    at, start = g[f"llm_seq_keep{layer}"], int(g["llm_start"])
    return at[(at >= start) & (at < start + len(g["llm_map"]))] - start


BUILDERS: dict[str, Callable[[Golden], Iterator[tuple[Pruner, Context]]]] = {
    "adaptinfer": _adaptinfer,
    "delta": _delta,
    "fasa": _fasa,
    "spatten_release": _spatten,
    "vflowopt": _vflowopt,
    "attention_debias": _debias,
    "flowcut_llm": _flowcut,
    "holov": _holov,
    "entropyprune": _entropyprune,
    "zoo_prune_sads": _zoo_prune_sads,
    "zoo_prune_rge": _zoo_prune_rge,
    "base_cdpruner": _cdpruner,
    "base_dart": _dart,
    "base_divprune": _divprune,
    "base_dycoke": _dycoke,
    "base_fastervlm": _fastervlm,
    "base_fastv": _fastv,
    "base_hiprune": _hiprune,
    "base_hired": _hired,
    "base_kv_lookm": _lookm,
    "base_kv_snap": _kv,
    "base_mustdrop": _mustdrop,
    "base_pdrop": _pdrop,
    "base_prumerge": _prumerge,
    "base_scope": _scope,
    "base_sparsevlm": _sparsevlm,
    "base_visionzip": _visionzip,
    "base_vispruner": _vispruner,
}


def _rule(text: str) -> Pruner:
    return Plan.parse(text, 2).steps[0].pruner


def _layered() -> Iterator[Case]:
    """FlowCut's schedules: the same picture through all layers of a tower."""
    for name in names("flowcut_sched"):
        g = load(name)
        for b in range(len(g["keep"])):
            contexts = tuple(
                Context(keep=g["keep"].shape[1], cls_attention=logits, cls_value=v[:, 0], values=v[:, 1:], layer=i,
                        layers=g.params["n_layers"])
                for i, (logits, v) in enumerate(zip(g["cls_logits"][:, b], g["values"][:, b], strict=True))
            )  # fmt: skip
            yield Case(f"{name}/{b}", _rule("flowcut"), contexts)
    for name in names("flowcut_qwen"):
        g = load(name)
        contexts = tuple(
            Context(
                keep=g.params["vision_target_patches"],
                queries=q,
                keys=k,
                values=v,
                layer=i,
                layers=g.params["n_blocks"],
            )
            for i, (q, k, v) in enumerate(zip(g["q"], g["k"], g["v"], strict=True))
        )
        yield Case(name, _rule("flowcut:variant=mean_query:last=1"), contexts)


def cases() -> list[Case]:
    """All of them, by file."""
    found = list(_layered())
    for prefix, build in BUILDERS.items():
        for name in names(prefix):
            built = list(build(load(name)))
            found += [
                Case(f"{name}/{i}" if len(built) > 1 else name, rule, (ctx,)) for i, (rule, ctx) in enumerate(built)
            ]
    return found
