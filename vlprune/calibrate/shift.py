"""At which layer visual tokens have had their say: AdaptInfer's schedule."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.errors import PruningError


def change_point(curves: Tensor) -> Tensor:
    """Where a curve splits best into two constant pieces: the first index of the second one.

        argmin_c  sum_{i < c} (y_i - mean)^2 + sum_{i >= c} (y_i - mean)^2,    2 <= c <= L - 2

    Args:
        curves: [..., L], L >= 4.
    Returns:
        [...] int64. Ties go to the lower index.
    """
    y = curves.double() - curves.double().mean(dim=-1, keepdim=True)  # a shift changes nothing but the rounding
    length = y.shape[-1]
    if length < 4:
        raise PruningError(f"a change point needs at least 4 layers, got {length}")
    c = torch.arange(2, length - 1, device=y.device)
    total, squares = y.cumsum(dim=-1), y.square().sum(dim=-1, keepdim=True)
    head = total[..., c - 1]
    cost = squares - head.square() / c - (total[..., -1:] - head).square() / (length - c)
    return c[cost.argmin(dim=-1)]


def shift_layers(attention: Tensor, tokens: int) -> Tensor:
    """The layer at which each of the most attended visual tokens has had its say, for AdaptInfer's schedule.

    The `tokens` visual tokens with the most attention over all layers are taken, and the change point of each one's
    cumulative curve; the reported layer is the last of its first piece. Peaks of the histogram over many pictures are
    the layers to prune behind (stage = layer + 1).

    Args:
        attention: [L, V], text-to-vision attention of one picture.
        tokens: how many; the authors take 10 % of V.
    Returns:
        [tokens] int64, in ascending order of the tokens' attention.
    Source: AdaptInfer, arXiv:2508.06084; weiczh02/AdaptInfer-base@91b1784, prepocess.py.
    """
    busiest = attention.double().sum(dim=0).argsort(stable=True)[-tokens:]
    return change_point(attention.double()[:, busiest].T.cumsum(dim=1)) - 1
