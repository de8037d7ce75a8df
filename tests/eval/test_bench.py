"""The benchmark times only what is right, counts what it claims to count, and says what it cannot do."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import vlprune
from vlprune.errors import BudgetError, PruningError, SpecError, UnsupportedStage, VlpruneError
from vlprune.eval import shapes
from vlprune.eval.answering import current_plan
from vlprune.eval.bench import Bout, bench, every_plan
from vlprune.eval.floors import Floors, Lengths, cut, decoder_flops, prefill_lengths
from vlprune.eval.gate import Gate, check_cache, check_counts
from vlprune.eval.rows import TITLES, Report, Row
from vlprune.eval.timing import Marks, Spread, measure, prefill, prefill_parts, prefill_times

QUIET = Console(quiet=True)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny() -> Any:
    return shapes.load("tiny", torch.float32, "sdpa", CPU).model


def row(model: Any, prompt: shapes.Prompt, text: str, new: int = 1) -> Row:
    return Bout(model, prompt, new, 1, 0).rows([vlprune.Plan.parse(text)])[0]


def run(*plans: str, **options: Any) -> Report:
    settings: dict[str, Any] = {
        "visual": [64],
        "new": 2,
        "repeats": 2,
        "warmup": 0,
        "dtype": "float32",
        "device": "cpu",
    }
    return bench("tiny", plans, console=QUIET, **{**settings, **options})


def test_rows_say_what_was_measured(tmp_path: Path) -> None:
    report = run("uniform:keep=0.25", "random@2:keep=16", batch=[2], visual=[120], output=tmp_path)
    base, early, late = report.rows
    assert [r.plan for r in report.rows] == ["unpruned", "uniform:keep=0.25", "random@2:keep=16"]
    assert (base.visual, base.kept, early.kept, late.kept) == (128, 128, 32, 32)  # two pictures of 64
    assert late.layer_average == (2 * 128 + 4 * 32) / 6
    token = 2 * 2 * 16 * 4  # one layer: keys and values of 2 heads of width 16 in float32
    assert base.kv_bytes == 2 * 6 * (128 + 64) * token
    assert early.kv_bytes == 2 * 6 * (32 + 64) * token
    assert late.kv_bytes == 2 * (2 * 192 + 4 * 96) * token
    assert base.flops is not None
    assert early.flops is not None
    assert late.flops is not None
    assert early.flops < late.flops < base.flops
    for row in report.rows:
        assert row.failed is None
        assert row.prefill is not None
        assert row.vision is not None
        assert row.language is not None
        assert row.prefill.median > row.vision.median > 0
        assert row.language.median > 0
        assert row.peak_bytes is None  # there is no such counter on a CPU
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["setting"]["weights"] == "random"
    assert data["rows"][0]["prefill_speedup"] == 1
    with open(tmp_path / "bench.csv") as f:
        lines = list(csv.DictReader(f))
    assert [line["plan"] for line in lines] == [row.plan for row in report.rows]
    assert float(lines[1]["prefill_p80"]) == data["rows"][1]["prefill"]["p80"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_floor_runs_the_lengths_of_the_pruned_run(attention: str) -> None:
    model = shapes.load("tiny", torch.float32, attention, CPU).model
    prompt = shapes.random_prompt(model, 1, 64, 10)
    plan = "random@1:keep=0.5+uniform@3:keep=0.25"
    with vlprune.pruning(model, plan):
        pruned = prefill(model, prompt.inputs, Marks(CPU)).past_key_values
        lengths = prefill_lengths(prompt, vlprune.trace(model), 6)
    assert lengths == (74, 42, 42, 26, 26, 26) == tuple(layer.keys.shape[2] for layer in pruned.layers)
    seen = []
    with cut(model.model.language_model.layers, Lengths(lengths, lengths), 74), torch.inference_mode():
        text = model.model.language_model
        cache = tf.DynamicCache(config=text.config)
        out = text(inputs_embeds=torch.randn(1, 74, 64), past_key_values=cache, use_cache=True)
        seen += [layer.keys.shape[2] for layer in cache.layers]
        text(inputs_embeds=torch.randn(1, 1, 64), past_key_values=cache, use_cache=True)
    assert out.last_hidden_state.shape[1] == 26
    assert seen == list(lengths)
    assert [layer.keys.shape[2] for layer in cache.layers] == [n + 1 for n in lengths]
    assert not any(layer._forward_pre_hooks for layer in text.layers)


def test_eviction_keeps_the_prefill_long(tiny: Any) -> None:
    prompt = shapes.random_prompt(tiny, 1, 64, 10)
    with vlprune.pruning(tiny, "random@cache:keep=0.25"):
        prefill(tiny, prompt.inputs, Marks(CPU))
        assert prefill_lengths(prompt, vlprune.trace(tiny), 6) == (74,) * 6
    found = row(tiny, prompt, "random@cache:keep=0.25")
    assert (found.kept, found.kv_bytes) == (16, 6 * 26 * 2 * 2 * 16 * 4)


def test_whole_floor_runs_the_model_on_the_lengths_of_the_pruned_run(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = shapes.random_prompt(tiny, 2, 64, 10)
    lengths = Lengths((74, 42, 42, 26, 26, 26), (74, 42, 42, 26, 26, 26))
    seen = []

    def watch(*args: Any) -> Any:
        out = prefill(*args)
        seen.append(tuple(layer.keys.shape[2] for layer in out.past_key_values.layers))
        return out

    monkeypatch.setattr("vlprune.eval.floors.prefill", watch)
    assert Floors(tiny, prompt, 1).whole(lengths)["prefill_floor"] > 0
    assert seen == [lengths.slots]


def test_plans_and_floors_take_turns(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of the same lengths share their floors within a round; a slow plan gets three runs."""
    order: list[str] = []
    native = Floors.native

    def note(self: Floors, lengths: Lengths) -> dict[str, float]:
        order.append("floor")
        return native(self, lengths)

    monkeypatch.setattr(Floors, "native", note)
    run_one = Bout._run
    monkeypatch.setattr(Bout, "_run", lambda self, e, pruned: [order.append(str(e.plan)), run_one(self, e, pruned)][1])
    plans = [vlprune.Plan.parse(t) for t in ("uniform:keep=0.25", "random:keep=0.25", "random@2:keep=0.25")]
    prompt = shapes.random_prompt(tiny, 1, 64, 10)
    rows = Bout(tiny, prompt, 1, 4, 1, seconds=1e-9).rows(plans)
    a, b, c = map(str, plans)
    assert order == [a, "floor", b, c, "floor"] * 4  # one to warm up
    for found in rows:
        assert found.runs == 3
        assert found.decoder_over_floor is not None
        assert found.decoder_over_floor.median > 0
        assert found.prefill_over_floor is not None


