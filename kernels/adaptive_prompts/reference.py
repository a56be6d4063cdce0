"""The specification of `adaptive_prompts` in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def bottleneck(
    prompts: Tensor, w1: Tensor, w2: Tensor, scale: Tensor | float, activation: str, hidden_mask: Tensor | None
) -> Tensor:
    """scale · W₂ (mask ∘ σ(W₁ p)) + p for prompts p (B, P, D)."""
    hidden = ACTIVATIONS[activation](F.linear(prompts, w1))
    if hidden_mask is not None:
        hidden = hidden * hidden_mask
    return F.linear(hidden, w2) * scale + prompts


def position_matrix(kernel: Tensor, projector: Tensor, grid: tuple[int, int], padding: int) -> Tensor:
    """M = A · Toeplitz(F): the (P, H·W) matrix of a shared k × k kernel followed by the token projector.

    Args:
        kernel: (1, 1, k, k), stride 1. projector: (P, H'·W').
        grid: (H, W) of the patches; H' = H + 2·padding − k + 1.
    """
    k, (rows, columns) = kernel.shape[-1], grid
    maps = projector.view(-1, 1, rows + 2 * padding - k + 1, columns + 2 * padding - k + 1)
    return F.conv_transpose2d(maps, kernel, padding=padding).flatten(1)  # (P, H·W)


def adaptive_prompts(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mix: Tensor,
    bias: Tensor,
    w1: Tensor | None,
    w2: Tensor | None,
    scale: Tensor | float,
    activation: str,
    eps: float,
    channel_mask: Tensor | None,
    hidden_mask: Tensor | None,
    stats: Tensor | None = None,
) -> Tensor:
    """See `fastprompt.kernels.adaptive_prompts.adaptive_prompts`; the norm computes its own statistics."""
    x = F.layer_norm(tokens.to(mix.dtype), norm_weight.shape, norm_weight, norm_bias, eps)
    return finish(mix @ x, bias, w1, w2, scale, activation, channel_mask, hidden_mask)


def finish(
    prompts: Tensor,
    bias: Tensor,
    w1: Tensor | None,
    w2: Tensor | None,
    scale: Tensor | float,
    activation: str,
    channel_mask: Tensor | None,
    hidden_mask: Tensor | None,
) -> Tensor:
    """g(mask ∘ prompts + b) for mixed positions (B, P, D)."""
    if channel_mask is not None:
        prompts = prompts * channel_mask[:, None, :]
    prompts = prompts + bias[:, None]
    if w1 is None or w2 is None:
        return prompts
    return bottleneck(prompts, w1, w2, scale, activation, hidden_mask)
