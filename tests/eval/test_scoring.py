from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import vlprune
from vlprune import Context, EncoderPruner, Grid, Merge, PruningError, Selection, SpecError
from vlprune.eval.draws import Maker, Shape, Task, check, every_pruner, grids, read, well_formed
from vlprune.eval.scoring import change_cells, changed, changes_at_random, changes_in, cost, cost_cells, costs, main
from vlprune.pruners.fastv import FastV

SMALL = Shape(
    text=6, layers=6, heads=4, kv_heads=2, d=16, model=64, tower_layers=6, tower_heads=4, tower_d=16, tower=64
)
CPU = torch.device("cpu")
N, K = 36, 9


def maker(dtype: torch.dtype = torch.float32) -> Maker:
    return Maker(SMALL, CPU, dtype)


# ---- every pruner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", every_pruner())
def test_every_pruner_is_timed(text: str, dtype: torch.dtype):
    row = cost(maker(dtype), text, N, K, batch=2, repeats=2, seconds=0.0, warmup=0)
    assert row.failed is None
    assert row.milliseconds is not None
    assert 0 < row.milliseconds.p20 <= row.milliseconds.median <= row.milliseconds.p80
    assert row.peak_bytes is None, "memory is counted on CUDA only"
    assert (row.pruner, row.tokens, row.keep, row.batch) == (text, N, K, 2)


def test_wrappers_stand_with_what_they_wrap():
    texts = every_pruner()
    assert {"debias(fastv)", "debias(pyramiddrop)", "debias(sparsevlm)", "debias(adaptinfer)"} <= set(texts)
    assert "debias(divprune)" not in texts
    assert {t for t in texts if "(" not in t} == set(vlprune.PRUNERS) - {"debias"}


def test_a_context_holds_what_was_asked_for():
    pruner, stage = read("sparsevlm")
    ctx = maker().context(pruner, stage, N, K, seed=0)
    assert ctx.text_attention.shape == (6, 4, N)
    assert (ctx.text_attention.sum(-1) < 1).all()
    assert ctx.text_attention.dtype == torch.float32
    assert ctx.features.shape == (N, 64)
    assert ctx.queries is None
    assert ctx.tokens == N
    half = maker(torch.bfloat16).context(pruner, stage, N, K, seed=0)
    assert torch.equal(half.features, ctx.features.bfloat16())
    assert torch.equal(maker().context(pruner, stage, N, K, seed=0).text_attention, ctx.text_attention)
    assert not torch.equal(maker().context(pruner, stage, N, K, seed=1).features, ctx.features)


def test_projected_features_are_those_of_the_projector():
    pruner, stage = read("zoo_prune")
    ctx = maker().context(pruner, stage, N, K, seed=0)
    torch.testing.assert_close(ctx.project(ctx.encoder_features), ctx.features)
    assert ctx.encoder_features.shape == (N, 64)


def test_unknown_fields_are_named():
    @dataclass(frozen=True)
    class Strange(FastV):
        needs = frozenset({"padding", "moon"})

    with pytest.raises(SpecError, match="draw moon"):
        maker().context(Strange(), "2", N, K, seed=0)


def test_grids():
    assert grids(2880) == (Grid(1, 24, 24),) * 5
    assert grids(64) == (Grid(1, 8, 8),)
    assert grids(12) == (Grid(1, 3, 4),)


# ---- rules that work layer by layer


@dataclass(frozen=True)
class Halves(EncoderPruner):
    """Drops the first tokens, half of what has to go after the first layer, the rest after the third."""

    needs = frozenset({"values"})

    def step(self, ctx: Context, state: object) -> tuple[Selection | None, object]:
        n = ctx.values.shape[1]
        left = {0: (n + ctx.keep) // 2, 2: ctx.keep}.get(ctx.layer)
        return (None if left is None else Selection(torch.arange(n - left, n))), state


def test_layers_see_what_earlier_ones_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(vlprune.PRUNERS, "halves", Halves)
    task = Task.make(maker(), "halves", N, K, seed=0)
    assert [ctx.tokens for ctx in task.contexts] == [36, 22, 22, 9]
    assert [ctx.layer for ctx in task.contexts] == [0, 1, 2, 3]
    assert {ctx.layers for ctx in task.contexts} == {6}
    assert task.kept() == list(range(N - K, N)), "numbered as at the start"
    check([task])


# ---- what is not timed


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(torch.arange(8)), "9 of 36"),
        (Selection(torch.arange(9).flip(0)), "increasing"),
        (Selection(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 7])), "increasing"),
        (Selection(torch.arange(28, 37)), "increasing"),
        (Selection(torch.arange(9).float()), "int64"),
        (Selection(torch.arange(9), Merge(torch.tensor([40]), torch.tensor([0]), torch.ones(1))), "not there"),
        (Selection(torch.arange(9), Merge(torch.tensor([1]), torch.tensor([9]), torch.ones(1))), "not there"),
        (Selection(torch.arange(9), Merge(torch.tensor([1]), torch.tensor([0]), torch.tensor([torch.nan]))), "weights"),
        (Selection(torch.arange(9), Merge(torch.tensor([1, 2]), torch.tensor([0]), torch.ones(1))), "one length"),
        (Selection(torch.arange(9), scores=torch.full((36,), torch.nan)), "NaN"),
        (Selection(torch.arange(9), scores=torch.ones(35)), "36 numbers"),
    ],
)
def test_malformed_choices_are_not_timed(selection: Selection, message: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(PruningError, match=message):
        well_formed(selection, N, K)
    monkeypatch.setattr(FastV, "select_many", lambda self, contexts: [selection] * len(contexts))
    row = cost(maker(), "fastv", N, K, batch=1, repeats=2, seconds=0.0)
    assert row.milliseconds is None
    assert row.failed is not None
    assert "not timed" in cost_cells(row)[5]


def test_a_fickle_choice_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FastV, "select", lambda self, ctx: Selection(torch.randperm(N)[:K].sort().values))
    assert cost(maker(), "random", N, K, batch=1, repeats=2, seconds=0.0).failed is None
    assert "other tokens" in str(cost(maker(), "fastv", N, K, batch=1, repeats=2, seconds=0.0).failed)


