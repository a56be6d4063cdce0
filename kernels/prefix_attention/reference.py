"""The specification of `prefix_attention` in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL_SCORES = 2**18


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale · q kᵀ + bias) v for (B, H, R, d) and (B, H, S, d), by the faster of PyTorch's two ways.

    Training on a CPU in 16 bits, the fused kernel's backward takes several times as long as plain matrix products
    while a head has few scores (`pytest bench/bench_prefix_attention.py --benchmark-only`).
    """
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if (
        trains
        and q.device.type == "cpu"
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] * k.shape[2] <= SMALL_SCORES
    ):
        scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
        return torch.softmax(scores if bias is None else scores + bias, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def prefix_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `fastprompt.kernels.prefix_attention.prefix_attention`."""
    q, k, v = unpacked(q, k, v)
    b, p = k.shape[0], 0 if prefix_k is None else prefix_k.shape[2]
    if bias is not None:
        bias = F.pad(bias.to(q.dtype), (p, 0)).repeat(b // bias.shape[0], 1, 1, 1)  # (B, H, R, P + T)
    return attend(q, with_prefix(prefix_k, k), with_prefix(prefix_v, v), bias, scale)


def unpacked(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, R, d) queries, (B, H, T, d) keys and values: views of q (B, T, 3, H, d) or k (B, T, 2, H, d) if packed."""
    if k is None:
        q, k, v = q.permute(2, 0, 3, 1, 4).unbind(0)
    elif v is None:
        k, v = k.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def with_prefix(prefix: Tensor | None, rows: Tensor) -> Tensor:
    """(n, H, P, d) before (B, H, T, d), each source for the B // n images that read it."""
    if prefix is None:
        return rows
    n, b = prefix.shape[0], rows.shape[0]
    prefix = prefix.expand(b, -1, -1, -1) if n == 1 else prefix.repeat_interleave(b // n, 0) if n < b else prefix
    return torch.cat([prefix, rows], dim=2)
