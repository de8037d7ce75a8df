"""`device_map` over two devices: the same answers as on one. On GPUs where there are two, else on pretended ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as tf
from reference import apart, decode, text_model
from two_devices import CAN_PRETEND, CUTS, TOLERANCE, differences

import vlprune
from vlprune import ops

TESTS = Path(__file__).parents[1]
SCRIPT = str(TESTS / "two_devices.py")
IN_CI = {("llava", "tower"), ("qwen2_5_vl", "decoder")}
CASES = [pytest.param(family, cut, marks=() if (family, cut) in IN_CI else pytest.mark.slow)
         for family in tiny.FAMILIES for cut in CUTS]  # fmt: skip
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def pretend(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, in a process of its own."""
    pytest.importorskip("accelerate", reason="needs accelerate")
    if not CAN_PRETEND:
        pytest.skip(f"torch {torch.__version__} has no devices written in Python")
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600,
                          env={**os.environ, "PYTHONPATH": path})  # fmt: skip


@pytest.mark.parametrize(("family", "cut"), CASES)
def test_pretended(family: str, cut: str) -> None:
    done = pretend(SCRIPT, family, cut)
    assert not done.returncode, done.stdout or done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pretended_with_every_pruner(family: str, cut: str) -> None:
    done = pretend(SCRIPT, family, cut, "every")
    assert not done.returncode, done.stdout or done.stderr


def test_a_pretended_device_is_as_strict_as_a_real_one() -> None:
    code = ("import torch; from two_devices import pretended\n"
            "with pretended():\n"
            "    a, b = torch.ones(3, device='far:0'), torch.ones(3, device='far:1')\n"
            "    assert (a + b.to(a.device)).tolist() == [2, 2, 2] and (a + 1).device.index == 0\n"
            "    a + b")  # fmt: skip
    done = pretend("-c", code)
    assert "was given tensors of far:0, far:1" in done.stderr


@two_gpus
@pytest.mark.gpu
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_two_gpus(family: str, cut: str) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate")
    wrong = differences(family, cut, "cuda", every=True)
    assert not wrong, "\n".join(wrong)


@two_gpus
@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["divprune:keep=0.5+fastv@20:keep=0.3", "h2o:keep=0.5", "fastocr:keep=0.5:least=0"])
@torch.no_grad()
def test_auto(tmp_path: Path, plan: str) -> None:
    """The word that users write, on a model deep enough to be cut by it; what was made on the first GPU is expected."""
    config = tiny.qwen2_5_vl()[0].config
    config.text_config.num_hidden_layers = 40
    config.text_config.layer_types = ["full_attention"] * 40
    model = tiny.build(tf.Qwen2_5_VLForConditionalGeneration, config, "sdpa")
    model.save_pretrained(tmp_path)
    x = {k: v.cuda() for k, v in tiny.qwen2_5_vl()[1]().items()}
    vlprune.wrap(model.cuda(), plan)
    tokens, logits, _ = decode(model, x)
    split = tf.AutoModelForImageTextToText.from_pretrained(tmp_path, device_map="auto").eval()
    split.generation_config = model.generation_config
    assert {p.device.index for layer in text_model(split).layers for p in layer.parameters()} == {0, 1}
    vlprune.wrap(split, plan)
    found, near, _ = decode(split, x)
    assert torch.equal(found, tokens)
    assert apart(near.to(logits.device), logits) < 10 * TOLERANCE  # ten times as many layers as that was set for


@two_gpus
@pytest.mark.gpu
@torch.no_grad()
def test_kernels_run_where_their_tensors_are() -> None:
    """The current device stays the first one; the kernels' own tests are tests/kernels."""
    x: Any = torch.randn(3, 700, generator=torch.Generator().manual_seed(0))
    found = ops.top_k(x.to("cuda:1"), 64, backend="triton")
    assert found.device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(found.cpu(), ops.top_k(x, 64))
