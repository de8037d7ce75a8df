"""Tiny models of every family, built once and handed out unwrapped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch

import vlprune

_shelf: dict[Any, Any] = {}


@pytest.fixture
def model() -> Iterator[Callable[..., Any]]:
    """`model(family, attn, **options)`: the same weights for a family, whatever the attention."""
    lent = []

    def make(family: str, attn: str = "sdpa", **options: Any) -> Any:
        lent.append(_made(family, attn, options)[0])
        return lent[-1]

    yield make
    for one in lent:
        vlprune.unwrap(one, missing_ok=True)


@pytest.fixture
def reference() -> Callable[..., Any]:
    """`reference(family, **options)`: the eager twin, never wrapped."""
    return lambda family, **options: _made(family, "eager", options, "reference")[0]


@pytest.fixture
def inputs() -> Callable[..., Any]:
    """`inputs(case, batch, **options)`: left-padded prompts of two rows with pictures of unequal sizes, two of them in one
    row; a case is a family, or a family and "+video"."""

    def make(case: str, batch: int = 2, **options: Any) -> Any:
        family, _, video = case.partition("+")
        more = {"video": True} if video else {}
        return _made(family, "sdpa", options)[1](batch=batch, **more)

    return make


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def _made(family: str, attn: str, options: dict[str, Any], role: str = "") -> Any:
    key = (family, attn, role, *sorted(options.items()))
    if key not in _shelf:
        _shelf[key] = tiny.FAMILIES[family](attn, **options)
    return _shelf[key]


def _has_video(family: str) -> bool:
    return "video" in inspect.signature(_made(family, "sdpa", {})[1]).parameters


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`family` runs over all families, `case` also over the videos of those that have them, unless a test says otherwise."""
    named = {name for mark in metafunc.definition.iter_markers("parametrize") for name in mark.args[0].split(",")}
    if "family" in metafunc.fixturenames and "family" not in named:
        metafunc.parametrize("family", list(tiny.FAMILIES))
    if "case" in metafunc.fixturenames and "case" not in named:
        cases = [c for f in tiny.FAMILIES for c in ([f, f"{f}+video"] if _has_video(f) else [f])]
        metafunc.parametrize("case", cases)
