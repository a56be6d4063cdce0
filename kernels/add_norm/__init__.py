"""A residual addition and the LayerNorm that reads it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.kernels import dispatch
from fastprompt.kernels.add_norm import reference

MAX_WIDTH = 8192  # a row stays in registers


def add_norm(x: Tensor, branch: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s = x + branch, rounded to their dtype, and (s − mean) / √(variance + eps) of each row.

    A norm's affine is no part of it: that of a frozen block moves into the Linear behind it.

    Args:
        x, branch: (..., D), alike in shape and dtype.

    Returns:
        s and its norm, both (..., D).

    Raises:
        TypeError: `x` is no floating-point tensor.
        ValueError: shape or dtype of `branch` is another.
        RuntimeError: `use_backend` asks for an implementation that cannot run.
    """
    call = dispatch.call_of("add_norm", x, branch, eps) if isinstance(x, Tensor) else None
    plans = dispatch.recall(call, "triton")
    if plans is not None:
        from fastprompt.kernels.add_norm import triton

        return triton.add_norm(x, branch, eps, plans)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x))}")
    if not x.ndim:
        raise ValueError("x must have at least one dimension, got a scalar")
    if branch.shape != x.shape or branch.dtype != x.dtype:
        raise ValueError(
            f"branch must be as x, {tuple(x.shape)} in {x.dtype}, got {tuple(branch.shape)} in {branch.dtype}"
        )
    arguments = (x, branch, eps)
    if x.device.type == "cuda" and torch.compiler.is_compiling() and dispatch.wanted() == "auto":
        return reference.add_norm(*arguments)  # which a compiler fuses with what is before and behind it
    backend = dispatch.choose(
        "add_norm",
        x.device.type,
        _unsupported(x),
        arguments=arguments,
        native=_unsupported_natively(x, branch),
        call=call,
    )
    if backend == "triton":
        from fastprompt.kernels.add_norm import triton

        return triton.add_norm(*arguments)
    if backend == "native":
        from fastprompt.kernels.add_norm import native

        return native.add_norm(*arguments)
    return reference.add_norm(*arguments)


def _unsupported(x: Tensor) -> str:
    """Why the Triton kernels cannot take these rows; empty: they can."""
    if x.dtype == torch.float64:
        return "float64 is left to PyTorch"
    return "" if x.shape[-1] <= MAX_WIDTH else f"the kernels take rows of at most {MAX_WIDTH}, not {x.shape[-1]}"


def _unsupported_natively(x: Tensor, branch: Tensor) -> str:
    """Why the native kernels cannot take this call; empty: they can."""
    if x.dtype not in (torch.float32, torch.bfloat16) or torch.is_autocast_enabled("cpu"):
        return f"the native kernels take float32 and bfloat16 without autocast, not {x.dtype}"
    return "" if x.is_contiguous() and branch.is_contiguous() else "the native kernels take contiguous tensors"
