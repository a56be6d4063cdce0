"""The product of `arithmetic.py` in C++ (`csrc/int8.inc`), on float32 or bfloat16 rows, with bias and activation."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastprompt.kernels import native

ACTIVATIONS = ("identity", "gelu", "gelu_tanh", "silu")
"""What the kernel applies, by name; others run after it. The order is that of `Activation` in `csrc/kernels.h`."""
NAME = "fastprompt::int8_linear_native"
BYTES = ("avx512_vnni", "avx512_bf16", "amx")
"""Instruction sets on which the kernel multiplies activations of 8 bits as bytes, twice as fast as those of 12 bits."""

torch.library.define(
    NAME,
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int activation, int bits, Tensor? factor, Tensor? sums, "
    "bool in_bfloat16) -> Tensor",
)
OPERATOR = torch.ops.fastprompt.int8_linear_native.default


@torch.library.register_fake(NAME)
def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: int,
    bits: int,
    factor: Tensor | None,
    sums: Tensor | None,
    in_bfloat16: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]), dtype=torch.bfloat16 if in_bfloat16 else torch.float32)


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


def has_bytes() -> bool:
    """Whether activations of 8 bits are faster than those of 12 here."""
    return not obstacle() and native.level() in BYTES


def beats_bfloat16() -> bool:
    """Whether activations of 8 bits are faster than bfloat16 on a CPU that multiplies both; AMX tiles are faster."""
    return has_bytes() and native.level() != "amx"


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str = "identity",
    *,
    bits: int = 12,
    factor: Tensor | None = None,
    sums: Tensor | None = None,
    in_bfloat16: bool = False,
) -> Tensor:
    """Compute act(x Wᵀ + b) (..., N) with x t rounded to 12 or 8 bits, each row by itself.

    Args:
        x: (..., K) float32 or bfloat16 on a CPU. weight: of `arithmetic.packed`. scale, bias: (N,) float32.
        factor: t (K,) float32; None: 1. sums: (N,) int32, of the weight over K; 8 bits need it.
        in_bfloat16: return bfloat16 instead of float32.
    """
    index = ACTIVATIONS.index(activation)
    return OPERATOR(x.contiguous(), weight, scale, bias, index, bits, factor, sums, in_bfloat16)
