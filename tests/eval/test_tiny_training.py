"""Training: encoding equals the tokenizer, the twin equals transformers, a resumed run an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vlprune.errors import VlpruneError
from vlprune.eval.tiny import build_assets, export, item
from vlprune.eval.tiny.codec import TOKENIZER, Codec
from vlprune.eval.tiny.data import Loader
from vlprune.eval.tiny.evaluate import prompt
from vlprune.eval.tiny.net import NetConfig, TinyLlava
from vlprune.eval.tiny.optimizer import orthogonalise
from vlprune.eval.tiny.synth import training_sample
from vlprune.eval.tiny.train import Clock, Recipe, Trainer, train

TINY = NetConfig(vision_dim=16, vision_layers=2, vision_heads=2, vision_mlp=24, dim=16, layers=2, heads=2, mlp=24)
RECIPE = Recipe(batch=2, warmup=2)


def test_codec_equals_the_tokenizer() -> None:
    codec = Codec()
    for number in range(60):
        _, turns = training_sample(str(number), 1.0)
        for turn in turns:
            text = f"\n{turn.question} ASSISTANT: {turn.answer}</s>"
            assert codec.question(turn.question, True) + codec.answer(turn.answer) == codec.encode(text)


def test_tokenizer_asset_is_what_the_builder_builds(tmp_path: Path) -> None:
    build_assets.build_tokenizer(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == TOKENIZER.read_bytes()


def test_workers_deliver_what_one_process_draws() -> None:
    codec = Codec()
    alone = Loader(codec, 2, seed=4, difficulty=lambda step: step / 8, workers=0, start=1)
    shared = Loader(codec, 2, seed=4, difficulty=lambda step: step / 8, workers=2, start=1)
    try:
        for _ in range(4):
            one, other = alone.next(), shared.next()
            assert all(np.array_equal(one[name], other[name]) for name in one)
    finally:
        shared.close()


def exhaust(loader: Loader) -> None:
    for _ in range(20):  # more than fit into the slots
        loader.next()


def test_dead_workers_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlprune.eval.tiny.data.PATIENCE", 0.05)
    loader = Loader(Codec(), 2, seed=4, difficulty=lambda step: 0.0, workers=1)
    try:
        loader.processes[0].kill()
        loader.processes[0].join()
        with pytest.raises(RuntimeError, match="have died"):
            exhaust(loader)
    finally:
        loader.close()


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path / "whole", Clock(steps=6), recipe=RECIPE, config=TINY)

    class Interrupted(Clock):
        def progress(self, step: int) -> float:
            if step >= 3:
                raise KeyboardInterrupt
            return super().progress(step)

    monkeypatch.setattr("vlprune.eval.tiny.train.CHECKPOINT_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", Interrupted(steps=6), recipe=RECIPE, config=TINY)
    monkeypatch.undo()
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["step"] == 2
    parts = train(tmp_path / "parts", Clock(steps=6), recipe=RECIPE, config=TINY, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name


def test_runs_are_not_overwritten_or_resumed_from_nothing(tmp_path: Path) -> None:
    with pytest.raises(VlpruneError, match="no checkpoint to resume"):
        train(tmp_path, Clock(steps=1), recipe=RECIPE, config=TINY, resume=True)
    train(tmp_path, Clock(steps=1), recipe=RECIPE, config=TINY)
    with pytest.raises(VlpruneError, match="a run lies there"):
        train(tmp_path, Clock(steps=1), recipe=RECIPE, config=TINY)
    with pytest.raises(VlpruneError, match="seed 1, not 2"):
        train(tmp_path, Clock(steps=2), recipe=RECIPE, config=TINY, seed=2, resume=True)


def test_training_lowers_the_loss() -> None:
    codec = Codec()
    trainer = Trainer(RECIPE, TINY, codec, Clock(steps=40), seed=1, device=torch.device("cpu"))
    arrays = Loader(codec, 2, seed=1, difficulty=lambda step: 0.0, workers=0).next()
    batch = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    losses = [statistics[0].item() for _ in range(14) if (statistics := trainer.step(batch)) is not None]
    assert losses[-1] < losses[0] - 0.4


def test_clock_counts_seconds_after_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(seconds=50)
    now[0] = 110.0
    assert clock.progress(7) == 0.0
    clock.start()
    now[0] = 130.0
    assert clock.progress(99) == pytest.approx(20 / 40)
    with pytest.raises(VlpruneError, match="either steps or seconds"):
        Clock()


@torch.no_grad()
def test_twin_equals_transformers() -> None:
    """float32 on both sides; only the order of sums differs."""
    torch.manual_seed(3)
    codec = Codec()
    net = TinyLlava(TINY).eval()
    for parameter in net.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    entry = item("kv", 0, 9)
    inputs = prompt(export.hf_processor(), [entry])
    question = codec.question(entry.question, True)
    wanted = [*codec.prefix, *[codec.image] * TINY.tokens, *question]
    assert inputs["input_ids"][0].tolist() == wanted

    pixels = torch.from_numpy(np.array(entry.image))[None]
    states = net.model.vision_tower(pixels)
    embed = net.model.language_model.embed_tokens
    parts = [embed(torch.tensor([codec.prefix])), net.model.multi_modal_projector(states[:, 1:])]
    hidden = torch.cat([*parts, embed(torch.tensor([question]))], 1)
    logits = net.logits(net.model.language_model(hidden, torch.arange(hidden.shape[1])))
    hf = export.hf_model(net, codec)
    torch.testing.assert_close(logits, hf(**inputs).logits, rtol=1e-4, atol=1e-5)
    pooled = hf.model.vision_tower(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(net.model.vision_tower.pooled(states), pooled, rtol=1e-4, atol=1e-5)


def test_orthogonalise_levels_singular_values() -> None:
    """Within the band that five steps of the tuned iteration reach."""
    for shape in ((2, 24, 40), (2, 40, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert values.min() > 0.5
        assert values.max() < 1.3
