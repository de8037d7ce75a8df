"""lmms-eval runs pruned models through its own command line, and what goes wrong is never an empty answer."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import vlprune
from vlprune.errors import PruningError, SpecError, UnsupportedStage, VlpruneError
from vlprune.eval import shapes
from vlprune.eval.answering import HarnessTask
from vlprune.eval.checkpoints import load
from vlprune.eval.suites import SUITES, find, write_tasks
from vlprune.eval.tiny.evaluate import answer

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install --no-deps lmms-eval==0.7.3")
pytest.importorskip("datasets", reason="datasets is not installed: pip install 'vlprune[eval]'")

ITEMS, SEED = 3, 11
PLAN = "uniform:keep=0.111"
TASKS = {"tiny_vqa": "exact_match", "tiny_pope": "accuracy"}
installed = pytest.mark.skipif(
    not [e for e in entry_points(group="lmms_eval.models") if e.name == "vlprune"],
    reason="vlprune is not installed, so its entry point is not known: pip install -e .",
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), [*TASKS, "tiny_ocr"], n=ITEMS, seed=SEED)


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return load("tiny-llava", dtype="float32")


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Data set caches go to a folder of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        import datasets.config

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(os.environ["HF_DATASETS_CACHE"]))
        yield


def harness(arguments: list[str], cache: Path, launcher: tuple[str, ...] = ("-m", "lmms_eval")) -> str:
    """lmms-eval's own command line in a process of its own; it exits 0 even on errors, so results are what counts."""
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                   "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    done = subprocess.run([sys.executable, *launcher, *arguments], capture_output=True, text=True, env=environment)
    return done.stdout + done.stderr


def results(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("*_results.json")
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (path,) = folder.rglob(f"*_samples_{task}.jsonl")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda s: s["doc_id"])


def text(sample: dict[str, Any]) -> str:
    found = sample["filtered_resps"]
    return str(found[0] if isinstance(found, list) else found)


def direct(shipped: tuple[Any, Any], task: str, plan: str | None) -> tuple[list[str], float]:
    """Outputs and mean score of the same items without lmms-eval."""
    model, processor = shipped
    items = find(task).draw(ITEMS, SEED)
    if plan is None:
        outputs = [r.output for r in answer(model, processor, items)]
    else:
        with vlprune.pruning(model, plan):
            outputs = [r.output for r in answer(model, processor, items)]
    return outputs, sum(SUITES[task].score(o, i.answer) for o, i in zip(outputs, items, strict=True)) / ITEMS


@installed
def test_command_line_agrees_with_a_direct_run(tasks: Path, shipped: tuple[Any, Any], tmp_path: Path) -> None:
    """Two evaluations in one process, by lmms-eval's own --config: its start-up is most of the time."""
    runs = {"unpruned": "pretrained=tiny-llava,dtype=float32"}
    runs["pruned"] = f"{runs['unpruned']},plan={PLAN}"
    config = [{"model": "vlprune", "model_args": arguments, "tasks": ",".join(TASKS), "include_path": str(tasks),
               "batch_size": "2", "log_samples": True, "output_path": str(tmp_path / name)}
              for name, arguments in runs.items()]  # fmt: skip
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(config))
    log = harness(["--config", str(tmp_path / "runs.yaml")], tmp_path / "home")
    for name, plan in (("unpruned", None), ("pruned", PLAN)):
        found = results(tmp_path / name)
        for task, metric in TASKS.items():
            outputs, score = direct(shipped, task, plan)
            logged = samples(tmp_path / name, task)
            assert [text(s) for s in logged] == outputs, log
            assert found["results"][task][f"{metric},none"] == pytest.approx(score)
        throughput = found["throughput"]
        assert throughput["avg_visual_tokens"] == 576
        assert throughput["avg_kept_visual_tokens"] == (64 if plan else 576)
        assert throughput["avg_latency_ms"] > 0
        (setting,) = found["usage"]["by_source"]
        assert f"plan={plan or 'unpruned'} vlprune={vlprune.__version__} transformers=" in setting
        assert runs[name] == found["config"]["model_args"]
    held = {name: results(tmp_path / name)["throughput"]["avg_kv_bytes"] for name in runs}
    token = 8 * 2 * 256 * 4  # layers, keys and values, width, float32
    assert held["unpruned"] - held["pruned"] == (576 - 64) * token


