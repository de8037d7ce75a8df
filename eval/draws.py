"""Random inputs for pruners, of a published model's shape, and one pruner's choice on them."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import vlprune
from vlprune import Context, DecodePruner, EncoderPruner, Grid, Plan, Pruner, Selection
from vlprune.errors import PruningError, SpecError
from vlprune.ops import attention_rows, received_attention

PER_TOKEN = {"index": 0, "features": 0, "embeddings": 0, "encoder_features": 0, "padding": 0, "newline": 0,
             "queries": 1, "keys": 1, "values": 1, "cls_attention": 1, "received_attention": 1, "last_attention": 1,
             "next_attention": 1, "text_attention": 2, "prompt_attention": 1, "early_cls_attention": 1,
             "early_received_attention": 1, "final_cls_attention": 1, "final_keys": 1}  # fmt: skip  # field -> its dimension of N
SHARPNESS = 2.0  # standard deviation of the logits: attention neither flat nor on one token
PICTURE = (640, 480)  # what a pruner that looks for padding is told


@dataclass(frozen=True)
class Shape:
    """Widths of a model; the defaults are LLaVA-1.5-7B's. The tower's last block is not run, as nobody reads it."""

    text: int = 64  # M
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    d: int = 128
    model: int = 4096  # D
    tower_layers: int = 24
    tower_heads: int = 16
    tower_d: int = 64
    tower: int = 1024  # Dv


# ---- pruners


def every_pruner() -> list[str]:
    """Texts of all registered pruners; one that wraps another stands there with every pruner it takes."""
    importlib.import_module("vlprune.pruners")
    texts = []
    for name, cls in sorted(vlprune.PRUNERS.items()):
        if not any(f.name == "inner" for f in dataclasses.fields(cls)):
            texts.append(name)
            continue
        for inner, inner_cls in sorted(vlprune.PRUNERS.items()):
            if inner_cls is not cls and _takes(f"{name}({inner})"):
                texts.append(f"{name}({inner})")
    return texts


def _takes(text: str) -> bool:
    try:
        Plan.parse(text, 2)
    except SpecError:
        return False
    return True


def read(text: str) -> tuple[Pruner, str]:
    """A pruner and the stage it stands at, of a text such as "zoo_prune:rank=128" or "debias(fastv)@2"."""
    step = Plan.parse(text, 2).steps[0]
    return step.pruner, str(step.stage)


# ---- inputs


def grids(n: int) -> tuple[Grid, ...]:
    """The tiles of a multiple of 576 tokens, as LLaVA-NeXT cuts a picture; else one grid as square as n allows."""
    if n % 576 == 0:
        return (Grid(1, 24, 24),) * (n // 576)
    height = next(h for h in range(math.isqrt(n), 0, -1) if n % h == 0)
    return (Grid(1, height, n // height),)


@dataclass(eq=False)
class Maker:
    """Random Contexts. One seed gives the same numbers in every dtype, up to rounding to it.

    Attention rows are made of queries and keys already in that dtype, and are themselves float32: what a model in half
    precision hands over.
    """

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    modules: dict[str, nn.Module] = field(default_factory=dict)

    def project(self) -> nn.Module:
        """A LLaVA projector with random weights."""
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

        s = self.shape
        tower = {"hidden_size": s.tower, "num_attention_heads": s.tower_heads}
        text = {"hidden_size": s.model, "num_attention_heads": s.heads}
        config = transformers.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **tower}, text_config={"model_type": "llama", **text}
        )
        return self._module("project", lambda: LlavaMultiModalProjector(config))

    def norm(self) -> nn.Module:
        return self._module("norm", lambda: nn.RMSNorm(self.shape.model, eps=1e-5))

    def _module(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        if name not in self.modules:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                module = make().requires_grad_(False)
            self.modules[name] = module.to(self.device, self.dtype)
        return self.modules[name]

    @torch.no_grad()
    def context(self, pruner: Pruner, stage: str, n: int, keep: int, seed: int) -> Context:
        """What `pruner` gets to see of n tokens at `stage`.

        Raises:
            SpecError: it needs a field that is not known here.
        """
        s, needs = self.shape, frozenset(pruner.needs)
        early = stage in ("encoder", "projector")
        heads, kv, d = (s.tower_heads, s.tower_heads, s.tower_d) if early else (s.heads, s.kv_heads, s.d)
        generator = torch.Generator(self.device).manual_seed(seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=self.device).to(self.dtype)

        out: dict[str, Any] = {}
        if needs & {"encoder_features", "project"}:
            out["encoder_features"] = draw(n, s.tower)
        if "features" in needs:
            x = out.get("encoder_features")
            out["features"] = draw(n, s.tower if stage == "encoder" else s.model) if x is None else self.project()(x)
        rows = {"embeddings": n, "text_features": s.text, "text_embeddings": s.text}
        out |= {name: draw(count, s.model) for name, count in rows.items() if name in needs}
        if needs & ATTENTION:
            q, k = draw(heads, n + s.text, d) * SHARPNESS, draw(kv, n + s.text, d)
            out |= _rows(needs, q, k, n)
        if "values" in needs or "last_value" in needs:
            out["values"], out["last_value"] = draw(kv, n, d), draw(kv, d)
        if needs & {"cls_attention", "cls_value"}:
            q, k = draw(1, heads, 1, d) * SHARPNESS, draw(1, heads, 1 + n, d)
            out["cls_attention"] = attention_rows(q, k, scale=d**-0.5)[0, :, 0, 1:]
            out["cls_value"] = draw(heads, d)
        if "early_received_attention" in needs:
            q, k = draw(1, heads, n, d) * SHARPNESS, draw(1, heads, n, d)
            out["early_received_attention"] = received_attention(q, k, scale=d**-0.5, heads="none")[0]
        if "guide" in needs:
            out["guide"] = draw(n)
        if "encoder_rows" in needs:
            q, k = draw(1, heads, n, d) * SHARPNESS, draw(1, heads, n, d)
            out["encoder_rows"] = partial(_encoder_rows, q, k)
        if needs & {"early_cls_attention", "final_cls_attention", "final_keys"}:
            q, k = draw(heads, 1, d) * SHARPNESS, draw(heads, 1 + n, d)
            out["early_cls_attention"] = attention_rows(q[None], k[None], scale=d**-0.5)[0, :, 0, 1:]
            q, joined = q.transpose(0, 1).flatten(1)[None, None], k.transpose(0, 1).flatten(1)[None, None]
            out["final_cls_attention"] = attention_rows(q, joined, scale=(heads * d) ** -0.5)[0, 0, :, 1:]
            out["final_keys"] = k[:, 1:]
        out |= {"image_size": PICTURE, "generator": torch.Generator()}
        if "project" in needs:
            out["project"] = self.project()
        if "norm" in needs:
            out["norm"] = self.norm()
        unknown = needs - out.keys() - OPTIONAL - {"grids"}
        if unknown:
            raise SpecError(f"scoring does not know how to draw {', '.join(sorted(unknown))} for {pruner.name}")
        layers = s.tower_layers if isinstance(pruner, EncoderPruner) else s.layers
        layer = int(stage) if stage.isdigit() else None
        shown = {k: v for k, v in out.items() if k in needs}
        return Context(keep=keep, grids=grids(n), layer=layer, layers=layers, **shown)


ATTENTION = frozenset({"queries", "keys", "last_query", "text_keys", "query_sum", "last_attention", "next_attention",
                       "text_attention", "text_self_attention", "prompt_attention", "received_attention"})  # fmt: skip
OPTIONAL = frozenset({"index", "padding", "newline"})  # None where nothing was removed and nothing is padded


def _encoder_rows(q: Tensor, k: Tensor, choose: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """The field of that name where the tower attends with queries and keys [1, H, N, d] to all N tokens at once."""
    scale = q.shape[-1] ** -0.5
    rows, weights = choose(received_attention(q, k, scale=scale))
    return (attention_rows(q[:, :, rows[0]], k, scale=scale)[0] * weights[0, :, None]).sum(dim=1)


def _rows(needs: frozenset[str], q: Tensor, k: Tensor, n: int) -> dict[str, Any]:
    """Fields made of one layer's queries [H, N + M, d] and keys [Hkv, N + M, d], visual tokens first, then text."""
    scale = q.shape[-1] ** -0.5
    out: dict[str, Any] = {"queries": q[:, :n], "keys": k[:, :n], "last_query": q[:, -1], "text_keys": k[:, n:]}
    if needs & {"last_attention", "next_attention"}:
        out["last_attention"] = attention_rows(q[None, :, -1:], k[None], scale=scale, columns=(0, n))[0, :, 0]
        out["next_attention"] = out["last_attention"]
    if needs & {"text_attention", "text_self_attention"}:
        limit = torch.arange(n, k.shape[1], device=k.device)
        rows = attention_rows(q[None, :, n:], k[None], scale=scale, limit=limit)[0].transpose(0, 1)  # [M, H, N + M]
        out["text_attention"], out["text_self_attention"] = rows[..., :n], rows[..., n:]
    if "query_sum" in needs:
        out["query_sum"] = q.float().sum(dim=1)
    if "prompt_attention" in needs:
        every = torch.arange(k.shape[1], device=k.device)
        sums = [attention_rows(q[None, :, some], k[None], scale=scale, limit=some, rows="sum", columns=(0, n))[0]
                for some in every.split(256)]  # fmt: skip
        out["prompt_attention"] = torch.stack(sums).sum(dim=0)
    if "received_attention" in needs:
        out["received_attention"] = received_attention(q[None, :, :n], k[None, :, :n], scale=scale, heads="none")[0]
    return out


