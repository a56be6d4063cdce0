"""The arithmetic of int8 Linears, in plain PyTorch: the specification of `csrc/int8.inc`.

A weight W (N, K) whose inputs are multiplied by a factor t (K,) is rounded to Q in −127 … 127 with one scale for each
output, W ≈ scale · Q · t. A row x of activations becomes integers v with a step and a zero point z of its own,
x t ≈ step · (v − z):

* 12 bits: v in −2047 … 2047, z = 0;
* 8 bits: v in 0 … 255, and z such that 0 stays 0.

Then y_n = act(step · scale_n · Σ_k (v_k − z) Q_nk + b_n), where the sum is exact: |v| ≤ 2047, |Q| ≤ 128 and
K ≤ `MOST_INNER` keep it within 32 bits.

Without VNNI, CPUs multiply numbers of 8 bits without saturation only as numbers of 16 bits, so the four bits more cost
nothing, and the error of activations vanishes beside that of the weights. With VNNI products of bytes are twice as fast
as those. Then t, which makes the columns of x more alike, keeps their error small (SmoothQuant, Xiao et al. 2023).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BITS = (8, 12)
"""Of activations."""
HIGHEST = 2047
"""Of an activation that is rounded to 12 bits."""
HALF_SPAN = 127.5
"""Of activations that are rounded to 8 bits."""
HIGHEST_WEIGHT = 127
MOST_INNER = 8192
PANEL = 16
"""Outputs whose weights lie side by side in a packed weight, four inputs of each together."""
QUAD = 4


class Rounded(NamedTuple):
    """A Linear in int8.

    Attributes:
        weight: Q (N, K) int8. scale: (N,) float32. factor: t (K,) float32. bits: of its activations, 8 or 12.
    """

    weight: Tensor
    scale: Tensor
    factor: Tensor
    bits: int

    @property
    def plain(self) -> Tensor:
        """What the int8 weight stands for, (N, K) float32."""
        return self.weight.to(torch.float32) * self.scale[:, None] * self.factor


def weight_scale(weight: Tensor) -> Tensor:
    """Return the scale (N,) of each output of a weight (N, K): max |W| / 127, or 1 for an output without a weight."""
    most = weight.abs().amax(dim=1)
    return torch.where(most > 0, most / HIGHEST_WEIGHT, 1.0)


def round_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Round a weight (N, K) to the nearest int8 (N, K)."""
    return (weight / scale[:, None]).round().clamp(-HIGHEST_WEIGHT, HIGHEST_WEIGHT).to(torch.int8)


def round_rows(x: Tensor, bits: int = 12) -> tuple[Tensor, Tensor]:
    """Round rows x (..., K) in float32 to integers v − z and their step (..., 1), both float32.

    The step of a row with NaN or infinite numbers is NaN. A row whose numbers are all 0, or too small to be divided by,
    has the step 0.
    """
    if bits == 12:
        most, top = x.abs().amax(dim=-1, keepdim=True), float(HIGHEST)
    else:
        low, high = x.amin(dim=-1, keepdim=True).clamp_max(0), x.amax(dim=-1, keepdim=True).clamp_min(0)
        most, top = 0.5 * high - 0.5 * low, HALF_SPAN
    factor = torch.full_like(most, top) / most
    finite, vanishes = most.isfinite(), ~(factor <= torch.finfo(torch.float32).max)
    factor = factor.masked_fill(vanishes | ~finite, 0.0)
    v = (x * factor).round()
    if bits == 8:
        zero = (-low * factor).round().clamp_max(255)
        v = (v + zero).clamp(0, 255) - zero
    step = (most / top).masked_fill(vanishes, 0.0).masked_fill(~finite, torch.nan)
    return v.masked_fill(~finite, 0.0), step


def product(x: Tensor, rounded: Rounded, bias: Tensor | None) -> Tensor:
    """Compute y (..., N) in float64 before its activation, with sums that are exact.

    Args:
        x: (..., K) in float32. bias: (N,) or None.
    """
    v, step = round_rows(x * rounded.factor, rounded.bits)
    sums = v.double() @ rounded.weight.double().t()  # exact: all sums are below 2^53
    y = sums * (step.double() * rounded.scale.double())
    return y if bias is None else y + bias.double()


def packed(weight: Tensor) -> Tensor:
    """Return a weight (N, K) int8 in the kernel's layout, (⌈N / 16⌉, ⌈K / 4⌉, 16, 4), padded with zeros."""
    n, k = weight.shape
    padded = F.pad(weight, (0, -k % QUAD, 0, -n % PANEL))
    return padded.view(-1, PANEL, padded.shape[1] // QUAD, QUAD).transpose(1, 2).contiguous()


def unpacked(weight: Tensor, n: int, k: int) -> Tensor:
    """Return the weight (n, k) int8 that `packed` packed."""
    return weight.transpose(1, 2).flatten(2).flatten(0, 1)[:n, :k]