def test_every_pruner_of_the_prefill_is_there(tiny: Any) -> None:
    plans = {str(p) for p in every_plan(tiny, 8)}
    assert {"uniform:keep=8", "fastv:keep=8", "visionzip:keep=8", "debias(fastv):keep=8"} <= plans
    assert not any("fastocr" in p for p in plans)


def test_tables_are_readable_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {
        "visual": [64],
        "new": 1,
        "repeats": 1,
        "warmup": 0,
        "dtype": "float32",
        "device": "cpu",
    }
    bench("tiny", ["uniform:keep=0.25"], output=tmp_path, **settings)
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert any("uniform:keep=0.25" in line and "16" in line for line in shown.splitlines())
    lines = (tmp_path / "bench.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4
    assert all(line.count("|") == len(TITLES) + 1 for line in table)


def test_flops_formula_agrees_with_a_counter() -> None:
    text = shapes.load(
        "tiny", torch.float32, "eager", CPU
    ).model.model.language_model  # the counter misses fused attention
    config, n, batch = text.config, 37, 2
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        text(inputs_embeds=torch.randn(batch, n, 64))
    layers = config.num_hidden_layers
    future = (
        batch * layers * 2 * n * n * config.num_attention_heads * 16
    )  # eager attention computes what causality hides
    angles = 0.001 * counter.get_total_flops()  # of the rotary table: a matrix product outside the layers
    expected = pytest.approx(counter.get_total_flops() - future, abs=angles)
    assert decoder_flops(config, [n] * layers, batch) == expected


def test_gate_refuses_a_plan_that_changes_logits_at_keep_one(tiny: Any) -> None:
    prompt, plan = shapes.random_prompt(tiny, 1, 64, 10), vlprune.Plan.parse("uniform:keep=0.5")

    def disturb(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out + 1e-3 if current_plan(tiny) else out

    handle = tiny.lm_head.register_forward_hook(disturb)
    try:
        with pytest.raises(PruningError, match=r"keep=1\.0 changes the prompt's logits by 0\.001"):
            Gate(tiny, prompt).check(plan)
        found = row(tiny, prompt, str(plan))
    finally:
        handle.remove()
    assert found.failed is not None
    assert found.prefill is None
    assert Gate(tiny, prompt).check(plan).kept == 32


def test_gate_compares_counts_and_cache_with_the_trace(tiny: Any) -> None:
    prompt, plan = shapes.random_prompt(tiny, 1, 64, 10), vlprune.Plan.parse("uniform:keep=0.5")
    with vlprune.pruning(tiny, plan):
        cache = prefill(tiny, prompt.inputs, Marks(CPU)).past_key_values
        trace = vlprune.trace(tiny)
    check_counts(plan, trace)
    check_cache(cache, trace)
    with pytest.raises(PruningError, match=r"kept 32 of 64 tokens in row 0; its budget says 16"):
        check_counts(vlprune.Plan.parse("uniform:keep=0.25"), trace)
    cache.layers[3].keys = cache.layers[3].keys[:, :, :-1]
    with pytest.raises(PruningError, match="layer 3 caches 1 x 41 tokens; the trace claims 42"):
        check_cache(cache, trace)


@pytest.mark.parametrize(
    ("plans", "options", "error", "words"),
    [
        (["nosuch:keep=0.5"], {}, SpecError, "unknown pruner 'nosuch'"),
        (["uniform"], {}, BudgetError, "no budget"),
        (["uniform@99:keep=0.5"], {}, UnsupportedStage, "layers 0 to 5"),
        ([], {"dtype": "int8"}, SpecError, "int8"),
        ([], {"batch": [0]}, SpecError, "at least 1"),
    ],
)
def test_bad_requests_fail_before_anything_is_measured(
    plans: list[str], options: dict[str, Any], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bout, "rows", lambda *_: pytest.fail("measured"))
    with pytest.raises(error, match=words):
        run(*plans, **options)


def test_unknown_models_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"did you mean .*llava-1\.5-7b"):
        bench("llava-1.5-7", [], console=QUIET)
    with pytest.raises(SpecError, match=r"holds no config\.json"):
        bench(str(tmp_path), [], console=QUIET)


def test_unwritable_output_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bout, "rows", lambda *_: pytest.fail("measured"))
    (tmp_path / "taken").write_text("")
    with pytest.raises(VlpruneError, match=r"cannot write .*taken"):
        run(output=tmp_path / "taken")


