from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from laws.every import give_guide, llava

import vlprune


@pytest.fixture(autouse=True)
def guide(monkeypatch: pytest.MonkeyPatch) -> None:
    give_guide(monkeypatch)


@pytest.fixture
def model() -> Iterator[Any]:
    with torch.no_grad():
        yield llava()[0]
    vlprune.unwrap(llava()[0], missing_ok=True)


@pytest.fixture
def inputs() -> Any:
    return llava()[1]
