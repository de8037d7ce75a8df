from __future__ import annotations

import pytest
import torch

from tests.pruners.golden import load, names
from tests.pruners.vectors import BUILDERS
from vlprune.context import Context
from vlprune.errors import SpecError
from vlprune.pruners.fasa import Fasa, agreement, chunks_of


@pytest.mark.parametrize("name", names("fasa"))
def test_golden(name: str):
    """The file's dimensions are an input: its agreement is a mean over queries that it does not hold."""
    g = load(name)
    ((rule, ctx),) = BUILDERS["fasa"](g)
    assert rule.chunks.shape == (len(g["q"]), int(g["n_chunks"]))
    selection, _ = rule.step(ctx, rule.start(ctx))
    assert torch.equal(selection.check(g["k"].shape[1], ctx.keep).heads.kept, g["keep"])


def test_pairs():
    x = torch.arange(6)
    assert chunks_of(x, "rope").tolist() == [[0, 3], [1, 4], [2, 5]]
    assert chunks_of(x, "adjacent").tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("pairing", ["rope", "adjacent"])
def test_all_chunks_rank_like_the_whole_head(pairing: str):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(4, 8, generator=g), torch.randn(2, 50, 8, generator=g)
    ctx = Context(keep=9, last_query=q, keys=k, layer=3)
    heads = Fasa(share=1.0, pairing=pairing).step(ctx, {})[0].heads
    logits = torch.einsum("hgd,hnd->hn", q.view(2, 2, 8), k)
    assert torch.equal(heads.kept, logits.topk(9).indices.sort().values)


def test_energy_in_one_chunk():
    g = torch.Generator().manual_seed(0)
    q, k = torch.zeros(2, 8), torch.randn(2, 40, 8, generator=g)
    q[:, [1, 5]] = torch.tensor([2.0, -3.0])
    found = agreement(q, k, 10, "rope")
    assert found[:, 1].tolist() == [1.0, 1.0]
    assert (found[:, [0, 2, 3]] < 1).all()
    assert Fasa().dominant(Context(keep=10, last_query=q, keys=k)).tolist() == [[1], [1]]
    both = agreement(q, k, 10, "adjacent")
    assert (both[:, [0, 2]] < 1).all(), "released pairs cut a rotated one in two"


def test_agreement_by_hand():
    """One head, two chunks; K = 2: the whole ranks tokens 0 and 2 first, chunk 0 ranks 0 and 1, chunk 1 ranks 2 and 0."""
    q = torch.tensor([[1.0, 1.0]])
    k = torch.tensor([[[3.0, 1.0], [2.0, -5.0], [0.0, 6.0], [0.5, 0.0]]])
    # two dimensions make one rotated chunk; four of them two
    q4, k4 = torch.cat([q, torch.zeros(1, 2)], 1), torch.cat([k, torch.zeros(1, 4, 2)], 2)
    assert agreement(q4, k4, 2, "rope").tolist() == [[0.5, 1.0]]


def test_chunks_are_found_once_a_layer():
    g = torch.Generator().manual_seed(0)
    rule, state = Fasa(), {}
    for layer in (1, 2, 1):
        ctx = Context(
            keep=5, layer=layer, last_query=torch.randn(4, 8, generator=g), keys=torch.randn(2, 30, 8, generator=g)
        )
        before = dict(state)
        _, state = rule.step(ctx, state)
        assert all(state[k] is v for k, v in before.items())
    assert sorted(state) == [1, 2]


def test_layers_and_parameters():
    assert Fasa().focal(4) == (1, 2, 3)
    assert Fasa(dense_layers=0).focal(2) == (0, 1)
    for wrong in ({"share": 0.0}, {"share": 1.1}, {"dense_layers": -1}):
        with pytest.raises(SpecError, match="fasa"):
            Fasa(**wrong)
