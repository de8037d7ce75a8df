"""Matrix entropy of every token's queries over heads."""

from __future__ import annotations

import torch
from torch import Tensor

from vlprune.kernels.dispatch import FLOATS, KernelError, choose, leading
from vlprune.kernels.token_entropy.reference import token_entropy as _reference

LARGEST = 64  # heads beyond which the kernel's matrices do not stay in registers


def token_entropy(
    queries: Tensor, *, normalize: str = "none", dtype: torch.dtype = torch.float64, backend: str = "auto"
) -> Tensor:
    """Entropy of the eigenvalues of each token's head-by-head Gram matrix.

        R = Q_t - mean_h Q_t in R^{H x d};  G = R R^T / H;  S_t = -sum_i lam_i log(lam_i) / log(H),  lam >= 1e-10

    A head width that is a multiple of 128 is first averaged down to 128, in consecutive groups, as the authors do.

    Args:
        queries: [H, N, d] or [B, H, N, d], H >= 2, any float dtype.
        normalize: "none" (the authors' code) or "trace", which divides G by its trace so that the entropy is that of a
            distribution; a token whose heads all agree then scores 0.
        dtype: torch.float64 or torch.float32, what it is computed in.
    Returns:
        [N] or [B, N] of `dtype`.
    Raises:
        KernelError: shapes or options that do not fit.
    Source: EntropyPrune, arXiv:2602.17196; YahongWang1/EntropyPrune, modeling_llama_self.py.
    """
    if queries.dim() not in (3, 4) or queries.shape[-3] < 2:
        raise KernelError(f"token_entropy needs [H, N, d] or [B, H, N, d] with H >= 2; got {tuple(queries.shape)}")
    if normalize not in ("none", "trace"):
        raise KernelError(f"normalize is 'none' or 'trace'; got {normalize!r}")
    if dtype not in (torch.float32, torch.float64):
        raise KernelError(f"token_entropy computes in float32 or float64; got {dtype}")

    def entropy(queries: Tensor) -> Tensor:
        x = queries[None] if queries.dim() == 3 else queries.flatten(0, -4)
        covered = x.dtype in FLOATS and x.shape[1] <= LARGEST
        if choose(backend, x, covered=covered) == "reference":
            out = _reference(x, normalize, dtype)
        else:
            from vlprune.kernels.token_entropy.triton import token_entropy as fast

            out = fast(x, normalize, dtype)
        return out.view(*queries.shape[:-3], queries.shape[-2])

    return leading(entropy, queries)
