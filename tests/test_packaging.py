"""The root folders must never shadow a library, and the wheel installs one name."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("room", ["kernels", "adapters", "eval"])
def test_root_rooms_are_no_packages(room: str) -> None:
    assert not (ROOT / room / "__init__.py").exists()
    assert (ROOT / "vlprune" / room).resolve() == (ROOT / room).resolve()


def test_python_started_in_the_root_runs_transformers() -> None:
    """`import kernels` would find our folder first; transformers asks for that library when it is installed."""
    code = """
import sys, importlib.util
assert sys.path[0] in ("", "."), sys.path[:2]
import torch, transformers
from transformers.utils import is_kernels_available
assert not is_kernels_available() or importlib.util.find_spec("kernels").origin is not None
config = transformers.LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=11)
model = transformers.LlamaForCausalLM(config)
print(model.generate(torch.tensor([[1, 2, 3]]), min_new_tokens=2, max_new_tokens=2, do_sample=False, pad_token_id=0).shape[1])
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == "5"


def test_wheel_has_one_top_level_name(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="needs setuptools>=77 (extra dev)")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("needs a git checkout to know which files belong to the project")
    source = tmp_path / "source"
    for name in filter(None, files.stdout.split("\0")):
        old, new = ROOT / name, source / name
        if name.startswith("tests/") or not old.exists():
            continue
        new.parent.mkdir(parents=True, exist_ok=True)
        if old.is_symlink():
            new.symlink_to(old.readlink())
        else:
            new.write_bytes(old.read_bytes())
    code = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=source, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {n.split("/")[0] for n in names if ".dist-info" not in n.split("/")[0]}
    assert top == {"vlprune"}
    for needed in ("vlprune/kernels/max_min/triton.py", "vlprune/adapters/llava.py", "vlprune/eval/tiny/synth.py",
                   "vlprune/models/tiny-llava/model.safetensors", "vlprune/py.typed"):  # fmt: skip
        assert needed in names, needed
