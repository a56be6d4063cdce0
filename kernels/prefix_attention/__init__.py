"""Attention over [prompt keys and values, the tokens' own]."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.kernels import dispatch, native as library
from fastprompt.kernels.prefix_attention import recompute, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128
MAX_KEYS = 8192  # natively: a head's keys, values and the scores of a block of queries are kept


def prefix_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale · q [prefix_k, k]ᵀ + [0, bias]) [prefix_v, v].

    Args:
        q: (B, H, R, d). k, v: (B, H, T, d). Any strides.
            Packed, as one product returns them, q, k and v are `q` (B, T, 3, H, d), or k and v are `k` (B, T, 2, H, d),
            and the others are None. Their gradient is written packed too: nobody has to put it together.
        prefix_k, prefix_v: (n, H, P, d) with n dividing B, image b reads prefix b // (B / n): 1 is shared by all, B is
            one per image, and windows of Swin in image-major order share their image's; None: plain attention.
        bias: (W, H, R, T) with W dividing B, image b reads bias b % W; added to the scores of the tokens. Without
            gradient.
        scale: factor of the scores; None: 1 / √d.

    Returns:
        (B, H, R, d) in the dtype of q, under autocast in autocast's. From the kernels laid out so that
        `.transpose(1, 2).flatten(2)`, what the projection reads, is no copy.

    Raises:
        ValueError: a shape or dtype does not fit.
        RuntimeError: `use_backend` asks for an implementation that cannot run.
    """
    given = q, k, v
    call = dispatch.call_of("prefix_attention", *given, prefix_k, prefix_v, bias, scale)
    plans = dispatch.recall(call, "triton")
    if plans is not None:
        from fastprompt.kernels.prefix_attention import triton

        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return triton.prefix_attention(*given, prefix_k, prefix_v, bias, scale, plans)
    if v is None:
        name, parts, packed = ("q", 3, q) if k is None else ("k", 2, k)
        if packed.ndim != 5 or packed.shape[2] != parts:
            raise ValueError(
                f"{name} must be packed, (B, T, {parts}, H, d), where v is None, got {tuple(packed.shape)}"
            )
    elif k is None:
        raise ValueError("v needs k")
    q, k, v = reference.unpacked(q, k, v)
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q must be (B, H, R, d) and k, v (B, H, T, d), got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if (prefix_k is None) != (prefix_v is None):
        raise ValueError("prefix_k and prefix_v must be given together")
    for name, prefix in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if prefix is None:
            continue
        if (
            prefix.ndim != 4
            or prefix.shape[1] != k.shape[1]
            or prefix.shape[3] != k.shape[3]
            or (prefix.shape[0] != k.shape[0] and (prefix.shape[0] < 1 or k.shape[0] % prefix.shape[0]))
        ):
            raise ValueError(
                f"{name} must be (n, {k.shape[1]}, P, {k.shape[3]}) with n dividing {k.shape[0]}, "
                f"got {tuple(prefix.shape)}"
            )
        if prefix_k is not None and prefix.shape != prefix_k.shape:
            raise ValueError(
                f"prefix_v must have the shape of prefix_k, {tuple(prefix_k.shape)}, got {tuple(prefix.shape)}"
            )
    for name, x in (("q", q), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if x is not None and x.dtype != k.dtype and not torch.is_autocast_enabled(k.device.type):
            raise ValueError(f"{name} must have the dtype of k, {k.dtype}, got {x.dtype}")
    (b, h, r, d), t = q.shape, k.shape[2]
    if bias is not None:
        if bias.ndim != 4 or bias.shape[0] < 1 or b % bias.shape[0] or bias.shape[1:] != (h, r, t):
            raise ValueError(f"bias must be (W, {h}, {r}, {t}) with W dividing {b}, got {tuple(bias.shape)}")
        if bias.requires_grad:
            raise ValueError("bias gets no gradient, it must not require one")
    scale = d**-0.5 if scale is None else scale
    lean = (
        bias is None
        and (prefix_k is None or prefix_k.shape[0] in (1, b))
        and dispatch.trains_on_cpu(*given, prefix_k, prefix_v)
    )
    arguments = (*given, prefix_k, prefix_v, bias, scale)
    not_natively = _unsupported_natively(q, k, v, prefix_k, prefix_v, bias, scale)
    backend = dispatch.choose(
        "prefix_attention",
        q.device.type,
        _unsupported(q),
        lean,
        arguments,
        not_natively,
        call,
    )
    if backend == "triton":
        from fastprompt.kernels.prefix_attention import triton

        return triton.prefix_attention(*arguments)
    if backend == "native":
        from fastprompt.kernels.prefix_attention import native

        return native.prefix_attention(*arguments)
    if backend == "recompute":
        natively = not (not_natively or library.obstacle() or dispatch.observed())
        if k.dtype == torch.bfloat16 and natively:  # tiles multiply bfloat16 several times as fast as float32
            natively = library.level() != "amx"
        return recompute.prefix_attention(*given, prefix_k, prefix_v, scale, natively)
    return reference.prefix_attention(*arguments)


def _unsupported(q: Tensor) -> str:
    """Why the Triton kernels cannot take these queries; empty: they can."""
    if q.dtype not in DTYPES and not torch.is_autocast_enabled(q.device.type):
        return f"the kernels take float32, float16 and bfloat16, not {q.dtype}"
    return "" if q.shape[3] <= MAX_HEAD_DIM else f"the kernels take heads of at most {MAX_HEAD_DIM}, not {q.shape[3]}"


def _unsupported_natively(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, bias: Tensor | None, scale: float
) -> str:
    """Why the native kernels cannot take this call; empty: they can."""
    if q.dtype not in (torch.float32, torch.bfloat16) or torch.is_autocast_enabled("cpu"):
        return f"the native kernels take float32 and bfloat16 without autocast, not {q.dtype}"
    if bias is not None or scale <= 0:
        return "the native kernels take no bias, and a positive scale"
    keys = k.shape[2] + (0 if prefix_k is None else prefix_k.shape[2])
    if not 1 <= keys <= MAX_KEYS:
        return f"the native kernels take 1 to {MAX_KEYS} keys, not {keys}"
    if any(x is not None and x.stride(3) != 1 for x in (q, k, v, prefix_k, prefix_v)):
        return "the native kernels take rows of adjacent numbers"
    return ""
