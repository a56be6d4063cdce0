"""Attention over [prompt keys and values, the tokens' own]."""

from __future__ import annotations

from torch import Tensor

from fastprompt.kernels.prefix_attention import recompute, reference


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None = None, prefix_v: Tensor | None = None,
                     scale: float | None = None) -> Tensor:
    """softmax(scale · q [prefix_k, k]ᵀ) [prefix_v, v].

    Args:
        q: (B, H, R, d). k, v: (B, H, T, d).
        prefix_k, prefix_v: (1 or B, H, P, d), shared by all images or one per image; None: plain attention.
        scale: of the scores; None: 1/√d.

    Returns:
        (B, H, R, d).

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q must be (B, H, R, d) and k, v (B, H, T, d), got {tuple(q.shape)}, {tuple(k.shape)}, "
                         f"{tuple(v.shape)}")
    if (prefix_k is None) != (prefix_v is None):
        raise ValueError("prefix_k and prefix_v must be given together")
    for name, prefix in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if prefix is None:
            continue
        if prefix.ndim != 4 or prefix.shape[0] not in (1, k.shape[0]) or prefix.shape[1] != k.shape[1] \
                or prefix.shape[3] != k.shape[3]:
            raise ValueError(f"{name} must be (1 or {k.shape[0]}, {k.shape[1]}, P, {k.shape[3]}), "
                             f"got {tuple(prefix.shape)}")
        if prefix_k is not None and prefix.shape != prefix_k.shape:
            raise ValueError(f"prefix_v must have the shape of prefix_k, {tuple(prefix_k.shape)}, "
                             f"got {tuple(prefix.shape)}")
        if prefix.dtype != k.dtype:
            raise ValueError(f"{name} must have the dtype of k, {k.dtype}, got {prefix.dtype}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if recompute.suits(q, k, v, prefix_k, prefix_v):
        return recompute.prefix_attention(q, k, v, prefix_k, prefix_v, scale)
    return reference.prefix_attention(q, k, v, prefix_k, prefix_v, scale)
