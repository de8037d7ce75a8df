"""SGL's golden vectors: what the small model's attention sums to, and what the large model keeps by it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.pruners.golden import load, names
from vlprune.context import Context
from vlprune.gathered import Gathered, confidence, sequence_probability
from vlprune.pruners.sgl import SGL
from vlprune.trace import ItemTrace

FILES = names("sgl_s")
VISUAL = 9  # the id that stands for a visual token


@dataclass
class Recorded:
    """One layer's attention, [B, H, L, S], where a model would compute rows on demand."""

    maps: Tensor

    def attention(self, rows: Tensor) -> Tensor:
        return self.maps[:, :, rows]


def gathered(maps: list[Tensor], steps: list[list[Tensor]], first: int, last: int, **options: bool) -> Tensor:
    """Scores after a prompt of one layer's map each and steps of the same, pictures at first..last."""
    found = Gathered([], [VISUAL], options.get("last_visual_row", True))
    ids = torch.zeros(1, maps[0].shape[-1], dtype=torch.int64)
    ids[:, first : last + 1] = VISUAL
    found.begin(None, (), {"input_ids": ids})  # type: ignore[arg-type]
    for layer in maps:
        found.look(Recorded(layer))  # type: ignore[arg-type]
    for step in steps:
        found.begin(None, (), {"input_ids": torch.zeros(1, 1, dtype=torch.int64)})  # type: ignore[arg-type]
        for layer in step:
            found.look(Recorded(layer))  # type: ignore[arg-type]
    n = last - first + 1
    found.pictures = [ItemTrace(0, 0, None, n, n)]  # type: ignore[arg-type]
    (scores,) = found.scores
    return scores


@pytest.mark.parametrize("name", FILES)
def test_golden(name: str):
    g = load(name)
    first, last = int(g["visual_first"]), int(g["visual_last"])
    maps = [m[None] for m in g["prefill_attn"]]
    keys = sorted(
        (k for k in g.arrays if k.startswith("decode_attn")), key=lambda k: int(k.removeprefix("decode_attn"))
    )
    steps = [[m[None] for m in g[k]] for k in keys]
    torch.testing.assert_close(gathered(maps, [], first, last), g["importance_prefill_only"], rtol=1e-4, atol=1e-5)
    scores = gathered(maps, steps, first, last)
    torch.testing.assert_close(scores, g["importance"], rtol=1e-4, atol=1e-5)

    n, length = last - first + 1, maps[0].shape[-1]
    kept = SGL().select(Context(keep=int(n * float(g["keep_ratio"])), guide=scores)).kept + first
    text = [i for i in range(length) if not first <= i <= last]
    assert sorted(text + kept.tolist()) == g["keep_sequence"].tolist()


@pytest.mark.parametrize("name", FILES)
def test_golden_of_the_early_exit(name: str):
    g = load(name)
    torch.testing.assert_close(confidence([s[None] for s in g["step_logits"]]), g["confidence"][None].double())
    found = sequence_probability(g["recheck_logits"][None], g["answer_ids"][None])
    torch.testing.assert_close(found, g["consistency"][None].double(), rtol=1e-4, atol=0)


def test_by_hand():
    """One layer, one head, picture at 1 and 2, text at 3: rows 2 and 3 count, row 3 alone without the last visual row."""
    map_ = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.2, 0.3, 0.4]])[None, None]
    torch.testing.assert_close(gathered([map_], [], 1, 2), torch.tensor([0.5, 0.8]))
    torch.testing.assert_close(gathered([map_], [], 1, 2, last_visual_row=False), torch.tensor([0.2, 0.3]))
    assert SGL().select(Context(keep=1, guide=torch.tensor([0.5, 0.8]))).kept.tolist() == [1]
    probabilities = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    torch.testing.assert_close(
        confidence(list(probabilities.log()[:, None])), torch.tensor([(0.9 * 0.6) ** 0.5]).double()
    )