# ---- one choice


@dataclass(eq=False)
class Task:
    """One pruner on one item, and everything it is to see."""

    pruner: Pruner
    n: int
    keep: int
    contexts: list[Context]  # one; of a rule inside the tower one per layer, of the tokens the layers before it left
    state: Any = None  # of a per-step rule

    @staticmethod
    def make(maker: Maker, text: str, n: int, keep: int, seed: int) -> Task:
        pruner, stage = read(text)
        if isinstance(pruner, EncoderPruner):
            # the engine asks up to the block before the one that the projector reads, the last but one
            drawn = [
                replace(maker.context(pruner, stage, n, keep, seed + 1000 * layer), layer=layer)
                for layer in range(maker.shape.tower_layers - 2)
            ]
            return Task(pruner, n, keep, _as_they_leave(pruner, drawn))
        ctx = maker.context(pruner, stage, n, keep, seed)
        if isinstance(pruner, DecodePruner):
            last = replace(ctx, layer=max(pruner.focal(maker.shape.layers)))
            return Task(pruner, n, keep, [last], pruner.start(last))
        return Task(pruner, n, keep, [ctx])

    def run(self) -> list[Selection]:
        """The choice; of a rule inside the tower every one of its choices, each of the tokens that were left."""
        pruner = self.pruner
        if isinstance(pruner, DecodePruner):
            return [pruner.step(self.contexts[0], self.state)[0]]
        if not isinstance(pruner, EncoderPruner):
            return [pruner.select(self.contexts[0])]
        state, choices = pruner.start(), []
        for ctx in self.contexts:
            selection, state = pruner.step(ctx, state)
            if selection is not None:
                choices.append(selection)
        return choices

    def kept(self) -> list[int]:
        """The kept tokens by their numbers among the N."""
        choices = self.run()
        alive = torch.arange(self.n, device=choices[0].kept.device)
        for selection in choices:
            alive = alive[selection.kept]
        return alive.tolist()


