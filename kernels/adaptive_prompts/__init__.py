"""VAPT's prompts: functions of the layer's own patch tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.kernels import dispatch
from fastprompt.kernels.adaptive_prompts import recompute, reference

ACTIVATIONS = tuple(reference.ACTIVATIONS)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 1024  # without `stats`: a block of whole rows stays in registers while its statistics are computed
MAX_HIDDEN = 64


def adaptive_prompts(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mix: Tensor,
    bias: Tensor,
    w1: Tensor | None = None,
    w2: Tensor | None = None,
    scale: Tensor | float = 1.0,
    *,
    activation: str = "relu",
    eps: float = 1e-5,
    channel_mask: Tensor | None = None,
    hidden_mask: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    """g(mask ∘ (M · LN(X)) + b) with g(p) = scale · W₂ σ(W₁ p) + p (VAPT §4; the residual is the released code's).

    M (P, N) is the shared spatial kernel and the token projector in one: both act on positions and are blind to
    channels, so A · conv(X) = (A · Toeplitz(F)) · X.

    Args:
        tokens: (B, N, D) patch tokens; a slice of a sequence is read in place. Their gradient is a fresh tensor.
        norm_weight, norm_bias: (D,) affine of the layer's LayerNorm. eps: its epsilon.
        mix: (P, N). bias: (P,), added to every channel of a prompt.
        w1: (r, D), w2: (D, r), the bottleneck; None: no feature projector.
        scale: factor of the bottleneck's output.
        activation: of the bottleneck, one of `ACTIVATIONS`.
        channel_mask: (B, D), scaled dropout mask of whole channels; None: no dropout.
        hidden_mask: (B, P, r), scaled dropout mask of the bottleneck's hidden units; None: no dropout.
        stats: (B, N, 2) mean and biased variance of each token's row, if known already (not 1 / std: eps differ between
            the norms of a block). Taken as functions of the tokens: the gradient of the tokens is complete.
            None: computed while the tokens are read.

    Returns:
        (B, P, D) prompts in the dtype of `mix`. The Triton kernels multiply in the dtype of the tokens.

    Raises:
        TypeError: `tokens` is no floating-point tensor.
        ValueError: a shape or `activation` does not fit.
        RuntimeError: `use_backend` asks for an implementation that cannot run.
    """
    arguments = (
        tokens,
        norm_weight,
        norm_bias,
        mix,
        bias,
        w1,
        w2,
        scale,
        activation,
        eps,
        channel_mask,
        hidden_mask,
        stats,
    )
    call = dispatch.call_of("adaptive_prompts", *arguments)
    plans = dispatch.recall(call, "triton")
    if plans is not None:
        from fastprompt.kernels.adaptive_prompts import triton

        return triton.adaptive_prompts(*arguments, plans)
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        raise TypeError(f"tokens must be a floating-point tensor, got {getattr(tokens, 'dtype', type(tokens))}")
    if tokens.ndim != 3:
        raise ValueError(f"tokens must have shape (B, N, D), got {tuple(tokens.shape)}")
    b, n, d = tokens.shape
    if mix.ndim != 2 or mix.shape[1] != n:
        raise ValueError(f"mix must have shape (P, {n}) for tokens {tuple(tokens.shape)}, got {tuple(mix.shape)}")
    p = mix.shape[0]
    r = 0 if w1 is None else w1.shape[0]
    for name, tensor, shape in (
        ("norm_weight", norm_weight, (d,)),
        ("norm_bias", norm_bias, (d,)),
        ("bias", bias, (p,)),
        ("w1", w1, (r, d)),
        ("w2", w2, (d, r)),
        ("channel_mask", channel_mask, (b, d)),
        ("hidden_mask", hidden_mask, (b, p, r)),
        ("stats", stats, (b, n, 2)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if (w1 is None) != (w2 is None):
        raise ValueError("w1 and w2 must be given together")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    backend = dispatch.choose(
        "adaptive_prompts",
        tokens.device.type,
        _unsupported(tokens, mix, stats, d, r),
        dispatch.trains_on_cpu(tokens, norm_weight, norm_bias, mix),
        arguments,
        _unsupported_natively(*arguments),
        call,
    )
    if backend == "triton":
        from fastprompt.kernels.adaptive_prompts import triton

        return triton.adaptive_prompts(*arguments)
    if backend == "native":
        from fastprompt.kernels.adaptive_prompts import native

        return native.adaptive_prompts(*arguments)
    if backend == "recompute":
        prompts = recompute.mix_positions(tokens, norm_weight, norm_bias, mix, eps)
        return reference.finish(prompts, bias, w1, w2, scale, activation, channel_mask, hidden_mask)
    return reference.adaptive_prompts(*arguments)


def _unsupported(tokens: Tensor, mix: Tensor, stats: Tensor | None, d: int, r: int) -> str:
    """Why the Triton kernels cannot take this call; empty: they can."""
    if tokens.dtype not in DTYPES or mix.dtype not in DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {tokens.dtype} and {mix.dtype}"
    if d > MAX_WIDTH and stats is None:
        return f"without stats the kernels take at most {MAX_WIDTH} channels, not {d}"
    return f"the kernels take at most {MAX_HIDDEN} hidden units, not {r}" if r > MAX_HIDDEN else ""


def _unsupported_natively(
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
    stats: Tensor | None,
) -> str:
    """Why the native kernels cannot take this call; empty: they can."""
    parameters = [x for x in (norm_weight, norm_bias, mix, bias, w1, w2) if x is not None]
    if (
        tokens.dtype not in (torch.float32, torch.bfloat16)
        or any(x.dtype != torch.float32 for x in parameters)
        or torch.is_autocast_enabled("cpu")
    ):
        return (
            "the native kernels take tokens in float32 and bfloat16 and parameters in float32, without autocast, "
            f"not {tokens.dtype} and {mix.dtype}"
        )
    if channel_mask is not None or hidden_mask is not None:
        return "the native kernels take no masks"
    if tokens.stride(2) != 1:
        return "the native kernels take rows of adjacent numbers"
    if w1 is not None and len(w1) > MAX_HIDDEN:
        return f"the native kernels take at most {MAX_HIDDEN} hidden units, not {len(w1)}"
    return ""
