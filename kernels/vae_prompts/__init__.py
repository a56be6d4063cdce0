"""V²APT's instance prompts: sample a Gaussian latent, decode it, measure its KL divergence."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.kernels import dispatch
from fastprompt.kernels.vae_prompts import reference
from fastprompt.kernels.vae_prompts.reference import LOGVAR_RANGE, Decoder

__all__ = ["LOGVAR_RANGE", "Decoder", "vae_prompts"]


def vae_prompts(
    stats: Tensor, decoders: list[Decoder], domain: Tensor, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """[domain, instance] prompts of every layer, with instance = decoder(z), and KL(N(μ, σ²) ‖ N(0, I)).

    (μ, log σ²) = stats, log σ² clamped to `LOGVAR_RANGE`; z = μ + σ ε with ε from Philox noise when `seed` is
    given, else z = μ. decoder(z) = W₂ GELU(W₁ z + b₁) + b₂, reshaped to (m, D). V²APT, reparameterisation and
    regulariser; the decoder's shape is this library's choice.

    Args:
        stats: (B, 2Z).
        decoders: one `Decoder` (all layers get the same instance prompts) or one per layer.
        domain: (L, P − m, D), the domain prompts.
        seed: (2,) int64 [seed, offset] of the noise, on the device of `stats`; None: no noise.

    Returns:
        prompts (L, B, P, D) in the dtype of `domain`, KL (B,) in nats in float32 or wider, summed over the latent.

    Raises:
        TypeError: a tensor is not floating point, or `seed` is not int64.
        ValueError: a shape does not fit.
        RuntimeError: `use_backend` asks for an implementation that cannot run.
    """
    parts = [x for decoder in decoders if isinstance(decoder, Decoder) for x in decoder]
    call = dispatch.call_of("vae_prompts", stats, domain, seed, len(decoders), *parts)
    plans = dispatch.recall(call, "triton")
    if plans is not None:
        from fastprompt.kernels.vae_prompts import triton

        return triton.vae_prompts(stats, decoders, domain, seed, plans)
    for name, tensor in (("stats", stats), ("domain", domain)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(tensor, 'dtype', type(tensor))}")
    if stats.ndim != 2 or stats.shape[1] % 2:
        raise ValueError(f"stats must have shape (B, 2Z), got {tuple(stats.shape)}")
    if domain.ndim != 3:
        raise ValueError(f"domain must have shape (L, P - m, D), got {tuple(domain.shape)}")
    if len(decoders) not in (1, domain.shape[0]):
        raise ValueError(f"decoders must be 1 or as many as layers ({domain.shape[0]}), got {len(decoders)}")
    latent, width = stats.shape[1] // 2, domain.shape[2]
    for i, decoder in enumerate(decoders):
        if decoder.w1.shape[1] != latent or decoder.w2.shape[0] % width:
            raise ValueError(
                f"decoders[{i}] must map {latent} to a multiple of {width}, "
                f"got {decoder.w1.shape[1]} to {decoder.w2.shape[0]}"
            )
    if seed is not None and (str(seed.dtype) != "torch.int64" or tuple(seed.shape) != (2,)):
        raise TypeError(f"seed must be an int64 tensor of shape (2,), got {seed.dtype} {tuple(seed.shape)}")
    if (
        dispatch.choose(
            "vae_prompts",
            stats.device.type,
            _unsupported(stats, decoders, domain, seed),
            arguments=(stats, decoders, domain, seed),
            call=call,
        )
        == "triton"
    ):
        from fastprompt.kernels.vae_prompts import triton

        return triton.vae_prompts(stats, decoders, domain, seed)
    return reference.vae_prompts(stats, decoders, domain, seed)


def _unsupported(stats: Tensor, decoders: list[Decoder], domain: Tensor, seed: Tensor | None) -> str:
    """Why the Triton kernels cannot take this call; empty: they can."""
    if torch.float64 in (stats.dtype, domain.dtype, *(w.dtype for decoder in decoders for w in decoder)):
        return "float64 is left to PyTorch"
    vectors = [vector for decoder in decoders for vector in (decoder.b1, decoder.b2)]
    if not all(vector.is_contiguous() for vector in (vectors if seed is None else [*vectors, seed])):
        return "biases and seed must be contiguous"
    return ""
