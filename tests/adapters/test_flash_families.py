"""The library's flash glue with stand-in kernels: packed pictures in the tower, two-dimensional masks in the decoder."""

from __future__ import annotations

import pytest
import tiny
import torch
from engine.test_flash import kernels  # noqa: F401  (a fixture)
from reference import TOLERANCE, apart, decode, uneven

import vlprune
from vlprune.adapters.base import find

PLANS = ["fastervlm@projector:keep=2:attention=received", "fastervlm:keep=2:attention=received", "fastv@2:keep=2",
         "flowcut:keep=2:variant=mean_query"]  # fmt: skip
# gemma3 and paligemma read pictures both ways, for which the library's flash path has no mask
CAUSAL = [family for family in tiny.FAMILIES if family not in ("gemma3", "paligemma")]


@pytest.mark.parametrize("family", CAUSAL)
def test_flash_equals_sdpa(model, inputs, kernels, family):  # noqa: F811
    m, flashing, x = model(family), tiny.FAMILIES[family]("sdpa")[0], inputs(family)
    adapter = find(flashing)
    for config in {id(c): c for c in (adapter.text.config, adapter.tower.config, flashing.config.text_config,
                                      adapter.block_attention(adapter.blocks[0]).config)}.values():  # fmt: skip
        config._attn_implementation = "flash_attention_2"
    if apart(m(**x).logits, flashing(**x).logits) > TOLERANCE:
        pytest.skip("this transformers computes something else under flash attention, unwrapped as well")
    plans = [p for p in PLANS if vlprune.supported(m, p)] + [uneven("projector", "1", "3"), uneven("cache")]
    assert len(plans) >= 5
    for plan in plans:
        found = []
        for one in (m, flashing):
            with vlprune.pruning(one, plan):
                found.append(decode(one, x, steps=4))
        assert torch.equal(found[0][0], found[1][0]), plan
        assert apart(found[0][1], found[1][1]) < TOLERANCE, plan
    assert "varlen" in kernels
    kernels.clear()
    names = {"pixel_values", "image_sizes", "image_grid_thw", "batch_num_images"} & x.keys()
    flashing.model.get_image_features(**{n: x[n] for n in names})
    assert set(kernels) == ({"varlen"} if family.startswith(("qwen", "mistral3")) else {"dense"})