@installed
@pytest.mark.slow
def test_two_processes_share_the_items(
    tasks: Path, shipped: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--model", "vlprune", "--model_args", f"pretrained=tiny-llava,dtype=float32,plan={PLAN}", "--tasks",
                 "tiny_vqa", "--include_path", str(tasks), "--batch_size", "1", "--log_samples", "--output_path",
                 str(tmp_path / "out")]  # fmt: skip
    # --multi_gpu is accelerate's launcher for several processes on one machine; the variable keeps them on the CPU
    launch = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 -m lmms_eval"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    log = harness(arguments, tmp_path / "home", ("-m", "accelerate.commands.launch", *launch.split()))
    logged = samples(tmp_path / "out", "tiny_vqa")
    outputs, score = direct(shipped, "tiny_vqa", PLAN)
    assert [s["doc_id"] for s in logged] == list(range(ITEMS)), log
    assert [text(s) for s in logged] == outputs
    assert results(tmp_path / "out")["results"]["tiny_vqa"]["exact_match,none"] == pytest.approx(score)
    assert "Running on rank 1" in log


def evaluate(model: Any, tasks: Path, name: str) -> dict[str, Any]:
    """lmms-eval in this process, without its own 2,000 tasks."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("ERROR", include_path=str(tasks), include_defaults=False)
    return simple_evaluate(model=model, tasks=[name], task_manager=manager, bootstrap_iters=0)  # type: ignore[no-any-return]


def test_a_lent_model_stays_loaded_and_batches_agree(tasks: Path, shipped: tuple[Any, Any]) -> None:
    from vlprune.eval.lmms_model import Vlprune

    model, processor = shipped
    lent = Vlprune.around(model, processor, 3)
    with vlprune.pruning(model, PLAN):
        found = evaluate(lent, tasks, "tiny_pope")
    outputs, score = direct(shipped, "tiny_pope", PLAN)
    assert [text(s) for s in found["samples"]["tiny_pope"]] == outputs
    assert found["results"]["tiny_pope"]["accuracy,none"] == score
    assert lent.model is model
    for method in (lent.loglikelihood, lent.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="not supported"):
            method([])


def test_compare_runs_harness_tasks_like_suites(tasks: Path, shipped: tuple[Any, Any], tmp_path: Path) -> None:
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("ERROR", include_path=str(tasks), include_defaults=False)
    task, ticks = HarnessTask("tiny_vqa", 2, tmp_path, manager), list[int]()
    with vlprune.pruning(shipped[0], PLAN):
        found = task.run(*shipped, 2, ticks.append)
    outputs, _ = direct(shipped, "tiny_vqa", PLAN)
    assert found.outputs == outputs[:2]
    assert found.value == sum(found.scores) / 2
    assert (found.visual, found.kept, found.layer_average, found.prefill_ms) == (576, 64, 64, None)
    assert found.latency_ms > 0
    assert ticks == [2]


def test_exceptions_are_raised_not_scored(
    tasks: Path, shipped: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlprune.eval.lmms_model import Vlprune

    model, processor = shipped

    def broken(**_: Any) -> Any:
        raise PruningError("the pruner broke")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(PruningError, match="the pruner broke"):
        evaluate(Vlprune.around(model, processor, 1), tasks, "tiny_pope")


def spoil(folder: Path, spoiled: dict[int, Any]) -> None:
    """Change the bytes of pictures in a written task."""
    import pyarrow
    import pyarrow.parquet as parquet

    path = folder / "tiny_pope.parquet"
    table = parquet.read_table(path)
    pictures = table.column("image").to_pylist()
    for number, change in spoiled.items():
        pictures[number]["bytes"] = change(pictures[number]["bytes"])
    position = table.schema.get_field_index("image")
    field = table.schema.field("image")
    parquet.write_table(table.set_column(position, field, pyarrow.array(pictures, field.type)), path)


def test_broken_pictures_are_named_and_counted(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    from vlprune.eval.lmms_model import Vlprune

    write_tasks(tmp_path, ["tiny_pope"], n=4, seed=SEED)
    spoil(tmp_path, {1: lambda data: b"no picture", 3: lambda data: data[::-1]})
    with pytest.raises(VlpruneError, match=r"2 of 4 pictures cannot be read: tiny_pope/1 .*; tiny_pope/3 "):
        evaluate(Vlprune.around(*shipped, 2), tmp_path, "tiny_pope")


def test_truncated_pictures_are_named_and_counted(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    from loguru import logger
    from PIL import ImageFile

    from vlprune.eval.lmms_model import Vlprune

    write_tasks(tmp_path, ["tiny_pope"], n=2, seed=SEED)
    spoil(tmp_path, {1: lambda data: data[: len(data) // 2]})
    heard: list[str] = []
    handle = logger.add(heard.append, level="WARNING", format="{message}")
    found = evaluate(Vlprune.around(*shipped, 2), tmp_path, "tiny_pope")
    logger.remove(handle)
    assert found["throughput"]["avg_truncated_pictures"] == 1
    assert "1 pictures are cut short: tiny_pope/1" in "".join(heard)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True  # as lmms-eval had it


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"plan": "nosuch:keep=0.5"}, SpecError, "unknown pruner 'nosuch'"),
        ({"keep": 0.5}, SpecError, "keep= needs plan="),
        ({"plan": "uniform", "keep": 0.5, "prune": 1}, SpecError, "unknown model arguments: prune"),
        ({"batch_size": "auto"}, SpecError, "batch_size='auto'"),
        ({"pretrained": "./gone/away/now"}, SpecError, "there is no checkpoint folder"),
        ({"pretrained": "tiny-lava"}, SpecError, "did you mean tiny-llava"),
        ({"plan": "uniform@40:keep=0.5"}, UnsupportedStage, "layers 0 to 7"),
    ],
)
def test_bad_arguments_fail_before_the_first_sample(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    from vlprune.eval.lmms_model import Vlprune

    with pytest.raises(error, match=words):
        Vlprune(**{"pretrained": "tiny-llava", "device": "cpu", **arguments})


def test_generation_arguments_and_stops(shipped: tuple[Any, Any]) -> None:
    from vlprune.eval.lmms_model import Vlprune

    lent = Vlprune.around(*shipped, 1)
    asked = {"max_new_tokens": 4, "temperature": 0.0, "top_p": None, "do_sample": False, "until": ["\n"]}
    greedy = lent._generation(asked)
    assert greedy == {"max_new_tokens": 4, "do_sample": False, "pad_token_id": lent.processor.tokenizer.pad_token_id}
    sampled = lent._generation({"temperature": 0.7, "top_p": 0.9, "num_beams": 2})
    assert sampled["do_sample"] is True
    assert (sampled["temperature"], sampled["top_p"], sampled["num_beams"]) == (0.7, 0.9, 2)
    assert sampled["max_new_tokens"] == 1024


def test_bytes_of_a_token_agree_with_a_real_cache() -> None:
    from vlprune.eval.lmms_model import kv_bytes_per_token
    from vlprune.eval.timing import Marks, prefill

    device = torch.device("cpu")
    model = shapes.load("tiny", torch.bfloat16, "sdpa", device).model
    prompt = shapes.random_prompt(model, 2, 64, 7)
    layers = prefill(model, prompt.inputs, Marks(device)).past_key_values.layers
    held = sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))
    assert held == 2 * (prompt.visual + 7) * kv_bytes_per_token(model)


def test_manifest_is_light_and_names_a_chat_model() -> None:
    from vlprune.eval import lmms

    tree = ast.parse(Path(lmms.__file__).read_text())  # lmms-eval reads it at every start, whatever model it runs
    heavy = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert {getattr(n, "module", None) for n in heavy} == {"__future__", "typing"}
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    for manifest in lmms.manifests():
        registry.register_manifest(manifest)
    assert registry.get_model_class("vlprune").__name__ == "Vlprune"
    assert registry.resolve("vlprune").model_type == "chat"
