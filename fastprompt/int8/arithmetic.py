"""The arithmetic of int8 Linears, in plain PyTorch: the specification of `csrc/int8.inc`.

A weight W (N, K) is rounded to Q in −127 … 127 with one scale for each output, W ≈ scale · Q. A row x of activations is
rounded to the integers v in −2047 … 2047 with a step of its own, x ≈ step · v. Then

    y_n = act(step · scale_n · Σ_k v_k Q_nk + b_n),

where the sum is exact: |v| ≤ 2047, |Q| ≤ 128 and K ≤ `MOST_INNER` keep it within 32 bits.

Activations have 12 bits because AVX2 multiplies numbers of 8 bits without saturation only as numbers of 16 bits, so the
four bits cost nothing. Their error then vanishes beside that of the weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HIGHEST = 2047
"""Of a rounded activation."""
HIGHEST_WEIGHT = 127
MOST_INNER = 8192
PANEL = 16
"""Outputs whose weights lie side by side in a packed weight."""


def weight_scale(weight: Tensor) -> Tensor:
    """Return the scale (N,) of each output of a weight (N, K): max |W| / 127, or 1 for an output without a weight."""
    most = weight.abs().amax(dim=1)
    return torch.where(most > 0, most / HIGHEST_WEIGHT, 1.0)


def round_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Round a weight (N, K) to the nearest int8 (N, K)."""
    return (weight / scale[:, None]).round().clamp(-HIGHEST_WEIGHT, HIGHEST_WEIGHT).to(torch.int8)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows x (..., K) in float32 to integers v and their step (..., 1), both float32.

    The step of a row with NaN or infinite numbers is NaN. A row whose numbers are all 0, or below 2047 / 3.4e38, has
    the step 0.
    """
    most = x.abs().amax(dim=-1, keepdim=True)
    factor = torch.full_like(most, HIGHEST) / most
    finite, vanishes = most.isfinite(), ~(factor <= torch.finfo(torch.float32).max)
    v = (x * factor.masked_fill(vanishes | ~finite, 0.0)).round()
    step = (most / HIGHEST).masked_fill(vanishes, 0.0).masked_fill(~finite, torch.nan)
    return v.masked_fill(~finite, 0.0), step


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute y (..., N) in float64 before its activation, with sums that are exact.

    Args:
        x: (..., K) in float32. weight: (N, K) int8. scale: (N,). bias: (N,) or None.
    """
    v, step = round_rows(x)
    sums = v.double() @ weight.double().t()  # exact: all sums are below 2^53
    y = sums * (step.double() * scale.double())
    return y if bias is None else y + bias.double()


def packed(weight: Tensor) -> Tensor:
    """Return a weight (N, K) int8 in the kernel's layout, (⌈N / 16⌉, ⌈K / 2⌉, 16, 2), padded with zeros."""
    n, k = weight.shape
    padded = F.pad(weight, (0, k % 2, 0, -n % PANEL))
    return padded.view(-1, PANEL, (k + 1) // 2, 2).transpose(1, 2).contiguous()
