"""Tiny LLaVAs, built once and handed out unwrapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from reference import beams_see_their_pictures

import vlprune


@pytest.fixture(scope="session")
def shelf() -> dict[Any, Any]:
    return {}


@pytest.fixture
def llava(shelf: dict[Any, Any]) -> Iterator[Callable[..., Any]]:
    """`llava(attn, text, **config)`: the same weights for the same decoder, whatever the attention."""
    lent = []

    def make(attn: str = "sdpa", text: str = "llama", **config: Any) -> Any:
        key = (attn, text, *sorted(config.items()))
        if key not in shelf:
            shelf[key] = tiny.llava(attn, text, **config)[0]
        lent.append(shelf[key])
        return shelf[key]

    yield make
    for model in lent:
        vlprune.unwrap(model, missing_ok=True)


@pytest.fixture
def reference(shelf: dict[Any, Any]) -> Callable[..., Any]:
    """`reference(text, **config)`: the eager twin of `llava`, never wrapped."""

    def make(text: str = "llama", **config: Any) -> Any:
        key = ("reference", text, *sorted(config.items()))
        if key not in shelf:
            shelf[key] = tiny.llava("eager", text, **config)[0]
        return shelf[key]

    return make


@pytest.fixture(scope="session")
def grouped() -> bool:
    """Whether this transformers gives the beams of a prompt with two pictures those two."""
    model, inputs = tiny.llava()
    with torch.no_grad():
        return beams_see_their_pictures(model, inputs(3))


@pytest.fixture(scope="session")
def inputs() -> Callable[..., tiny.Inputs]:
    """`inputs(batch, seed)`: left-padded prompts with one, two and one pictures."""
    return tiny.llava()[1]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