def choose(tasks: Sequence[Task]) -> list[list[Selection]]:
    """The choices for several items of one pruner, as the engine asks for them: in one call, or stepwise."""
    pruner = tasks[0].pruner
    if isinstance(pruner, (EncoderPruner, DecodePruner)):
        return [task.run() for task in tasks]
    return [[selection] for selection in pruner.select_many([task.contexts[0] for task in tasks])]


def check(tasks: Sequence[Task]) -> None:
    """Raise PruningError unless all choices are well formed and a second call makes the same ones."""
    found, again = choose(tasks), choose(tasks)
    if len(found) != len(tasks):
        raise PruningError(f"{len(tasks)} items were handed over, {len(found)} choices came back")
    for task, choices, same in zip(tasks, found, again, strict=True):
        n = task.n
        for number, selection in enumerate(choices):
            last = number == len(choices) - 1
            well_formed(selection, n, task.keep if last else len(selection.kept), task.pruner.adaptive)
            n = len(selection.kept)
        if not choices or [s.kept.tolist() for s in choices] != [s.kept.tolist() for s in same]:
            raise PruningError(f"{task.pruner.name} chooses nothing, or other tokens when it is asked again")


def _as_they_leave(pruner: EncoderPruner, contexts: list[Context]) -> list[Context]:
    """Every layer's context, cut to the tokens that the layers before it leave."""
    state, out, alive = pruner.start(), [], None
    for ctx in contexts:
        if alive is not None:
            fields = {name: getattr(ctx, name) for name in PER_TOKEN}
            cut = {k: t.index_select(PER_TOKEN[k], alive) for k, t in fields.items() if t is not None}
            ctx = replace(ctx, **cut)
        out.append(ctx)
        selection, state = pruner.step(ctx, state)
        if selection is not None:
            alive = selection.kept if alive is None else alive[selection.kept]
    return out


def well_formed(selection: Selection, n: int, keep: int, adaptive: bool = False) -> None:
    """PruningError unless it is K of N tokens in ascending order, with a merge and scores that fit; looks at values."""
    kept = selection.kept.cpu()
    Selection(kept).check(n, keep, adaptive)
    merge = selection.merge
    if merge is not None:
        source, slot, weight = merge.source.cpu(), merge.slot.cpu(), merge.weight.cpu()
        shapes = {tuple(t.shape) for t in (source, slot, weight)}
        if len(shapes) != 1 or source.dim() != 1:
            raise PruningError(f"the entries of a merge are three lists of one length, got {sorted(shapes)}")
        inside = (source >= 0).all() and (source < n).all() and (slot >= 0).all() and (slot < len(kept)).all()
        if not inside or not weight.isfinite().all():
            raise PruningError("a merge names tokens that are not there, or weights that are no numbers")
    scores = selection.scores
    if scores is not None and (tuple(scores.shape) != (n,) or scores.isnan().any()):
        raise PruningError(f"scores are {n} numbers, got {tuple(scores.shape)}, perhaps with NaN among them")
