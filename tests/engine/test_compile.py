"""Decoding with a static cache under torch.compile: one graph, no breaks, the same tokens."""

from __future__ import annotations

import pytest
import tiny
import torch
from reference import TOLERANCE, apart, decode, uneven

import vlprune


@pytest.mark.slow
@pytest.mark.parametrize("stages", [("projector",), ("2",)], ids="+".join)
def test_compiled_decode(inputs, stages):
    from transformers import CompileConfig

    model, x = tiny.llava()[0], inputs(3)
    vlprune.wrap(model, uneven(*stages))
    want_tokens, want_logits, _ = decode(model, x)
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True  # the library compiles on accelerators only, unless told
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    tokens, logits, _ = decode(model, x, cache_implementation="static", compile_config=config)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert torch.equal(tokens, want_tokens)
    assert apart(logits, want_logits) < TOLERANCE
