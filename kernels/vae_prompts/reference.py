"""The specification of `vae_prompts` in plain PyTorch, with its counter-based noise."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOGVAR_RANGE = (-10.0, 4.0)

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


class Decoder(NamedTuple):
    """Weights of z → W₂ GELU(W₁ z + b₁) + b₂: w1 (h, Z), b1 (h,), w2 (m·D, h), b2 (m·D,)."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


def philox(seed: Tensor, blocks: Tensor) -> Tensor:
    """Philox-4x32-10 (Salmon et al., SC 2011): the uint32 words of counter blocks, as int64.

    Args:
        seed: (2,) int64 [seed, offset]: the 64-bit key, and the high half of the 128-bit counter.
        blocks: (n,) int64, the low half of the counter.

    Returns:
        (n, 4) int64 in [0, 2³²).
    """
    key = [seed[0] & _MASK, (seed[0] >> 32) & _MASK]
    high = [seed[1] & _MASK, (seed[1] >> 32) & _MASK]
    c = [blocks & _MASK, (blocks >> 32) & _MASK, high[0].expand_as(blocks), high[1].expand_as(blocks)]
    for _ in range(10):
        h0, l0 = _multiply(_MULTIPLIER[0], c[0])
        h1, l1 = _multiply(_MULTIPLIER[1], c[2])
        c = [h1 ^ c[1] ^ key[0], l1, h0 ^ c[3] ^ key[1], l0]
        key = [(key[0] + _WEYL[0]) & _MASK, (key[1] + _WEYL[1]) & _MASK]
    return torch.stack(c, dim=-1)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a · b, both below 2³², without leaving int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)  # each below 2⁴⁸
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_normal(seed: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """(count,) standard normals: Box-Muller on pairs of Philox words, u₁ in (0, 1], u₂ in [0, 1).

    Words are turned to uniforms by their upper 24 bits, so that float32 and float64 see the same ones.
    """
    blocks = torch.arange(-(-count // 4), dtype=torch.int64, device=seed.device)
    words = philox(seed, blocks)  # (n, 4)
    uniform = (words >> 8).to(dtype) / 2**24
    radius = torch.sqrt(-2 * torch.log(1 - uniform[:, 0::2]))  # (n, 2)
    angle = 2 * math.pi * uniform[:, 1::2]
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1).flatten()[:count]


def gaussian(stats: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 2Z) → μ and clamped log σ², each (B, Z), in float32 or wider."""
    mu, logvar = stats.to(torch.promote_types(stats.dtype, torch.float32)).chunk(2, dim=-1)
    return mu, logvar.clamp(*LOGVAR_RANGE)


def kl_per_unit(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, 1)) of each latent unit, in nats, (B, Z)."""
    return 0.5 * (mu * mu + logvar.exp() - 1 - logvar)


def decode(decoder: Decoder, z: Tensor, width: int) -> Tensor:
    """(B, Z) → instance prompts (B, m, D)."""
    h = F.gelu(F.linear(z.to(decoder.w1.dtype), decoder.w1, decoder.b1))
    return F.linear(h, decoder.w2, decoder.b2).unflatten(-1, (-1, width))


def vae_prompts(stats: Tensor, decoders: list[Decoder], domain: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `fastprompt.kernels.vae_prompts.vae_prompts`."""
    mu, logvar = gaussian(stats)
    z = mu
    if seed is not None:
        z = mu + torch.exp(0.5 * logvar) * philox_normal(seed, mu.numel(), mu.dtype).view_as(mu)
    instance = torch.stack([decode(d, z, domain.shape[2]) for d in decoders])  # (1 or L, B, m, D)
    layers, batch = domain.shape[0], stats.shape[0]
    prompts = torch.cat(
        [domain[:, None].expand(-1, batch, -1, -1), instance.to(domain.dtype).expand(layers, -1, -1, -1)], dim=2
    )
    return prompts, kl_per_unit(mu, logvar).sum(dim=-1)
