"""Public names of the tensor ops: plain torch everywhere, Triton kernels where they run."""

from __future__ import annotations

from vlprune.kernels.attention_rows import attention_rows
from vlprune.kernels.gather_cache import gather_cache
from vlprune.kernels.gather_tokens import gather_tokens
from vlprune.kernels.greedy_dpp import greedy_dpp
from vlprune.kernels.indexed_decode import indexed_decode
from vlprune.kernels.max_min import max_min
from vlprune.kernels.received_attention import received_attention
from vlprune.kernels.token_entropy import token_entropy
from vlprune.kernels.top_k import top_k

__all__ = [
    "attention_rows",
    "gather_cache",
    "gather_tokens",
    "greedy_dpp",
    "indexed_decode",
    "max_min",
    "received_attention",
    "token_entropy",
    "top_k",
]