def small_next() -> tf.PretrainedConfig:
    base = shapes.tiny()
    vision = {**base.vision_config.to_dict(), "image_size": 56}
    pinpoints = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    return tf.LlavaNextConfig(vision_config=vision, text_config=base.text_config.to_dict(), image_token_id=500,
                              image_grid_pinpoints=pinpoints)  # fmt: skip


def small_qwen() -> tf.PretrainedConfig:
    text = {**shapes.QWEN_7B, "bos_token_id": None, "eos_token_id": None, "vocab_size": 512, "hidden_size": 64,
            "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}  # fmt: skip
    vision = {**shapes.QWEN_VISION, "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
              "out_hidden_size": 64, "fullatt_block_indexes": [1]}  # fmt: skip
    return tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=500, video_token_id=501)


@pytest.mark.parametrize("config", [small_next, small_qwen, shapes.tiny])
@pytest.mark.parametrize("visual", [30, 57, 128])
def test_prompts_fit_the_model(config: Any, visual: int) -> None:
    model = tf.AutoModelForImageTextToText.from_config(config()).eval()
    prompt = shapes.random_prompt(model, 2, visual, 12)
    ids = prompt.inputs["input_ids"]
    assert ids.shape == (2, prompt.visual + 12)
    assert ((ids == 500).sum(1) == prompt.visual).all()
    with torch.inference_mode():  # raises where placeholders and features differ in number
        assert model(**prompt.inputs, logits_to_keep=1).logits.shape[:2] == (2, 1)


@pytest.mark.parametrize("config", [small_next, small_qwen])
def test_other_families_pass_the_gate_and_are_timed(config: Any) -> None:
    model = tf.AutoModelForImageTextToText.from_config(config()).eval()
    plans = [vlprune.Plan.parse(t) for t in ("random:keep=0.25", "fastv@1:keep=0.5", "fastv@cache:keep=0.5")]
    rows = Bout(model, shapes.random_prompt(model, 2, 100, 12), 2, 1, 0).rows(plans)
    for plan, found in zip(plans, rows, strict=True):
        assert found.failed is None
        assert found.kept == round(found.visual * plan.steps[0].budget.keep)
        assert found.language_floor is not None
        assert found.prefill_floor is not None
        assert found.decode is not None


@pytest.mark.parametrize(
    ("name", "billions"), [("llava-1.5-7b", 7.06), ("llava-next-7b", 7.06), ("qwen2.5-vl-7b", 8.29)]
)
def test_shapes_have_the_size_of_the_published_models(name: str, billions: float) -> None:
    with torch.device("meta"):
        model = tf.AutoModelForImageTextToText.from_config(shapes.SHAPES[name](), dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_spread_and_repeats() -> None:
    spread = Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 0.0])
    assert (spread.median, spread.p20, spread.p80) == (2.5, 1.0, 4.0)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    calls = iter(range(10))
    assert measure(lambda: {"x": float(next(calls))}, repeats=3, warmup=2)["x"].median == 3


def test_parts_of_a_prefill_add_up(tiny: Any) -> None:
    prompt, marks = shapes.random_prompt(tiny, 1, 64, 10), Marks(CPU)
    prefill(tiny, prompt.inputs, marks)
    order = ["start", "vision start", "vision end", "decoder start", "decoder end", "end"]
    assert sorted(marks.points, key=marks.points.get) == order  # type: ignore[arg-type]
    parts = prefill_parts(marks)
    assert parts["vision"] + parts["language"] == pytest.approx(parts["prefill"])
    assert prefill_times(tiny, prompt.inputs, repeats=2).prefill > 0
    assert not tiny.model.vision_tower._forward_hooks
