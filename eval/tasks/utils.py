"""What the task files beside this one refer to; lmms-eval imports it from the folder the tasks were written to."""

from __future__ import annotations

from typing import Any

from vlprune.eval.suites import characters, exact, majority_answer, yes_no
from vlprune.eval.tiny.evaluate import edit_distance

Doc = dict[str, Any]


def visual(doc: Doc) -> list[Any]:
    return [doc["image"].convert("RGB")]


def text(doc: Doc, lmms_eval_specific_kwargs: Any = None) -> str:
    return str(doc["question"])


def score_exact(doc: Doc, results: list[str]) -> dict[str, float]:
    return {"exact_match": exact(results[0], doc["answer"])}


def score_yes_no(doc: Doc, results: list[str]) -> dict[str, float]:
    return {"accuracy": yes_no(results[0], doc["answer"]), "yes_share": yes_no(results[0], "yes")}


def score_characters(doc: Doc, results: list[str]) -> dict[str, Any]:
    output, answer = results[0].strip(), doc["answer"]
    return {
        "characters": characters(output, answer),
        "character_error": (edit_distance(output, answer), len(answer)),
        "exact_match": exact(output, answer),
    }


def error_rate(pairs: list[tuple[int, int]]) -> float:
    """Wrong characters of all answers over characters of all answers."""
    return sum(wrong for wrong, _ in pairs) / sum(length for _, length in pairs)


def score_easy_vqa(doc: Doc, results: list[str]) -> dict[str, float]:
    return {
        "exact_match": exact(results[0], doc["answer"]),
        "majority_answer": exact(majority_answer(), doc["answer"]),
    }
