from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vlprune.errors import SpecError
from vlprune.kernels import dispatch
from vlprune.kernels.dispatch import KernelError, choose, power_of_two


def test_cpu_tensors_take_the_reference(monkeypatch):
    monkeypatch.delenv("VLPRUNE_KERNELS", raising=False)
    assert choose("auto", torch.zeros(2)) == "reference"
    assert choose("reference", torch.zeros(2)) == "reference"


def test_the_environment_decides_only_for_auto(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setenv("VLPRUNE_KERNELS", "triton")
    assert choose("auto", torch.zeros(2)) == "triton"
    assert choose("reference", torch.zeros(2)) == "reference"
    monkeypatch.setenv("VLPRUNE_KERNELS", "reference")
    assert choose("triton", torch.zeros(2)) == "triton"


def test_errors_say_what_to_do(monkeypatch):
    with pytest.raises(SpecError, match="did you mean triton"):
        choose("trition", torch.zeros(2))
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(KernelError, match="not installed"):
        choose("triton", torch.zeros(2))
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(KernelError, match="TRITON_INTERPRET=1"):
        choose("triton", torch.zeros(2))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(KernelError, match="no backward"):
        choose("triton", torch.zeros(2, requires_grad=True))
    with pytest.raises(KernelError, match="does not cover"):
        choose("triton", torch.zeros(2, dtype=torch.float64), covered=False)


def test_works_and_imports_without_triton():
    """A machine without Triton: the import is blocked, the ops run, nothing has tried to load it."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from vlprune import ops
q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 9, 8)
ops.attention_rows(q, k, scale=1.0, heads="mean")
ops.max_min(torch.randn(9, 4), 3)
ops.gather_tokens(torch.randn(1, 9, 4), torch.tensor([[0, -1]]))
assert not [name for name in sys.modules if name.startswith("vlprune.kernels.") and name.endswith(".triton")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("n", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_power_of_two(n, expected):
    assert power_of_two(n) == expected
    assert power_of_two(n, 16, 32) == max(16, min(32, expected))


@pytest.mark.gpu
def test_gpu_tests_run_compiled_kernels():
    """With TRITON_INTERPRET set, the GPU job would quietly test the interpreter."""
    from vlprune.kernels.gather_tokens.triton import copy_rows

    assert type(copy_rows).__name__ == "JITFunction"
