"""SpAtten: tokens lose their place by the attention they have gathered in all layers so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruner import CachePruner, DecodePruner, Source, Tokens, register
from vlprune.pruners.snapkv import per_key_head, share_of, with_window
from vlprune.selection import Selection, top


@dataclass(frozen=True, eq=False)
class Gathered:
    """What one item carries from layer to layer and step to step; never changed, only replaced."""

    scores: Tensor | None = None  # [cells] attention gathered so far, of every cell of the grid
    alive: Tensor | None = None  # [cells] bool, what the last layer left


@register("spatten")
@dataclass(frozen=True)
class SpAtten(DecodePruner):
    """Cascade token pruning at every decode step: layer by layer fewer tokens, each layer's set inside the last one's.

        s_v += sum_h A_l[h, v]        behind layer l the best n_l of the tokens it has read go on

    n_l falls linearly from N in front of layer ``first L`` to K behind layer ``last L``, both rounded down. A is the
    attention over what the layer reads, text included, of the new token; s goes on from step to step, and every step
    starts with all tokens again, as none has left the cache. The first step starts with the last prompt row of the last
    layer.

    The budget is the end of the cascade: on average a layer reads more, with the defaults about (N + 3 K) / 4.

    Differs: the paper prunes the prompt's own layers as well, drops heads and values, and quantises; its schedule is not
    known to us. The code released later is another rule, `spatten_release`.
    """

    first: float = 0.0
    last: float = 0.5

    reads = "choice"
    needs = frozenset({"last_attention", "grids", "index"})
    source = Source(paper="arXiv:2012.09852", fidelity="idea")

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last <= 1:
            raise SpecError(f"spatten: first={self.first} and last={self.last} are shares of the depth, in this order")

    def focal(self, layers: int) -> tuple[int, ...]:
        return tuple(range(layers))

    def count(self, keep: int, tokens: int, layer: int, layers: int) -> int:
        first, last = int(self.first * (layers - 1)), int(self.last * (layers - 1))
        done = min(max(layer + 1 - first, 0), last + 1 - first) / (last + 1 - first)
        return tokens - int((tokens - keep) * done)

    def start(self, ctx: Context) -> Gathered:
        return Gathered()

    def step(self, ctx: Context, state: Gathered) -> tuple[Selection, Gathered]:
        here = ctx.last_attention.float().sum(dim=0)  # [H, N] -> [N]
        n, cells = len(here), sum(g.tokens for g in ctx.grids)
        index = torch.arange(n, device=here.device) if ctx.index is None else ctx.index
        before = here.new_zeros(max(cells, n)) if state.scores is None else state.scores
        scores = before.index_add(0, index, here)
        mine = scores[index]
        ranking = mine
        if ctx.layer != 0 and state.alive is not None:
            ranking = mine.masked_fill(~state.alive[index], -1.0)
        kept = top(ranking, ctx.keep)
        alive = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, index[kept], True)
        return Selection(kept, scores=mine), Gathered(scores, alive)


@register("spatten_release")
@dataclass(frozen=True)
class SpAttenRelease(CachePruner):
    """``s_v = sum_h (sum_t q_ht) . k_v``: logits of all rows t of the prompt, before mask and softmax, layer by layer.

    h are the query heads of one key head, which keeps its own K. This is what the authors released for language models,
    in the cache behind the prefill, and not the cascade of the paper; nothing is gathered from layer to layer.

    tokens: "visual" leaves all text. "all" is theirs: of all tokens the first `first` and the last ``window K``, rounded
        down, at least 1, always stay.

    Differs: they evict between the turns of a chat and number the cached rows anew; here positions stay.
    """

    tokens: Tokens = "visual"
    heads: Literal["each", "shared"] = "each"
    first: int = 4
    window: float = 0.5

    batched = True
    needs = frozenset({"query_sum", "keys"})
    source = Source(paper="arXiv:2012.09852", code="mit-han-lab/spatten@a0f1388", licence="MIT", fidelity="approximate")

    def __post_init__(self) -> None:
        if self.first < 0 or not 0 <= self.window <= 1:
            raise SpecError(f"spatten_release: first={self.first} is a count and window={self.window} a share of K")

    def score(self, ctx: Context) -> Tensor:
        queries = per_key_head(ctx.query_sum.float(), len(ctx.keys))  # the sum over a key head's queries
        scores = (ctx.keys.float() @ queries[..., None])[..., 0]  # [Hkv, N]
        if self.tokens == "visual":
            return scores
        window = share_of(ctx.keep, self.window)
        scores = with_window(scores, window)
        scores[:, : min(self.first, ctx.keep - window)] = scores[:, -1:]
        return scores
