"""The product of `arithmetic.py` in C++ (`csrc/int8.inc`), on float32 rows, with bias and activation."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastprompt.kernels import native

ACTIVATIONS = ("identity", "gelu", "gelu_tanh", "silu")
"""What the kernel applies, by name; others run after it. The order is that of `Activation` in `csrc/kernels.h`."""
NAME = "fastprompt::int8_linear_native"

torch.library.define(NAME, "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int activation) -> Tensor")
OPERATOR = torch.ops.fastprompt.int8_linear_native.default


@torch.library.register_fake(NAME)
def _fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


@functools.cache
def obstacle() -> str:
    """Why the product cannot run; empty if it can."""
    if reason := native.obstacle():
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key(NAME, "CPU"):
        return (
            "the C++ kernels were built from earlier sources, without int8; to build them again, run "
            "`pip install --no-build-isolation .` in fastprompt's source tree"
        )
    return ""


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str = "identity") -> Tensor:
    """Compute act(x Wᵀ + b) (..., N) with x rounded to 12 bits, each row by itself.

    Args:
        x: (..., K) float32 on a CPU. weight: of `arithmetic.packed`. scale, bias: (N,) float32.
    """
    return OPERATOR(x.contiguous(), weight, scale, bias, ACTIVATIONS.index(activation))
