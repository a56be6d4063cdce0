"""PGN's prompt mixture: each prompt is a weighted sum of the tokens of a shared library."""

from __future__ import annotations

from torch import Tensor

from fastprompt.kernels.library_prompts import reference

ACTIVATIONS = ("softmax", "sigmoid")


def library_prompts(logits: Tensor, library: Tensor, activation: str = "softmax") -> Tensor:
    """Prompts = activation(logits) · library (PGN §3, the token library).

    Args:
        logits: (B, K, M), one row of selection scores per prompt.
        library: (M, D), the learned tokens.
        activation: "softmax" over the library (each prompt a convex mix) or "sigmoid".

    Returns:
        (B, K, D) prompts in the library's dtype; weights are computed in float32 or wider.

    Raises:
        TypeError: `logits` or `library` is no floating-point tensor.
        ValueError: shapes or `activation` do not fit.
    """
    for name, tensor in (("logits", logits), ("library", library)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(tensor, 'dtype', type(tensor))}")
    if logits.ndim != 3:
        raise ValueError(f"logits must have shape (B, K, M), got {tuple(logits.shape)}")
    if library.ndim != 2 or library.shape[0] != logits.shape[2]:
        raise ValueError(f"library must have shape (M, D) with M = {logits.shape[2]} as in logits, "
                         f"got {tuple(library.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    return reference.library_prompts(logits, library, activation)
