"""`adaptive_prompts` for training on a CPU: keeps the patch tokens alone and normalises them again in the backward.

The tokens are those that the block's own norm keeps, so nothing of their size is saved for the prompts' sake.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def mix_positions(tokens: Tensor, weight: Tensor, bias: Tensor, mix: Tensor, eps: float) -> Tensor:
    """M · LN(X): tokens (B, N, D), mix (P, N) → (B, P, D) in the dtype of `mix`."""
    return _MixPositions.apply(tokens, weight, bias, mix, eps)


class _MixPositions(torch.autograd.Function):
    """Y = M · LN(X). With Ẏ = ∂L/∂Y: Ṁ = Σ_b Ẏ LN(X)ᵀ, and Mᵀ Ẏ is the gradient of LN(X)."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor, mix: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(tokens, weight, bias, mix)
        ctx.eps = eps
        return mix @ F.layer_norm(tokens.to(mix.dtype), weight.shape, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, bias, mix = ctx.saved_tensors
        shape, x = list(weight.shape), tokens.to(mix.dtype)
        normed, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, ctx.eps)
        grad_mix = (grad @ normed.transpose(1, 2)).sum(0) if ctx.needs_input_grad[3] else None
        wanted = list(ctx.needs_input_grad[:3])
        grads = torch.ops.aten.native_layer_norm_backward(mix.t() @ grad, x, shape, mean, rstd, weight, bias, wanted)
        grad_tokens, grad_weight, grad_bias = (g if wants else None for g, wants in zip(grads, wanted, strict=True))
        return None if grad_tokens is None else grad_tokens.to(tokens.dtype), grad_weight, grad_bias, grad_mix, None
