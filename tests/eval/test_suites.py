"""Suites are the same for everybody, balanced where they claim it, and travel to lmms-eval unchanged."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from vlprune.errors import SpecError, VlpruneError
from vlprune.eval import suites
from vlprune.eval.suites import SUITES, characters, exact, find, majority_answer, yes_no

SYNTHETIC = [name for name in SUITES if name.startswith("tiny_")]


@pytest.mark.parametrize("name", SYNTHETIC)
def test_an_item_depends_on_seed_and_number_only(name: str) -> None:
    few, more, other = find(name).draw(2, 3), find(name).draw(5, 3), find(name).draw(2, 4)
    for a, b in zip(few, more, strict=False):
        assert (a.question, a.answer) == (b.question, b.answer)
        assert a.image.tobytes() == b.image.tobytes()
    assert [i.image.tobytes() for i in few] != [i.image.tobytes() for i in other]


def test_answers_are_balanced() -> None:
    assert [i.answer for i in find("tiny_pope").draw(6, 0)] == ["yes", "no"] * 3
    assert [i.task for i in find("tiny_vqa").draw(16, 0)] == [*suites.VQA, *suites.VQA]
    assert "exist" not in suites.VQA


@pytest.mark.parametrize(
    ("score", "output", "answer", "expected"),
    [
        (exact, "Red.", "red", 1.0),
        (exact, " red circle", "red", 0.0),
        (exact, "33.0", "33.0", 1.0),
        (yes_no, "Yes, there is.", "yes", 1.0),
        (yes_no, "no", "yes", 0.0),
        (yes_no, "", "no", 0.0),
        (yes_no, "nothing", "no", 0.0),
        (characters, "ABCD", "ABCE", 0.75),
        (characters, "", "ABCE", 0.0),
        (characters, "a far too long answer", "ABCE", 0.0),
        (characters, "AB\nCD ", "AB\nCD", 1.0),
    ],
)
def test_scores(score, output: str, answer: str, expected: float) -> None:  # type: ignore[no-untyped-def]
    assert score(output, answer) == expected


def test_unknown_suites_name_the_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean tiny_pope"):
        find("tinypope")


def test_easy_vqa_draws_from_the_package() -> None:
    drawn = find("easy_vqa").draw(40, 1)
    assert len({(i.index, i.question) for i in drawn}) == 40
    assert {i.image.size for i in drawn} == {(64, 64)}
    assert majority_answer() == "yes"
    assert 0 < sum(i.answer == "yes" for i in drawn) < 40
    with pytest.raises(SpecError, match="9673 test questions"):
        find("easy_vqa").draw(10_000, 0)


def test_broken_pictures_are_named_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, cut = tmp_path / "0.png", tmp_path / "1.png"
    Image.new("RGB", (64, 64), "red").save(good)
    cut.write_bytes(good.read_bytes()[:60])
    files = (["q"] * 4, ["a"] * 4, [0, 1, 2, 0], {0: str(good), 1: str(cut), 2: str(tmp_path / "gone.png")})
    monkeypatch.setattr(suites, "_easy_vqa_files", lambda: files)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # importing lmms-eval sets it for the whole process
    with pytest.raises(VlpruneError, match=r"2 of 4 pictures cannot be read: .*easy_vqa/[12] .*easy_vqa/[12] "):
        find("easy_vqa").draw(4, 0)


def test_written_tasks_hold_the_items(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    import pyarrow.parquet as parquet
    import yaml

    out = suites.write_tasks(tmp_path / "new", ["tiny_kv", "easy_vqa"], n=3, seed=5)
    assert sorted(p.name for p in out.iterdir()) == [
        "_common", "easy_vqa.parquet", "easy_vqa.yaml", "tiny_kv.parquet", "tiny_kv.yaml", "utils.py",
    ]  # fmt: skip
    rows = parquet.read_table(out / "tiny_kv.parquet").to_pylist()
    for row, item in zip(rows, find("tiny_kv").draw(3, 5), strict=True):
        assert (row["question"], row["answer"], row["kind"]) == (item.question, item.answer, "kv")
        assert Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB").tobytes() == item.image.tobytes()
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    task = yaml.load((out / "tiny_kv.yaml").read_text(), loader)
    assert task["dataset_kwargs"]["data_files"]["test"] == str(out / "tiny_kv.parquet")
    assert Path(task["dataset_kwargs"]["data_files"]["test"]).is_absolute()


def test_tasks_need_a_folder_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(VlpruneError, match=r"cannot write .*taken.*another output folder"):
        suites.write_tasks(tmp_path / "taken" / "inside", ["tiny_kv"], n=1)


def test_a_full_disk_is_one_error_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlprune.eval import files

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    files.write(tmp_path / "a.txt", "before")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(VlpruneError, match="No space left on device; free some space"):
        files.write(tmp_path / "a.txt", "after")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "before"
