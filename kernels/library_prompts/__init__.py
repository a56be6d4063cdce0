"""PGN's prompt mixture: each prompt is a weighted sum of the tokens of a shared library."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.kernels import dispatch
from fastprompt.kernels.library_prompts import reference

ACTIVATIONS = ("softmax", "sigmoid")


def library_prompts(logits: Tensor, library: Tensor, activation: str = "softmax", *, out: Tensor | None = None,
                    slot: int = 0) -> Tensor:
    """Prompts = activation(logits) · library (PGN §3, the token library).

    Args:
        logits: (B, K, M), one row of selection scores per prompt.
        library: (M, D), the learned tokens.
        activation: "softmax" over the library (each prompt a convex mix) or "sigmoid".
        out: (B, T, D), a sequence of the library's dtype, changed in place: the prompts are written into its rows
            slot … slot + K − 1, which saves the pass that would concatenate them. None: a fresh tensor.

    Returns:
        (B, K, D) prompts in the library's dtype, or `out`; weights are computed in float32 or wider.

    Raises:
        TypeError: `logits`, `library` or `out` is no floating-point tensor.
        ValueError: shapes, `slot` or `activation` do not fit.
        RuntimeError: `use_backend` asks for an implementation that cannot run.
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
    if out is not None:
        _check_out(out, logits, library, slot)
    if dispatch.choose("library_prompts", logits.device.type, _unsupported(logits, library)) == "triton":
        from fastprompt.kernels.library_prompts import triton

        return triton.library_prompts(logits, library, activation, out, slot)
    return reference.library_prompts(logits, library, activation, out, slot)


def _unsupported(logits: Tensor, library: Tensor) -> str:
    """Why the Triton kernels cannot take this call; empty: they can."""
    if torch.float64 in (logits.dtype, library.dtype):
        return "float64 is left to PyTorch"
    return "" if library.shape[0] else "the library is empty"


def _check_out(out: Tensor, logits: Tensor, library: Tensor, slot: int) -> None:
    if not isinstance(out, Tensor) or out.dtype != library.dtype:
        raise TypeError(f"out must have the library's dtype {library.dtype}, got {getattr(out, 'dtype', type(out))}")
    (b, k, _), d = logits.shape, library.shape[1]
    if out.ndim != 3 or out.shape[0] != b or out.shape[2] != d:
        raise ValueError(f"out must have shape ({b}, T, {d}), got {tuple(out.shape)}")
    if not 0 <= slot <= out.shape[1] - k:
        raise ValueError(f"slot must leave room for {k} prompts in {out.shape[1]} rows, got {slot}")
