"""The published figures are complete, can be found, and are compared on the same count of tokens."""

from __future__ import annotations

import pytest
import transformers as tf

from vlprune.eval import published, shapes
from vlprune.eval.published import BENCHMARKS, UNPRUNED, beside, lookup, recognise, results, sources, traps, unpruned
from vlprune.plan import Plan

SEVEN = ("GQA", "MMB", "MME", "POPE", "SQA", "VQAv2", "TextVQA")
LLAVA, NEXT, QWEN = "LLaVA-1.5-7B", "LLaVA-NeXT-7B", "Qwen2.5-VL-7B"


def test_every_table_has_one_unpruned_row_and_a_source() -> None:
    for table, source in sources().items():
        rows = [r for r in results() if r.source is source]
        assert len(rows) > 5
        assert [r.tokens for r in rows if r.method == UNPRUNED] == [source.tokens]
        assert source.source
        assert source.read_from in ("author", "paper")
        assert (unpruned(table).scores["MME"] > 1800) == (source.mme == "both")


def test_scores_are_plausible() -> None:
    for row in results():
        base = unpruned(row.source.id)
        for benchmark, score in row.scores.items():
            ceiling = 2400 if benchmark == "MME" else 1000 if benchmark == "OCRBench" else 100
            assert 0 < score < ceiling
            if benchmark in base.scores:
                assert 0.3 < score / base.scores[benchmark] < 1.25, (row.source.id, row.method, row.tokens, benchmark)
        assert row.tokens <= row.source.tokens
        assert row.printed is None or 50 < row.printed <= 100.5


@pytest.mark.parametrize(
    ("table", "method", "tokens", "expected"),
    [("A1", "CDPruner", 64, 96.3), ("A4", "HoloV", 64, 92.5), ("A4", "FastV", 64, 75.2), ("A3", "SCOPE", 64, 95.8),
     ("B1", "DivPrune", 640, None), ("A7", "MMTok", 64, 96.0), ("A2", "ToMe", 64, 70.6)],
)  # fmt: skip
def test_relative_scores_by_one_rule(table: str, method: str, tokens: int, expected: float | None) -> None:
    row = next(r for r in results() if (r.source.id, r.method, r.tokens) == (table, method, tokens))
    value = row.relative(SEVEN)
    assert value is not None
    assert expected is None or value == pytest.approx(expected, abs=0.06)
    assert row.relative(["GQA", "ChartQA"]) is None


def test_methods_are_found_by_our_names_and_theirs() -> None:
    assert {r.source.id for r in lookup(LLAVA, "visionzip", 64)} == {"A1", "A2", "A3", "A4", "A5", "A7"}
    assert lookup(LLAVA, "PyramidDrop", 192) == lookup(LLAVA, "pyramiddrop", 192) == lookup(LLAVA, "pdrop", 192)
    assert lookup(LLAVA, "nosuch") == []
    assert {r.tokens for r in lookup(QWEN, "cdpruner")} == {512, 256, 128}
    assert lookup(NEXT, "divprune", 64) == []


def test_a_plan_meets_the_rows_of_its_own_accounting() -> None:
    assert {r.tokens for r in beside(LLAVA, Plan.parse("holov:keep=0.111"), 32)} == {64}
    inside = beside(LLAVA, Plan.parse("fastv@2:keep=166"), 32)  # (2 * 576 + 30 * 166) / 32 = 191.6 tokens a layer
    assert {(r.method, r.tokens) for r in inside} == {("FastV", 192)}
    assert beside(LLAVA, Plan.parse("fastv@2:keep=64"), 32) == []  # 96 a layer: no table has that
    assert beside(LLAVA, Plan.parse("holov:keep=0.5+random@4:keep=0.2"), 32) == []
    assert beside("another model", Plan.parse("holov:keep=64"), 32) == []


def test_traps_name_what_differs() -> None:
    assert any("average" in trap for trap in traps("fastv", LLAVA))
    assert any("pivots" in trap for trap in traps("dart", LLAVA))
    assert any("padding" in trap for trap in traps("holov", NEXT))
    assert traps("holov", LLAVA) == []
    assert "OCR tokens" in BENCHMARKS["textvqa_val"].trap


def test_checkpoints_are_recognised_by_their_shape() -> None:
    assert recognise(shapes.llava_15_7b()) == LLAVA
    assert recognise(shapes.llava_next_7b()) == NEXT
    assert recognise(shapes.qwen25_vl_7b()) == QWEN
    assert recognise(shapes.tiny()) is None
    assert recognise(tf.LlavaConfig(text_config={"model_type": "mistral", "num_hidden_layers": 32})) is None


def test_benchmarks_exist_in_the_harness_and_in_the_tables() -> None:
    columns = {column for r in results() for column in r.scores}
    assert {b.column for b in BENCHMARKS.values()} <= columns
    assert set(published.TRAPS) >= {"average", "fastv", "visionzip"}
