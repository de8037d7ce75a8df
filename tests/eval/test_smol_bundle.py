"""The bundle of training's sources: carried in parts, checked, and enough to train from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from smol_toys import toy_bank, toy_language

from vlprune.errors import VlpruneError
from vlprune.eval.smol import blocks, training
from vlprune.eval.smol.assemble import open_tower
from vlprune.eval.smol.bundle import BANK, LANGUAGE, MANIFEST, join, main, pack
from vlprune.eval.smol.language import Language, store


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    lang, weights = toy_language(raw=True), folder / LANGUAGE
    stored = {k: v for k, v in lang.model.state_dict().items() if k != "lm_head.weight"}
    store(weights, stored, lang.model.config, lang.tokenizer)
    (folder / BANK).mkdir()
    return {LANGUAGE: weights, BANK: toy_bank(folder / BANK)}


@pytest.fixture(scope="module")
def parts(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parts")
    sizes = pack(folders, out, 2**18)
    assert sizes == {name: sum(p.stat().st_size for p in folder.iterdir()) for name, folder in folders.items()}
    assert all(path.stat().st_size <= 2**18 for path in out.iterdir())
    return out


def test_what_is_joined_is_what_was_packed(folders: dict[str, Path], parts: Path, tmp_path: Path) -> None:
    assert join([parts], tmp_path / "out") == []
    for name, folder in folders.items():
        found = sorted((tmp_path / "out" / name).iterdir())
        assert [path.name for path in found] == sorted(path.name for path in folder.iterdir())
        assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in found)
    assert "GPL-2" in (tmp_path / "out" / "README.md").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {LANGUAGE, BANK, "README.md"}
    pack(folders, tmp_path / "again", 2**18)
    assert (tmp_path / "again" / MANIFEST).read_bytes() == (parts / MANIFEST).read_bytes()


def test_parts_may_arrive_one_by_one(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *rest, last = sorted(parts.glob("part-*"))
    assert join([first], tmp_path) == [MANIFEST]
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path), "--join", str(parts / MANIFEST), *map(str, rest)])
    assert ended.value.code == 1 and capsys.readouterr().err.startswith(f"still missing: {last.name};")
    main(["--out", str(tmp_path), "--join", str(last)])
    assert "complete" in capsys.readouterr().out and (tmp_path / BANK).is_dir()


def test_a_damaged_part_is_named_and_the_others_are_kept(parts: Path, tmp_path: Path) -> None:
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for path in parts.iterdir():
        (arrived / path.name).write_bytes(path.read_bytes())
    content = bytearray((arrived / "part-001").read_bytes())
    content[9] ^= 1
    (arrived / "part-001").write_bytes(content)
    with pytest.raises(VlpruneError, match=r"damaged: part-001 \(262144 bytes of 262144\); their SHA-256"):
        join([arrived], tmp_path / "out")
    assert join([parts / "part-001"], tmp_path / "out") == []


def test_training_runs_from_the_bundle_alone(parts: Path, tmp_path: Path) -> None:
    join([parts], tmp_path / "bundle")
    training.main(["--bundle", str(tmp_path / "bundle"), "--out", str(tmp_path / "run"), "--steps", "1", "--batch", "1",
                   "--workers", "1", "--questions", "0"])  # fmt: skip
    assert open_tower(tmp_path / "run")


def test_a_stored_language_model_is_the_same(folders: dict[str, Path]) -> None:
    found, wanted = Language.open(folders[LANGUAGE]), toy_language()
    for (name, a), b in zip(wanted.model.state_dict().items(), found.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert found.tokenizer.encode("what is at <image>?<|im_end|>") == wanted.tokenizer.encode(
        "what is at <image>?<|im_end|>"
    )


@pytest.mark.parametrize(("kind", "head"), [(blocks.Q4_1, 2), (blocks.Q8_0, 1)])
def test_blocks_are_opened_as_their_formula_says(kind: str, head: int) -> None:
    rng = np.random.default_rng(3)
    scales = rng.standard_normal((2, 3, head)).astype(np.float16)
    bits = rng.integers(0, 256, (2, 3, 16 if kind == blocks.Q4_1 else 32), np.uint8)
    stored = np.concatenate([scales.view(np.uint8).reshape(2, 3, -1), bits], -1).reshape(2, -1)
    found = blocks.weights({f"w.{kind}": torch.from_numpy(stored), "norm": torch.ones(2)})
    assert found.keys() == {"w", "norm"} and found["w"].shape == (2, 96)
    for row, block, i in [(0, 0, 0), (0, 2, 15), (1, 1, 16), (1, 2, 31)]:
        d = np.float32(scales[row, block, 0])
        if kind == blocks.Q8_0:
            wanted = d * np.float32(bits[row, block].view(np.int8)[i])
        else:
            q = bits[row, block, i % 16] >> 4 if i >= 16 else bits[row, block, i % 16] & 15
            wanted = d * np.float32(q) + np.float32(scales[row, block, 1])
        assert found["w"][row, 32 * block + i].item() == wanted


def test_halves_of_a_head_come_together() -> None:
    rows = torch.arange(8)[:, None]  # two heads of four rows, as GGUF has them
    assert blocks.halves_together(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