def test_every_item_gets_its_choice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FastV, "select_many", lambda self, contexts: [Selection(torch.arange(K))])
    assert "3 items were handed over, 1 choices" in str(cost(maker(), "fastv", N, K, 3, 2, 0.0).failed)


def test_a_good_choice_passes():
    own = torch.arange(9)
    well_formed(Selection(own, Merge(own, own, torch.ones(9)), torch.ones(36)), N, K)
    well_formed(Selection(own), N, 12, adaptive=True)


def test_budgets_that_keep_all_are_left_out():
    found = list(costs(["random"], maker(), [36], [9, 36, 99], [1], repeats=1, seconds=0.0))
    assert [row.keep for row in found] == [9]


# ---- precision


def test_changes_are_counted():
    assert changed([1, 2, 3], [3, 2, 1]) == 0
    assert changed([1, 2, 3], [1, 4, 5]) == 2
    (row,) = changes_at_random(["random"], SMALL, CPU, N, K, draws=3)
    assert (row.bfloat16, row.float16, row.worst, row.draws) == (0, 0, 0, 3)
    assert change_cells(row) == ["random", "random, N = 36", "9", "3", "0", "0", "0"]


def test_rounding_reaches_the_rule(monkeypatch: pytest.MonkeyPatch):
    """bfloat16 keeps 8 bits and float16 11: which of 1, 1 + 2^-9 and 1 + 2^-12 are told apart."""
    x = torch.tensor([1.0, 1 + 2**-9, 1 + 2**-12])

    def run(change: object) -> list[int]:
        return FastV().select(Context(keep=1, last_attention=change(x)[None])).kept.tolist()  # type: ignore[operator]

    (row,) = changes_in([SimpleNamespace(name="three", pruner="fastv", run=run)])
    assert (row.bfloat16, row.float16, row.worst, row.keep) == (1, 0, 1, 1)
    (row,) = changes_in(
        [SimpleNamespace(name="two", pruner="fastv", run=lambda f: run(lambda t: f(t[[0, 2]].flip(0)[None])[0]))]
    )
    assert row.float16 == 0


# ---- the command


def test_command_writes_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--pruners", "fastv", "random", "--tokens", "64", "--keep", "16", "--quick", "--device", "cpu"]
    main([*arguments, "--dtype", "float32", "--out", str(tmp_path / "cost")])
    data = json.loads((tmp_path / "cost.json").read_text())
    assert data["setting"]["torch"] == torch.__version__
    assert data["setting"]["command"].startswith("python -m vlprune.eval.scoring --pruners fastv random")
    assert [r["pruner"] for r in data["rows"]] == ["fastv", "random"]
    assert all(r["milliseconds"]["median"] > 0 for r in data["rows"])
    text = (tmp_path / "cost.md").read_text()
    assert text == capsys.readouterr().out
    assert sum(line.startswith("| fastv |") for line in text.splitlines()) == 1


def test_precision_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    case = SimpleNamespace(name="mine", pruner="fastv", run=lambda change: [1, 2])
    monkeypatch.setitem(sys.modules, "some_cases", SimpleNamespace(cases=lambda: [case]))
    sizes = ["--tokens", "64", "--keep", "16", "--draws", "2"]
    main(["--precision", "--cases", "some_cases", "--pruners", "fastv", *sizes, "--device", "cpu", "--out",
          str(tmp_path / "precision")])  # fmt: skip
    rows = json.loads((tmp_path / "precision.json").read_text())["rows"]
    assert [(r["pruner"], r["inputs"]) for r in rows] == [("fastv", "mine"), ("fastv", "random, N = 64")]
    assert "| fastv | mine | 2 | 1 | 0 | 0 | 0 |" in capsys.readouterr().out


def test_unknown_pruners_stop_the_command():
    with pytest.raises(SpecError, match="unknown pruner 'fastw'"):
        main(["--pruners", "fastw", "--device", "cpu"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("text", every_pruner())
def test_memory_is_counted_on_a_gpu(text: str):
    wide = Maker(replace(SMALL, d=64, model=256), torch.device("cuda"), torch.bfloat16)
    row = cost(wide, text, 576, 64, batch=2, repeats=2, seconds=0.0)
    assert row.failed is None
    assert row.peak_bytes is not None
    assert row.peak_bytes >= (0 if text in ("random", "uniform") else 64)
