"""The reading study: what it counts, and that a step's cost is told in both ways."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vlprune
from vlprune.errors import SpecError
from vlprune.eval import decoding, reading
from vlprune.eval.checkpoints import load
from vlprune.eval.tiny import item
from vlprune.eval.tiny.evaluate import prompt

MODEL = "tiny-qwen2.5-vl"
FASTOCR = "fastocr:focal_layers=2/5:least=0"


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load(MODEL, dtype="float32")


@pytest.fixture(scope="module")
def pages() -> list[Any]:
    """Short pages of 144 tokens: seconds, not minutes."""
    return [item("line", i, 3, size=(336, 336)) for i in range(2)]


@pytest.mark.parametrize(
    ("output", "answer", "expected"),
    [
        ("A\nB\nC", "A\nB\nC", (3, 3)),
        ("A\nX\nC", "A\nB\nC", (2, 3)),
        ("C\nA", "A\nB\nC", (1, 3)),  # in order
        ("", "A\nB", (0, 2)),
        ("AB", "A\nB", (0, 2)),
    ],
)
def test_exact_lines(output: str, answer: str, expected: tuple[int, int]) -> None:
    assert reading.lines_read(output, answer) == expected


def test_both_accountings(loaded: tuple[Any, Any]) -> None:
    """Two pictures of 200 and 50 tokens, 8 layers."""
    pictures = [SimpleNamespace(tokens=200), SimpleNamespace(tokens=50)]
    trace = SimpleNamespace(pictures=pictures, visual=250, kept=25, layer_average=137.5)

    def found(plan: str) -> tuple[float, float]:
        return reading.shares(loaded[0], vlprune.Plan.parse(plan), trace)  # type: ignore[arg-type]

    assert found("fastocr:keep=0.1:focal_layers=2/5:least=0") == pytest.approx((0.1, (2 + 6 * 0.1) / 8))
    # the small picture is read whole
    assert found("fastocr:keep=0.1:focal_layers=3:least=100") == pytest.approx((70 / 250, (1 + 7 * 70 / 250) / 8))
    assert found("delta:keep=0.1:delta_layers=4") == pytest.approx(
        (0.1, (5 + 3 * 0.1) / 8)
    )  # dense in front of layer 4
    assert found("fastv@4:keep=0.1") == pytest.approx((0.1, 0.55))


def test_a_study(loaded: tuple[Any, Any], pages: list[Any]) -> None:
    found = reading.read(*loaded, pages, plans=[FASTOCR, "random"], keep=[0.125], batch=2, command="here")
    assert [row.plan.partition(":")[0] for row in found.rows] == ["dense", "fastocr", "random"]
    dense, fastocr, random = found.rows
    assert dense.character_error.value <= 0.1
    assert dense.agreement.value == dense.accuracy.value == 1
    assert (fastocr.pruned_layers, random.pruned_layers) == (0.125, 0.125)  # 18 of 144
    assert fastocr.all_layers == pytest.approx((2 + 6 * 0.125) / 8)
    assert random.character_error.value > dense.character_error.value
    assert random.exact_lines.value < 1
    assert random.by_kind == {"line": random.character_error.value}
    text = reading.table(found)
    assert text.count("\n| ") == 1 + 3
    assert "- command: here" in text
    assert "paper" not in text  # no row at 5 %
    at_five = [SimpleNamespace(**{**vars(fastocr), "pruned_layers": 0.05})]
    (line,) = reading.claim(SimpleNamespace(rows=at_five))  # type: ignore[arg-type]
    assert "98%" in line
    assert ("reached" in line) == (fastocr.accuracy.value >= 0.98)


def test_focal_layers_are_calibrated_where_a_plan_names_none(
    loaded: tuple[Any, Any], pages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        reading, "items", lambda task, n, seed: [item("page", i, seed, size=(336, 224)) for i in range(2)]
    )
    found = reading.read(*loaded, pages[:1], plans=["fastocr:least=0"], keep=[0.5], batch=1)
    assert found.focal is not None
    assert found.rows[1].plan == f"fastocr:keep=0.5:focal_layers={found.focal.parameter}:least=0"
    assert len(found.focal.mass) == 8


def test_plans_of_several_steps_are_refused(loaded: tuple[Any, Any], pages: list[Any]) -> None:
    with pytest.raises(SpecError, match="single methods"):
        reading.read(*loaded, pages, plans=["divprune+fastv@4"], keep=[0.5])


@pytest.mark.triton
def test_both_engines_write_the_same_tokens(
    loaded: tuple[Any, Any], pages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Triton's interpreter a few steps; the command with --checks does 200 on a GPU."""
    if not torch.cuda.is_available():
        from vlprune.kernels.dispatch import interpreted

        if not interpreted():
            pytest.skip("needs CUDA, or TRITON_INTERPRET=1 from the start")
    batches = [(pages, prompt(loaded[1], pages))]
    keep_all, engines = reading.prove(loaded[0], batches, vlprune.Plan.parse(f"{FASTOCR}:keep=0.1"), steps=3)
    assert "dense decoding on 2 of 2 pages" in keep_all
    assert "the same tokens on 2 of 2 pages" in engines


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_hundred_steps_on_a_gpu() -> None:
    model, processor = load(MODEL, dtype="float32", device="cuda")
    sheets = [item("document", i, 9) for i in range(20)]
    batches = [(sheets, prompt(processor, sheets))]
    focal = reading.calibrate(model, processor, batch=8)
    plan = vlprune.Plan.parse(f"fastocr:keep=0.05:focal_layers={focal.parameter}")
    keep_all, engines = reading.prove(model, batches, plan)
    assert "20 of 20 pages" in keep_all
    assert "20 of 20 pages" in engines


