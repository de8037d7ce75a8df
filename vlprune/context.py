"""What a pruner may see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Choose = Callable[[Tensor], tuple[Tensor, Tensor]]  # what patches receive [B, P] -> rows, weights [B, R]; see Context


class Grid(NamedTuple):
    """Where visual tokens lie: row-major, frame after frame, in the unit the decoder sees (a merged patch group)."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True, eq=False)
class Context:
    """The N visual tokens of one image or one video or, with scope="prompt", of one prompt.

    Fields a pruner did not list in its `needs` may be None. Attention rows are probabilities over the whole sequence,
    cut to the visual columns and not renormalised, float32. "The layer that has just run" is decoder layer
    ``layer - 1`` at decoder stages, layer ``layer`` itself at "cache" and "decode", and the vision layer whose output the
    projector reads at "encoder" and "projector". A CachePruner with tokens="all" gets all N tokens of a prompt instead.

    ``encoder_rows(choose)`` is a weighted sum of rows, [H, N], of the vision layer whose output the projector reads. Rows
    are the tower's own: where P patches attend among themselves (a picture, or one of its crops, frames or windows),
    ``choose`` is given what each of them receives, the mean over heads and query rows, [B, P], and answers with indices
    and weights of rows, [B, R] each. The sums are laid out as `received_attention` is: means over the patches of a token,
    NaN for separators. Equal ``choose``, such as of a frozen dataclass, share one answer in a batch and between stages.
    """

    keep: int  # K, already resolved from the budget
    grids: tuple[Grid, ...] = ()  # one per image or video; their sizes sum to N unless `index` is set
    index: Tensor | None = None  # [N] int64: grid cell of each token once earlier stages removed some
    features: Tensor | None = None  # [N, D] tokens as they enter this stage
    encoder_features: Tensor | None = None  # [N, Dv] before the projector
    embeddings: Tensor | None = None  # [N, D] tokens as they entered layer 0
    text_features: Tensor | None = None  # [M, D] text tokens after the visual ones, as they enter this stage
    text_embeddings: Tensor | None = None  # [M, D] the same tokens as they entered layer 0

    queries: Tensor | None = None  # [H, N, d] of the layer that has just run, after RoPE
    keys: Tensor | None = None  # [Hkv, N, d] likewise
    values: Tensor | None = None  # [Hkv, N, d] likewise
    last_query: Tensor | None = None  # [H, d] of the last prompt token
    last_value: Tensor | None = None  # [Hkv, d] of the last prompt token
    text_keys: Tensor | None = None  # [Hkv, M, d] of the text tokens after the visual ones
    query_sum: Tensor | None = None  # [H, d] sum of the queries of all prompt tokens

    cls_attention: Tensor | None = None  # [H, N] CLS row of the vision layer
    cls_value: Tensor | None = None  # [H, d] value of the CLS token (stage "encoder", layer by layer)
    received_attention: Tensor | None = None  # [H, N] column means of the vision layer, for encoders without CLS
    last_attention: Tensor | None = None  # [H, N] row of the last prompt token in the layer that has just run
    next_attention: Tensor | None = None  # [H, N] the same row, computed with layer `layer`'s own projections
    text_attention: Tensor | None = None  # [M, H, N] rows of the text tokens after the visual ones
    text_self_attention: Tensor | None = None  # [M, H, M] the same rows, cut to the columns of these text tokens
    prompt_attention: Tensor | None = None  # [H, N] column sums over the rows of all prompt tokens

    early_cls_attention: Tensor | None = None  # [H, N] CLS row of vision layer `Pruner.early_block`
    early_received_attention: Tensor | None = None  # [H, N] column means of that layer
    final_cls_attention: Tensor | None = None  # [1, N] CLS row of the tower's last layer, its heads joined into one
    final_keys: Tensor | None = None  # [H, N, d] of the tower's last layer

    is_text: Tensor | None = None  # [N] bool, where all tokens of a prompt are chosen from
    padding: Tensor | None = None  # [N] bool, tokens that show no picture
    newline: Tensor | None = None  # [N] bool, learned row separators among the tokens
    guide: Tensor | None = None  # [N] scores from outside, see `vlprune.guided`
    image_size: tuple[int, int] | None = None  # (width, height) of the picture before preprocessing

    layer: int | None = None  # the stage's layer; None before the language model
    layers: int | None = None  # L of the module the stage lives in
    encoder_rows: Callable[[Choose], Tensor] | None = None  # chosen rows of the vision layer in sum, see above
    project: Callable[[Tensor], Tensor] | None = None  # the projector, [*, N, Dv] -> [*, N, D]
    norm: Callable[[Tensor], Tensor] | None = None  # the decoder's final norm
    generator: torch.Generator | None = None  # the only randomness: on the CPU, freshly seeded for each call

    @property
    def tokens(self) -> int:
        """N, read from whichever per-token field is there."""
        for x, dim in (
            (self.features, 0), (self.encoder_features, 0), (self.cls_attention, 1), (self.received_attention, 1),
            (self.last_attention, 1), (self.next_attention, 1), (self.queries, 1), (self.keys, 1), (self.values, 1),
            (self.text_attention, 2), (self.prompt_attention, 1), (self.early_cls_attention, 1),
            (self.early_received_attention, 1), (self.final_cls_attention, 1), (self.index, 0), (self.padding, 0),
        ):  # fmt: skip
            if x is not None:
                return x.shape[dim]
        return sum(g.tokens for g in self.grids)

    @property
    def device(self) -> torch.device:
        """Where the token tensors live; the CPU if there are none."""
        for value in vars(self).values():
            if isinstance(value, Tensor):
                return value.device
        return torch.device("cpu")


FIELDS = frozenset(Context.__dataclass_fields__) - {"keep", "layer", "layers"}
