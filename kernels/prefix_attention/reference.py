"""The specification of `prefix_attention` in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL_SCORES = 2**18


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale · q kᵀ) v for (B, H, R, d) and (B, H, S, d), by the faster of PyTorch's two ways.

    Training on a CPU in 16 bits, the fused kernel's backward takes several times as long as plain matrix products
    while a head has few scores (`pytest bench/bench_prefix_attention.py --benchmark-only`).
    """
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if trains and q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) \
            and q.shape[2] * k.shape[2] <= SMALL_SCORES:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return torch.softmax((q * scale) @ k.transpose(-1, -2), dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None,
                     scale: float) -> Tensor:
    """See `fastprompt.kernels.prefix_attention.prefix_attention`."""
    return attend(q, with_prefix(prefix_k, k), with_prefix(prefix_v, v), scale)


def with_prefix(prefix: Tensor | None, rows: Tensor) -> Tensor:
    """(1 or B, H, P, d) before (B, H, T, d)."""
    if prefix is None:
        return rows
    return torch.cat([prefix.expand(rows.shape[0], -1, -1, -1), rows], dim=2)
