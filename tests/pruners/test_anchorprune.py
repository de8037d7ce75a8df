from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.pruners.golden import load, names
from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruners.anchorprune import AnchorPrune, anchored


@pytest.mark.parametrize("name", names("base_anchorprune"))
def test_golden(name: str):
    """The authors' selector takes any relevance and importance; a Context makes its own."""
    g = load(name)
    p = g.params
    keep, least = p["k_total"], p["k_min"]
    most = max(least, int(p["kmax_ratio"] * keep))
    kept = anchored(g["relevance"], g["importance"], g["features"], keep, least, p["tau"], p["patience"], most)
    assert kept.tolist() == g["selected_sorted"].tolist()
    assert torch.isin(g["anchor_ranked"], kept).all()


def test_golden_through_select():
    """Text embeddings and CLS rows made so that the Context's relevance and importance are those of the file."""
    g = load("base_anchorprune_s1151")
    x = torch.nn.functional.normalize(g["features"], dim=1)
    text = torch.randn(3, x.shape[1], generator=torch.Generator().manual_seed(0))
    relevance = (x @ torch.nn.functional.normalize(text, dim=1).T).amax(1)
    ctx = Context(keep=32, features=g["features"], text_embeddings=text, cls_attention=g["importance"][None])
    kept = AnchorPrune().select(ctx).check(144, 32).kept
    assert kept.tolist() == anchored(relevance, g["importance"], g["features"], 32, 5, 0.2, 3, 16).tolist()


def plain(
    relevance: Tensor, importance: Tensor, x: Tensor, keep: int, least: int, tau: float, patience: int, most: int
):
    """The rule with Python's numbers."""
    unit = torch.nn.functional.normalize(x, dim=1)
    distance = (1 - unit @ unit.T).clamp(max=1)
    ranked = relevance.argsort(descending=True).tolist()
    chosen, seen = ranked[:least], 0
    for token in ranked[least:most]:
        if seen == patience:
            break
        seen += bool((1 - unit[ranked[:least]] @ unit[token]).min() > tau)
        chosen = [*chosen, token]
    while len(chosen) < keep:
        rest = [i for i in range(len(x)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(importance[i].clamp(min=0) * distance[i, chosen].min())))
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_rule_step_by_step(seed: int):
    g = torch.Generator().manual_seed(seed)
    relevance, importance = torch.rand(2, 60, generator=g)
    x = torch.randn(60, 6, generator=g)
    x[20:] = x[:40] + 0.1 * x[20:]  # many near twins
    case = (relevance, importance, x, 20, 3 + seed % 2, 0.2 + 0.2 * (seed % 3), 1 + seed % 4, 10)
    assert anchored(*case).tolist() == plain(*case)


def test_parameters_it_refuses():
    with pytest.raises(SpecError, match="shares"):
        AnchorPrune(least=0.6)
    assert AnchorPrune(attention="received").needs == {"features", "text_embeddings", "received_attention"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("equal", [False, True])
def test_counts(dtype: torch.dtype, equal: bool):
    g = torch.Generator().manual_seed(0)
    x = torch.ones(20, 6) if equal else torch.randn(20, 6, generator=g)
    for keep in (1, 2, 7, 20):
        ctx = Context(keep=keep, features=x.to(dtype), text_embeddings=torch.randn(3, 6, generator=g).to(dtype),
                      cls_attention=torch.ones(2, 20))  # fmt: skip
        AnchorPrune().select(ctx).check(20, keep)