# ---- the cost of a decode step

SMALL = decoding.Shape(layers=6, heads=4, kv_heads=2, width=16)


def test_attention_of_a_step() -> None:
    """On a CPU the reference kernels run; what is timed must be right there too."""
    (cell,) = decoding.attention([2], [64], keep=0.1, shape=SMALL, device="cpu", dtype=torch.float32, repeats=2)
    assert (cell.batch, cell.visual, cell.keep) == (2, 64, 6)
    assert cell.cache_bytes == 2 * 6 * 2 * 2 * (64 + decoding.TEXT) * 16 * 4
    assert set(cell.device) == set(cell.eager) == {"dense", "dense_by_kernel", "fastocr"}
    assert "2 x 64" in decoding.attention_table([cell], {})


def test_a_step_is_what_the_three_forms_share() -> None:
    torch.manual_seed(0)
    step = decoding.Attention(SMALL, 2, 64, 1.0, (1, 3), torch.float32, torch.device("cpu"))
    for dense, kernel, fastocr in zip(step.dense(), step.dense_by_kernel(), step.fastocr(), strict=True):
        torch.testing.assert_close(kernel, dense)
        torch.testing.assert_close(fastocr, dense)  # keep=1.0
    step.choice = step.choice[:, :5]
    step.check()
    step.values[0][:, :, 20] += 7  # a row that is not among those read, or is: both forms see the same
    step.check()
    right = step.some
    step.some = lambda layer, rows: right(layer, rows + 20)  # rows that were not chosen, 20 among them
    with pytest.raises(vlprune.PruningError, match="nothing was timed"):
        step.check()


def test_decoding_with_a_whole_model() -> None:
    from vlprune.eval.shapes import load as load_shape
    from vlprune.eval.shapes import random_prompt

    model = load_shape("tiny", torch.float32, "sdpa", torch.device("cpu")).model
    asked = random_prompt(model, 2, 64, 16)
    dense = decoding.end_to_end(model, asked, None, steps=2)
    pruned = decoding.end_to_end(model, asked, "fastocr:keep=0.1:least=0", steps=2)
    assert (dense.plan, pruned.plan) == ("dense", "fastocr:keep=0.1:least=0")
    assert dense.cache_bytes == pruned.cache_bytes  # nothing leaves the cache
    for form in (dense.eager, dense.device, pruned.eager, pruned.device):
        assert dense.tokens_per_second(form) == pytest.approx(2e3 / form.median)


def test_a_step_over_a_cache_written_in_place_is_held_against_the_librarys_own(monkeypatch) -> None:
    from vlprune.eval.shapes import load as load_shape
    from vlprune.eval.shapes import random_prompt

    model = load_shape("tiny", torch.float32, "sdpa", torch.device("cpu")).model
    monkeypatch.setattr(decoding.Full, "update", lambda self, *_, **__: (self.keys, 9 * self.values))
    with pytest.raises(vlprune.PruningError, match="would mean nothing"):
        decoding.end_to_end(model, random_prompt(model, 1, 64, 16), None, steps=2)
