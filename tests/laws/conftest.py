from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import vlprune
from laws.every import llava


@pytest.fixture
def model() -> Iterator[Any]:
    with torch.no_grad():
        yield llava()[0]
    vlprune.unwrap(llava()[0], missing_ok=True)


@pytest.fixture
def inputs() -> Any:
    return llava()[1]
