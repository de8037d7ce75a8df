"""Golden vectors of tests/golden: the arrays of one file, with its parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden"


class Golden(NamedTuple):
    """``g["features"]`` is an array as a tensor, ``g.params["keep"]`` a parameter."""

    arrays: dict[str, Tensor]
    params: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:  # type: ignore[override]
        return self.arrays[name]


def load(name: str) -> Golden:
    """Read tests/golden/<name>.npz; dtypes stay as stored, text arrays go to `params`."""
    arrays: dict[str, Tensor] = {}
    params: dict[str, Any] = {}
    with np.load(FOLDER / f"{name}.npz") as file:
        for key in file.files:
            value = file[key]
            if value.dtype.kind in "US":
                params.update(json.loads(str(value)) if key.endswith("_json") else {key: str(value)})
            else:
                arrays[key] = torch.from_numpy(value)
    return Golden(arrays, params)


def names(prefix: str) -> list[str]:
    """Names of the files that start with `prefix`, sorted: what a test is parametrised over."""
    found = sorted(p.stem for p in FOLDER.glob(f"{prefix}*.npz"))
    if not found:
        raise FileNotFoundError(f"no golden file starts with {prefix!r} in {FOLDER.name}")
    return found
