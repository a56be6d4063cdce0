"""Layouts of tensors that kernels read without strides: what a forward wrote for its backward."""

from __future__ import annotations

from torch import Tensor


def row_major(x: Tensor) -> Tensor:
    """`x` with adjacent rows and elements: itself, or a copy where others gave it new memory in between.

    A saved-tensor hook that moves tensors to the host and back may return other strides, and so may a compiler.
    """
    return x.contiguous()


def heads_last(x: Tensor) -> Tensor:
    """(B, H, R, d) with the heads of a row side by side, as `row_major` of (B, R, H, d)."""
    return row_major(x.transpose(1, 2)).transpose(1, 2)
