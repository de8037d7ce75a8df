"""Small suites that need no download: pictures drawn from a seed, and easy_vqa, which others made.

    python -m vlprune.eval.suites OUT --items 200

writes them as lmms-eval tasks, to be run with `lmms-eval --include_path OUT --tasks tiny_vqa,tiny_pope,...`.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from string import Template

from PIL import Image

from vlprune.errors import SpecError, VlpruneError, nearest
from vlprune.eval.files import output_folder, read_all, reporting, write
from vlprune.eval.tiny import Item, items
from vlprune.eval.tiny.drawing import Box
from vlprune.eval.tiny.evaluate import edit_distance
from vlprune.eval.tiny.vocabulary import SCENE_TASKS

VQA = tuple(task for task in SCENE_TASKS if task != "exist")
TEMPLATES = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class Suite:
    """Questions of one kind. `score(output, answer)` is in [0, 1], higher is better."""

    name: str
    what: str
    draw: Callable[[int, int], list[Item]]  # (items, seed)
    score: Callable[[str, str], float]


def exact(output: str, answer: str) -> float:
    """1 where both agree but for case, outer spaces and a final full stop."""
    return float(_plain(output) == _plain(answer))


def yes_no(output: str, answer: str) -> float:
    """1 where the first word is the answer."""
    words = output.replace(",", " ").split()
    return exact(words[0], answer) if words else 0.0


def characters(output: str, answer: str) -> float:
    """Share of right characters: 1 - edit distance / length of the answer, at least 0."""
    return max(0.0, 1 - edit_distance(output.strip(), answer) / len(answer))


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").casefold()


def _mixed(n: int, seed: int) -> list[Item]:
    """Every kind of question about scenes in turn; existence is `tiny_pope`."""
    rounds = -(-n // len(VQA))
    drawn = {task: items(task, rounds, seed) for task in VQA}
    return [drawn[VQA[i % len(VQA)]][i // len(VQA)] for i in range(n)]


def _easy_vqa(n: int, seed: int) -> list[Item]:
    """n questions of easy-vqa's test split, drawn without replacement."""
    texts, answers, pictures, paths = _easy_vqa_files()
    if n > len(texts):
        raise SpecError(f"easy_vqa has {len(texts)} test questions, {n} were asked for")
    chosen = random.Random(seed).sample(range(len(texts)), n)
    images = read_all((f"easy_vqa/{i}", partial(_rgb, paths[pictures[i]])) for i in chosen)
    return [
        Item("easy_vqa", i, seed, image, texts[i], answers[i], (), Box(0, 0, *image.size))
        for i, image in zip(chosen, images, strict=True)
    ]


def _rgb(path: str) -> Image.Image:
    return Image.open(path).convert("RGB")


@cache
def _easy_vqa_files() -> tuple[list[str], list[str], list[int], dict[int, str]]:
    try:
        import easy_vqa
    except ImportError as error:
        raise VlpruneError("easy_vqa needs the package easy-vqa: pip install 'vlprune[eval]'") from error
    return *easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()


def _smol(task: str) -> Callable[[int, int], list[Item]]:
    """A held-out task of smol-llava; its sources are collected first (`vlprune.eval.smol.sources`)."""

    def draw(n: int, seed: int) -> list[Item]:
        from vlprune.eval.smol.pictures import items as smol_items
        from vlprune.eval.smol.sources import Bank

        return smol_items(task, n, seed, Bank.open("held-out"))

    return draw


def majority_answer() -> str:
    """The most frequent answer in easy-vqa's training split: what a model that never looks would say."""
    import easy_vqa

    return str(Counter(easy_vqa.get_train_questions()[1]).most_common(1)[0][0])


SUITES = {
    suite.name: suite
    for suite in (
        Suite("tiny_vqa", "eight kinds of questions about scenes", _mixed, exact),
        Suite("tiny_pope", "is it there? half yes, half no", lambda n, seed: items("exist", n, seed), yes_no),
        Suite("tiny_kv", "the value of a key on a receipt", lambda n, seed: items("kv", n, seed), exact),
        Suite("tiny_ocr", "whole pages, by right characters", lambda n, seed: items("page", n, seed), characters),
        Suite("tiny_page", "whole sheets, by right characters", lambda n, seed: items("document", n, seed), characters),
        Suite("easy_vqa", "shapes and colours of the package easy-vqa", _easy_vqa, exact),
        Suite("smol_what", "what kind of thing is there?", _smol("what"), exact),
        Suite("smol_where", "in which quarter of the picture?", _smol("where"), exact),
        Suite("smol_count", "how many of a kind?", _smol("count"), exact),
        Suite("smol_exist", "is there one? half yes, half no", _smol("exist"), yes_no),
        Suite("smol_kv", "the value of a key, in other typefaces", _smol("kv"), exact),
        Suite("smol_line", "a line of a manual, by right characters", _smol("line"), characters),
    )
}
READY = tuple(name for name in SUITES if not name.startswith("smol_"))  # those that need nothing collected


def find(name: str) -> Suite:
    if name not in SUITES:
        raise SpecError(f"unknown suite {name!r}{nearest(name, SUITES)} (suites: {', '.join(SUITES)})")
    return SUITES[name]


# ---- as lmms-eval tasks


def write_tasks(folder: str | Path, names: Sequence[str] = READY, n: int = 200, seed: int = 0) -> Path:
    """Draw suites into a folder that lmms-eval takes as --include_path; returns its absolute path.

    Raises:
        SpecError: an unknown suite.
        VlpruneError: the folder cannot be written to, or the package `datasets` is missing.
    """
    chosen = [find(name) for name in names]
    try:
        from datasets import Dataset, Features, Value
        from datasets import Image as Picture
    except ImportError as error:
        raise VlpruneError("writing tasks needs the package datasets: pip install 'vlprune[eval]'") from error
    out = output_folder(folder).resolve()  # lmms-eval reads the paths in task files against its own working folder
    features = Features({"image": Picture(), "question": Value("string"), "answer": Value("string"),
                         "kind": Value("string")})  # fmt: skip
    for suite in chosen:
        drawn = suite.draw(n, seed)
        rows = {"image": [i.image for i in drawn], "question": [i.question for i in drawn],
                "answer": [i.answer for i in drawn], "kind": [i.task for i in drawn]}  # fmt: skip
        data = out / f"{suite.name}.parquet"
        with reporting(data):
            Dataset.from_dict(rows, features=features).to_parquet(str(data))
        template = Template((TEMPLATES / f"{suite.name}.yaml").read_text())
        write(
            out / f"{suite.name}.yaml", template.substitute(data=data)
        )  # lmms-eval resolves paths against its own folder
    for shared in ("_common", "utils.py"):
        write(out / shared, (TEMPLATES / shared).read_text())
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vlprune.eval.suites", description="Write suites as lmms-eval tasks."
    )
    parser.add_argument("folder")
    parser.add_argument("--suites", default=",".join(READY), help=f"comma-separated, of {', '.join(SUITES)}")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    out = write_tasks(options.folder, options.suites.split(","), options.items, options.seed)
    print(f"lmms-eval --include_path {out} --tasks {options.suites}")


if __name__ == "__main__":
    main()
