"""How much attention every token receives, without the attention map."""

from __future__ import annotations

from torch import Tensor

from vlprune.kernels.attention_rows import REDUCTIONS
from vlprune.kernels.dispatch import FLOATS, KernelError, choose, shapes
from vlprune.kernels.received_attention.reference import received_attention as _reference


def received_attention(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    heads: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Column means of the softmaxed attention map, over all query rows.

        out[b, h, s] = (1 / L) sum_l softmax_s(scale * q[b, h, l] . k[b, h // (H // Hkv), s] + mask);  reduced over h

    For vision encoders without a CLS token. Rows with no visible key count as zeros. For a causal map see
    `attention_rows` with `limit`.

    Args:
        query: [B, H, L, d] after RoPE.
        key: [B, Hkv, L, d].
        mask: broadcastable to [B, H, L, L], bool (True is visible) or a float that is added.
        heads: "none", "mean", "max" or "sum", applied last.
    Returns:
        [B, L], or [B, H, L] with heads="none"; float32 (float64 for float64 inputs).
    Raises:
        KernelError: shapes that do not fit.
    """
    if query.dim() != 4 or key.dim() != 4 or query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise KernelError(
            f"received_attention needs query [B, H, L, d] and key [B, Hkv, L, d]; got {shapes(query=query, key=key)}"
        )
    if query.shape[1] % key.shape[1]:
        raise KernelError(
            f"the number of query heads must be a multiple of the key heads; got {shapes(query=query, key=key)}"
        )
    if heads not in REDUCTIONS:
        raise KernelError(f"unknown reduction {heads!r}; heads takes one of {', '.join(REDUCTIONS)}")
    if mask is not None:
        b, h, n, _ = query.shape
        try:
            mask = mask.expand(b, h, n, n)
        except RuntimeError:
            raise KernelError(f"mask {tuple(mask.shape)} does not broadcast to {(b, h, n, n)}") from None
    covered = query.dtype in FLOATS and key.dtype == query.dtype
    if choose(backend, query, key, covered=covered) == "reference":
        return _reference(query, key, scale, mask, heads)
    from vlprune.kernels.received_attention.triton import received_attention as fast

    return fast(query, key, scale, mask, heads)
