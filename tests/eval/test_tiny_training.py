"""Training: encoding equals the tokenizer, the twin equals transformers, a resumed run an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vlprune.errors import VlpruneError
from vlprune.eval.tiny import build_assets, export, item
from vlprune.eval.tiny.codec import CHATS, Codec
from vlprune.eval.tiny.data import Loader, Shape, Syllabus, all_sizes, squares
from vlprune.eval.tiny.evaluate import prompt
from vlprune.eval.tiny.net import NetConfig, TinyLlava
from vlprune.eval.tiny.optimizer import orthogonalise
from vlprune.eval.tiny.qwen import QwenConfig, TinyQwen
from vlprune.eval.tiny.synth import training_sample
from vlprune.eval.tiny.train import CONFIGS, Clock, Recipe, Trainer, train

SIZES = {"vision_dim": 16, "vision_layers": 2, "vision_heads": 2, "vision_mlp": 24, "dim": 16, "layers": 2, "heads": 2,
         "mlp": 24}  # fmt: skip
TINY = NetConfig(**SIZES)
TINY_QWEN = QwenConfig(**SIZES, kv_heads=1, full_layers=(1,), sections=(1, 1, 2))
RECIPE = Recipe(batch=2, warmup=2)
MIXED = Syllabus(((0.5, (Shape(2, (112, 224), 120, "small"),)), (0.5, (Shape(1, (224, 224), 140, "large"),))))


@pytest.mark.parametrize("family", list(CHATS))
def test_codec_equals_the_tokenizer(family: str) -> None:
    codec = Codec(family)
    chat = codec.chat
    for number in range(60):
        _, turns = training_sample(str(number), 1.0)
        for turn in turns:
            for start, first in ((chat.first, True), (chat.later, False)):
                text = f"{start}{turn.question}{chat.ask}{chat.lead}{turn.answer}{chat.end}"
                assert codec.question(turn.question, first) + codec.answer(turn.answer) == codec.encode(text)


@pytest.mark.parametrize("family", list(CHATS))
def test_tokenizer_asset_is_what_the_builder_builds(family: str, tmp_path: Path) -> None:
    chat = CHATS[family]
    build_assets.build_tokenizer(chat, tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == chat.tokenizer.read_bytes()


@pytest.mark.parametrize("syllabus", [squares(2), MIXED], ids=["squares", "mixed"])
def test_workers_deliver_what_one_process_draws(syllabus: Syllabus) -> None:
    codec = Codec()
    alone = Loader(codec, syllabus, seed=4, difficulty=lambda step: step / 8, workers=0, start=1)
    shared = Loader(codec, syllabus, seed=4, difficulty=lambda step: step / 8, workers=2, start=1)
    try:
        for _ in range(4):
            one, other = alone.next(), shared.next()
            assert all(np.array_equal(one[name], other[name]) for name in one)
    finally:
        shared.close()


def test_batches_of_all_sizes_cost_alike() -> None:
    """As many visual tokens in every batch, up to the last picture, and no size that windows of 112 pixels do not fill."""
    syllabus = all_sizes(192)
    shapes = [shape for _, group in syllabus.groups for shape in group]
    assert {shape.label for shape in shapes} == {"small", "medium", "large"}
    for shape in shapes:
        height, width = shape.size
        tokens = height * width // 28**2
        assert height % 112 == width % 112 == 0
        assert 192 * 192 - tokens < shape.batch * tokens <= 192 * 192
    assert max(shape.size[0] * shape.size[1] // 28**2 for shape in shapes) >= 1400
    assert [syllabus.shape(3, step) for step in range(9)] == [syllabus.shape(3, step) for step in range(9)]
    assert len({syllabus.shape(3, step) for step in range(60)}) > 20


def exhaust(loader: Loader) -> None:
    for _ in range(20):  # more than fit into the slots
        loader.next()


def test_dead_workers_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlprune.eval.tiny.data.PATIENCE", 0.05)
    loader = Loader(Codec(), squares(2), seed=4, difficulty=lambda step: 0.0, workers=1)
    try:
        loader.processes[0].kill()
        loader.processes[0].join()
        with pytest.raises(RuntimeError, match="have died"):
            exhaust(loader)
    finally:
        loader.close()


@pytest.mark.parametrize("config", [TINY, TINY_QWEN], ids=["llava", "qwen"])
def test_resumed_run_equals_uninterrupted_run(
    config: NetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"recipe": RECIPE, "config": config, "syllabus": MIXED if config is TINY_QWEN else None}
    whole = train(tmp_path / "whole", Clock(steps=6), **options)

    class Interrupted(Clock):
        def progress(self, step: int) -> float:
            if step >= 3:
                raise KeyboardInterrupt
            return super().progress(step)

    monkeypatch.setattr("vlprune.eval.tiny.train.CHECKPOINT_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", Interrupted(steps=6), **options)
    monkeypatch.undo()
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["step"] == 2
    parts = train(tmp_path / "parts", Clock(steps=6), **options, resume=True)
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


def test_training_goes_on_from_an_exported_checkpoint(tmp_path: Path) -> None:
    """What is exported and taken over again is the same up to bfloat16; other sizes are refused."""
    options = {"config": TINY_QWEN, "syllabus": MIXED}
    first = train(tmp_path / "first", Clock(steps=2), recipe=RECIPE, **options)
    idle = Recipe(batch=2, muon_lr=0.0, adam_lr=0.0)
    started = train(tmp_path / "second", Clock(steps=1), recipe=idle, start=tmp_path / "first" / "model", **options)
    for name, value in first.state_dict().items():
        assert torch.equal(value.bfloat16().float(), started.state_dict()[name]), name
    with pytest.raises(VlpruneError, match="does not fit a network of QwenConfig"):
        export.load(TinyQwen(QwenConfig(**SIZES, kv_heads=2, sections=(1, 1, 2))), tmp_path / "first" / "model")


@pytest.mark.parametrize("family", list(CONFIGS))
def test_training_lowers_the_loss(family: str) -> None:
    codec, config = Codec(family), {"llava": TINY, "qwen": TINY_QWEN}[family]
    trainer = Trainer(RECIPE, config, codec, Clock(steps=40), seed=1, device=torch.device("cpu"))
    arrays = Loader(codec, squares(2), seed=1, difficulty=lambda step: 0.0, workers=0).next()
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
    inputs = prompt(export.hf_processor(codec), [entry])
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


@pytest.mark.parametrize(
    "size", [(336, 448), (672, 224), (560, 448)]
)  # one of them with an odd number of windows a row
@torch.no_grad()
def test_qwen_twin_equals_transformers(size: tuple[int, int]) -> None:
    """float32 on both sides; only the order of sums differs."""
    torch.manual_seed(3)
    codec = Codec("qwen")
    net = TinyQwen(TINY_QWEN).eval()
    for parameter in net.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    entry = item("kv", 0, 9, size=size)
    inputs = prompt(export.hf_processor(codec), [entry])
    question = codec.question(entry.question, True)
    pixels = torch.from_numpy(np.array(entry.image))[None]
    height, width = pixels.shape[1:3]
    visual = net.visual(net.tower(pixels), (height, width))
    wanted = [*codec.prefix, *[codec.image] * visual.shape[1], *question]
    assert inputs["input_ids"][0].tolist() == wanted
    assert visual.shape[1] == height * width // 28**2

    parts = [net.text.embed_tokens(torch.tensor([ids])) for ids in (codec.prefix, question)]
    hidden = torch.cat([parts[0], visual, parts[1]], 1)
    positions = net.positions(len(codec.prefix), (height, width), len(question))
    logits = net.logits(net.text(hidden, positions))
    torch.testing.assert_close(logits, export.hf_model(net, codec)(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_labels_of_a_qwen_twin_follow_its_cells() -> None:
    """A patch that differs from all others has the label that differs from all others."""
    net = TinyQwen(TINY_QWEN).eval()
    pixels, labels = torch.zeros(1, 224, 336, 3, dtype=torch.uint8), torch.zeros(1, 5, 16, 24)
    pixels[:, 9 * 14 : 10 * 14, 17 * 14 : 18 * 14] = 255
    labels[:, :, 9, 17] = 1
    where = net.arranged(labels.flatten(2), (224, 336))[0, 0].argmax()
    embedded = []
    net.model.visual.patch_embed.register_forward_hook(lambda module, args, out: embedded.append(out))
    net.tower(pixels)
    distance = (embedded[0][0] - embedded[0][0].median(0).values).norm(dim=-1)
    assert distance.argmax() == where


def test_dropped_tokens_leave_the_others_where_they_are() -> None:
    kept = torch.tensor([[0, 5], [2, 3]])
    qwen, llava = TinyQwen(TINY_QWEN), TinyLlava(TINY)
    whole = qwen.positions(4, (56, 84), 3)  # 2 x 3 tokens
    assert whole[:, 4:10].tolist() == [[4] * 6, [4, 4, 4, 5, 5, 5], [4, 5, 6, 4, 5, 6]]
    assert whole[:, 10:].tolist() == [[7, 8, 9]] * 3
    thinned = qwen.thinned(whole, kept, 4, 3, close_up=True)
    assert thinned[:, 1].tolist() == [[0, 1, 2, 3, 4, 4, 7, 8, 9], [0, 1, 2, 3, 4, 5, 7, 8, 9],
                                      [0, 1, 2, 3, 6, 4, 7, 8, 9]]  # fmt: skip
    flat = llava.positions(3, (336, 336), 2)
    assert llava.thinned(flat, kept, 3, 2, close_up=False)[1].tolist() == [0, 1, 2, 5, 6, 579, 580]
    assert llava.thinned(flat, kept, 3, 2, close_up=True)[1].tolist() == list(range(7))


def test_orthogonalise_levels_singular_values() -> None:
    """Within the band that five steps of the tuned iteration reach."""
    for shape in ((2, 24, 40), (2, 40, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert values.min() > 0.5
        assert values.max() < 1.3
