"""Triton kernels of `library_prompts`: the mixture never leaves registers, prompts go where their reader wants them.

Forward, one launch: P = w L with w = softmax(A) by an online softmax over the library, or w = sigmoid(A); with a
pre-norm, Y = γ P̂ + β. Where patches are given, further programs of the same launch write the rows before the prompts.
Backward, one launch each, all deterministic:
    dP = (γ g − mean(γ g) − P̂ mean(γ g ∘ P̂)) / √(var + eps) for the gradient g of Y; without a pre-norm dP = g;
    dA = w ∘ (dP Lᵀ − δ), δ = Σ_d dP ∘ P (softmax)   or   dA = w ∘ (1 − w) ∘ dP Lᵀ (sigmoid)
    dL = wᵀ dP, reduced over the B · K prompts in order.
Saved: A, L, P, and the maximum and the sum of exponentials of A's rows; w and P̂ are computed again from them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprompt.kernels.launch import Plans, again, cdiv, launch, power_of_2, trains, unseen
from fastprompt.kernels.layouts import row_major
from fastprompt.kernels.library_prompts.reference import PreNorm
from fastprompt.kernels.tiles import Tiles, pick

TABLES = {
    "_library_prompts_fwd": (
        Tiles({"BLOCK_R": 16, "BLOCK_M": 64, "BLOCK_D": 64, "ROWS": 2}, num_stages=3, limits={"K": 16}),
        Tiles({"BLOCK_R": 32, "BLOCK_M": 64, "BLOCK_D": 64, "ROWS": 2}, num_warps=8, num_stages=3, limits={"K": 64}),
        Tiles({"BLOCK_R": 64, "BLOCK_M": 64, "BLOCK_D": 64, "ROWS": 2}, num_warps=8, families=("gfx",)),
        Tiles({"BLOCK_R": 64, "BLOCK_M": 32, "BLOCK_D": 64, "ROWS": 2}, num_warps=8),
    ),
    "_library_prompts_bwd_norm": (Tiles({"ROWS": 2}),),
    "_library_prompts_bwd_logits": (
        Tiles({"BLOCK_R": 16, "BLOCK_M": 32, "BLOCK_D": 64}, num_stages=3, limits={"K": 16}),
        Tiles({"BLOCK_R": 32, "BLOCK_M": 64, "BLOCK_D": 32}),
    ),
    "_library_prompts_bwd_library": (
        Tiles({"BLOCK_R": 32, "BLOCK_M": 16, "BLOCK_D": 64}, num_stages=3, limits={"M": 512}),
        Tiles({"BLOCK_R": 32, "BLOCK_M": 32, "BLOCK_D": 64}),
    ),
}


@triton.jit
def _mixture(
    logits,
    library,
    r,
    d,
    R,
    K,
    M,
    D,
    stride_ab,
    stride_ak,
    stride_am,
    stride_lm,
    stride_ld,
    SOFTMAX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Channels d of prompts r, (R, D), and the maximum and the sum of exponentials of their logits, (R,)."""
    b, k = (r // K).to(tl.int64), (r % K).to(tl.int64)
    a_row = logits + b * stride_ab + k * stride_ak  # (R,)
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        a = tl.load(
            a_row[:, None] + m[None, :] * stride_am, mask=(r[:, None] < R) & (m[None, :] < M), other=float("-inf")
        ).to(tl.float32)  # (R, M)
        tokens = tl.load(
            library + m[:, None] * stride_lm + d[None, :] * stride_ld,
            mask=(m[:, None] < M) & (d[None, :] < D),
            other=0.0,
        )  # (M, D)
        if SOFTMAX:
            higher = tl.maximum(top, tl.max(a, axis=1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)  # a row that is -inf so far
            w = tl.exp(a - shift[:, None])
            rescale = tl.exp(top - shift)
            total = total * rescale + tl.sum(w, axis=1)
            acc = acc * rescale[:, None]
            top = higher
        else:
            w = tl.sigmoid(a)
        acc = tl.dot(w.to(tokens.dtype), tokens, acc, input_precision="ieee")
    if SOFTMAX:
        acc = acc / total[:, None]
    return acc, top, total


@triton.jit
def _standardised(x, d, D, eps):
    """x̂ and 1 / √(var + eps) of rows x (rows, channels d), which are 0 beyond D."""
    mean = tl.sum(x, axis=1) / D
    centred = tl.where(d[None, :] < D, x - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)
    return centred * scale[:, None], scale


@triton.jit
def _normed(x, weight, bias, d, D, eps):
    """LayerNorm of rows x (rows, channels d), which are 0 beyond D."""
    x, _ = _standardised(x, d, D, eps)
    x *= tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return x + tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _library_prompts_fwd(
    logits,
    library,
    patches,
    prefix,
    position,
    weight,
    bias,
    mixed,
    prompts,
    rows,
    sequence,
    R,
    K,
    M,
    D,
    F,
    N,
    skip,
    eps,
    stride_ab,
    stride_ak,
    stride_am,
    stride_lm,
    stride_ld,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_fn,
    stride_fd,
    stride_on,
    stride_od,
    stride_mb,
    stride_mk,
    stride_md,
    stride_pb,
    stride_pk,
    stride_pd,
    SOFTMAX: tl.constexpr,
    NORM: tl.constexpr,
    EMBED: tl.constexpr,
    POSITION: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Programs: blocks of prompts, each for a tile of channels, or for all of them if there is a NORM, and behind them,
    if EMBED, blocks of the F + N rows of prefix and patches of each image.

    `mixed` (B, K, D) holds the prompts before the norm; it may be `prompts`, the slots (B, K, D) of `sequence`.
    """
    blocks, tiles = tl.cdiv(R, BLOCK_R), tl.cdiv(D, BLOCK_D)
    i, programs = tl.program_id(0), blocks * (1 if NORM else tiles)
    columns = tl.arange(0, WIDTH)
    if i < programs:
        first = i % blocks * BLOCK_R
        r = first + tl.arange(0, BLOCK_R)
        b, k = (r // K).to(tl.int64), (r % K).to(tl.int64)
        tile = i // blocks
        for _ in range(tiles if NORM else 1):
            d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
            acc, top, total = _mixture(
                logits,
                library,
                r,
                d,
                R,
                K,
                M,
                D,
                stride_ab,
                stride_ak,
                stride_am,
                stride_lm,
                stride_ld,
                SOFTMAX,
                BLOCK_R,
                BLOCK_M,
                BLOCK_D,
            )
            tl.store(
                mixed + b[:, None] * stride_mb + k[:, None] * stride_mk + d[None, :] * stride_md,
                acc.to(mixed.dtype.element_ty),
                mask=(r[:, None] < R) & (d[None, :] < D),
            )
            if SOFTMAX:
                tl.store(rows + 2 * r, top, mask=(r < R) & (tile == 0))
                tl.store(rows + 2 * r + 1, total, mask=(r < R) & (tile == 0))
            tile += 1
        if NORM:
            tl.debug_barrier()  # other threads of this program wrote the rows
            for start in range(0, BLOCK_R, ROWS):
                row = first + start + tl.arange(0, ROWS)[:, None]
                image, prompt = (row // K).to(tl.int64), (row % K).to(tl.int64)
                inside = (row < R) & (columns[None, :] < D)
                x = tl.load(
                    mixed + image * stride_mb + prompt * stride_mk + columns[None, :] * stride_md,
                    mask=inside,
                    other=0.0,
                ).to(tl.float32)
                x = _normed(x, weight, bias, columns, D, eps)
                tl.store(
                    prompts + image * stride_pb + prompt * stride_pk + columns[None, :] * stride_pd,
                    x.to(prompts.dtype.element_ty),
                    mask=inside,
                )
    elif EMBED:
        blocks = tl.cdiv(F + N, ROWS)
        source = patches + ((i - programs) // blocks).to(tl.int64) * stride_xb
        target = sequence + ((i - programs) // blocks).to(tl.int64) * stride_pb
        t = ((i - programs) % blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        known = (t < F + N) & (columns[None, :] < D)
        y = tl.load(source + (t - F) * stride_xn + columns[None, :] * stride_xd, mask=known & (t >= F), other=0.0).to(
            tl.float32
        )
        y += tl.load(prefix + t * stride_fn + columns[None, :] * stride_fd, mask=known & (t < F), other=0.0).to(
            tl.float32
        )
        if POSITION:
            y += tl.load(
                position + (t - skip) * stride_on + columns[None, :] * stride_od, mask=known & (t >= skip), other=0.0
            ).to(tl.float32)
        if NORM:
            y = _normed(y, weight, bias, columns, D, eps)
        tl.store(target + t * stride_pk + columns[None, :] * stride_pd, y.to(sequence.dtype.element_ty), mask=known)


@triton.jit
def _library_prompts_bwd_norm(
    grad,
    mixed,
    weight,
    grad_mixed,
    R,
    K,
    D,
    eps,
    stride_gb,
    stride_gk,
    stride_gd,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dP of rows of `mixed` (R, D) for the gradient of their norm."""
    r, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    b, k = (r // K).to(tl.int64)[:, None], (r % K).to(tl.int64)[:, None]
    inside = (r[:, None] < R) & (d[None, :] < D)
    at = r.to(tl.int64)[:, None] * D + d[None, :]
    x, scale = _standardised(tl.load(mixed + at, mask=inside, other=0.0).to(tl.float32), d, D, eps)
    g = tl.load(grad + b * stride_gb + k * stride_gk + d[None, :] * stride_gd, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    dx = g - tl.sum(g, axis=1)[:, None] / D - x * (tl.sum(g * x, axis=1)[:, None] / D)
    tl.store(grad_mixed + at, (dx * scale[:, None]).to(grad_mixed.dtype.element_ty), mask=inside)


@triton.jit
def _library_prompts_bwd_logits(
    grad,
    logits,
    library,
    prompts,
    rows,
    grad_logits,
    R,
    K,
    M,
    D,
    stride_gb,
    stride_gk,
    stride_gd,
    stride_ab,
    stride_ak,
    stride_am,
    stride_lm,
    stride_ld,
    stride_pb,
    stride_pk,
    stride_pd,
    SOFTMAX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    b, k = (r // K).to(tl.int64), (r % K).to(tl.int64)
    delta = tl.zeros((BLOCK_R,), tl.float32)
    dw = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (r[:, None] < R) & (d[None, :] < D)
        g = tl.load(
            grad + b[:, None] * stride_gb + k[:, None] * stride_gk + d[None, :] * stride_gd, mask=inside, other=0.0
        )  # (R, D)
        tokens = tl.load(
            library + m[:, None] * stride_lm + d[None, :] * stride_ld,
            mask=(m[:, None] < M) & (d[None, :] < D),
            other=0.0,
        )  # (M, D)
        dw = tl.dot(g.to(tokens.dtype), tl.trans(tokens), dw, input_precision="ieee")
        if SOFTMAX:
            p = tl.load(
                prompts + b[:, None] * stride_pb + k[:, None] * stride_pk + d[None, :] * stride_pd,
                mask=inside,
                other=0.0,
            )  # (R, D)
            delta += tl.sum(g.to(tl.float32) * p.to(tl.float32), axis=1)
    inside = (r[:, None] < R) & (m[None, :] < M)
    a = tl.load(
        logits + b[:, None] * stride_ab + k[:, None] * stride_ak + m[None, :] * stride_am, mask=inside, other=0.0
    ).to(tl.float32)  # (R, M)
    if SOFTMAX:
        highest = tl.load(rows + 2 * r, mask=r < R, other=0.0)
        total = tl.load(rows + 2 * r + 1, mask=r < R, other=1.0)
        w = tl.exp(a - highest[:, None]) / total[:, None]
        da = w * (dw - delta[:, None])
    else:
        w = tl.sigmoid(a)
        da = w * (1.0 - w) * dw
    tl.store(grad_logits + r.to(tl.int64)[:, None] * M + m[None, :], da.to(grad_logits.dtype.element_ty), mask=inside)


@triton.jit
def _library_prompts_bwd_library(
    grad,
    logits,
    rows,
    grad_library,
    R,
    K,
    M,
    D,
    stride_gb,
    stride_gk,
    stride_gd,
    stride_ab,
    stride_ak,
    stride_am,
    SOFTMAX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        b, k = (r // K).to(tl.int64), (r % K).to(tl.int64)
        a = tl.load(
            logits + b[:, None] * stride_ab + k[:, None] * stride_ak + m[None, :] * stride_am,
            mask=(r[:, None] < R) & (m[None, :] < M),
            other=float("-inf"),
        ).to(tl.float32)  # (R, M)
        g = tl.load(
            grad + b[:, None] * stride_gb + k[:, None] * stride_gk + d[None, :] * stride_gd,
            mask=(r[:, None] < R) & (d[None, :] < D),
            other=0.0,
        )  # (R, D)
        if SOFTMAX:
            highest = tl.load(rows + 2 * r, mask=r < R, other=0.0)
            total = tl.load(rows + 2 * r + 1, mask=r < R, other=1.0)
            w = tl.exp(a - highest[:, None]) / total[:, None]
        else:
            w = tl.sigmoid(a)
        acc = tl.dot(
            tl.trans(w.to(grad_library.dtype.element_ty)),
            g.to(grad_library.dtype.element_ty),
            acc,
            input_precision="ieee",
        )
    tl.store(
        grad_library + m.to(tl.int64)[:, None] * D + d[None, :],
        acc.to(grad_library.dtype.element_ty),
        mask=(m[:, None] < M) & (d[None, :] < D),
    )


def _launch_forward(
    logits: Tensor,
    library: Tensor,
    softmax: bool,
    prompts: Tensor,
    rows: Tensor,
    mixed: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    sequence: Tensor | None = None,
    patches: Tensor | None = None,
    prefix: Tensor | None = None,
    position: Tensor | None = None,
) -> None:
    """Mix into `prompts` (B, K, D), which may be a slice of a sequence, and write the rows before them where `patches`
    are given. `mixed` keeps the prompts before the norm if it has room for them."""
    (b, k, m), d = logits.shape, library.shape[1]
    f, n = 0 if prefix is None else prefix.shape[1], 0 if patches is None else patches.shape[1]
    mixed = mixed if mixed.numel() else prompts
    row = pick(TABLES["_library_prompts_fwd"], logits.device, K=k, M=m, D=d)
    tiles = cdiv(d, row.sizes["BLOCK_D"]) if weight is None else 1
    programs = cdiv(b * k, row.sizes["BLOCK_R"]) * tiles + b * cdiv(f + n, row.sizes["ROWS"])
    if programs * d == 0:
        return
    skip = 0 if position is None else f + n - position.shape[1]
    strides = [
        *logits.stride(),
        *library.stride(),
        *_strides(patches, 0),
        *_strides(prefix, 1),
        *_strides(position, 1),
        *mixed.stride(),
        *prompts.stride(),
    ]
    with torch.cuda.device_of(logits):
        launch(
            _library_prompts_fwd,
            (programs,),
            logits,
            library,
            patches,
            prefix if f else patches,
            position,
            weight,
            bias,
            mixed,
            prompts,
            rows,
            sequence,
            b * k,
            k,
            m,
            d,
            f,
            n,
            skip,
            eps,
            *strides,
            SOFTMAX=softmax,
            NORM=weight is not None,
            EMBED=patches is not None,
            POSITION=position is not None,
            WIDTH=_width(d),
            **row.options,
        )


def _strides(x: Tensor | None, first: int) -> list[int]:
    """Strides of (B, T, D) from dimension `first` on."""
    return [0] * (3 - first) if x is None else list(x.stride()[first:])


def _width(d: int) -> int:
    return max(power_of_2(d), 16)


def _kept(logits: Tensor, like: Tensor, softmax: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """Row statistics (B, K, 2), and room for the prompts before the norm where they are to be kept."""
    b, k, _ = logits.shape
    return (
        logits.new_empty(b, k, 2 * softmax, dtype=torch.float32),
        like.new_empty(b, k, like.shape[-1]) if keep else like.new_empty(0, 0, 0),
    )


def _fresh(
    logits: Tensor, library: Tensor, softmax: bool, weight: Tensor | None, bias: Tensor | None, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    prompts, rows, mixed = _fresh_outputs(logits, library, softmax, weight, bias, eps, keep)
    _launch_forward(logits, library, softmax, prompts, rows, mixed, weight, bias, eps)
    return prompts, rows, mixed


def _fresh_outputs(
    logits: Tensor, library: Tensor, softmax: bool, weight: Tensor | None, bias: Tensor | None, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    prompts = library.new_empty(*logits.shape[:2], library.shape[1])
    return prompts, *_kept(logits, library, softmax, keep)


def _into(
    sequence: Tensor,
    logits: Tensor,
    library: Tensor,
    slot: int,
    softmax: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    rows, mixed = _into_outputs(sequence, logits, library, slot, softmax, weight, bias, eps, keep)
    _launch_forward(
        logits, library, softmax, sequence[:, slot : slot + logits.shape[1]], rows, mixed, weight, bias, eps
    )
    return rows, mixed


def _into_outputs(
    sequence: Tensor,
    logits: Tensor,
    library: Tensor,
    slot: int,
    softmax: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return _kept(logits, sequence, softmax, keep)


def _assemble(
    logits: Tensor,
    library: Tensor,
    patches: Tensor,
    prefix: Tensor | None,
    position: Tensor | None,
    softmax: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sequence, rows, mixed = _assemble_outputs(
        logits, library, patches, prefix, position, softmax, weight, bias, eps, keep
    )
    prompts = sequence[:, sequence.shape[1] - logits.shape[1] :]
    _launch_forward(
        logits, library, softmax, prompts, rows, mixed, weight, bias, eps, sequence, patches, prefix, position
    )
    return sequence, rows, mixed


def _assemble_outputs(
    logits: Tensor,
    library: Tensor,
    patches: Tensor,
    prefix: Tensor | None,
    position: Tensor | None,
    softmax: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (b, n, d), k = patches.shape, logits.shape[1]
    sequence = patches.new_empty(b, n + k + (0 if prefix is None else prefix.shape[1]), d)
    return sequence, *_kept(logits, patches, softmax, keep)


def _grad_norm(grad: Tensor, mixed: Tensor, weight: Tensor, eps: float) -> Tensor:
    b, k, d = mixed.shape
    out = _grad_norm_output(grad, mixed, weight, eps)
    mixed, weight = row_major(mixed), row_major(weight)
    if out.numel():
        row = pick(TABLES["_library_prompts_bwd_norm"], mixed.device)
        with torch.cuda.device_of(mixed):
            launch(
                _library_prompts_bwd_norm,
                (cdiv(b * k, row.sizes["ROWS"]),),
                grad,
                mixed,
                weight,
                out,
                b * k,
                k,
                d,
                eps,
                *grad.stride(),
                WIDTH=_width(d),
                **row.options,
            )
    return out


def _grad_norm_output(grad: Tensor, mixed: Tensor, weight: Tensor, eps: float) -> Tensor:
    return mixed.new_empty(mixed.shape)


def _grad_logits(grad: Tensor, logits: Tensor, library: Tensor, prompts: Tensor, rows: Tensor, softmax: bool) -> Tensor:
    (b, k, m), d = logits.shape, library.shape[1]
    out, rows = _grad_logits_output(grad, logits, library, prompts, rows, softmax), row_major(rows)
    if out.numel():
        row = pick(TABLES["_library_prompts_bwd_logits"], logits.device, K=k, M=m, D=d)
        grid = (cdiv(b * k, row.sizes["BLOCK_R"]), cdiv(m, row.sizes["BLOCK_M"]))
        with torch.cuda.device_of(logits):
            launch(
                _library_prompts_bwd_logits,
                grid,
                grad,
                logits,
                library,
                prompts,
                rows,
                out,
                b * k,
                k,
                m,
                d,
                *grad.stride(),
                *logits.stride(),
                *library.stride(),
                *prompts.stride(),
                SOFTMAX=softmax,
                **row.options,
            )
    return out


def _grad_logits_output(
    grad: Tensor, logits: Tensor, library: Tensor, prompts: Tensor, rows: Tensor, softmax: bool
) -> Tensor:
    return logits.new_empty(logits.shape)


def _grad_library(grad: Tensor, logits: Tensor, library: Tensor, rows: Tensor, softmax: bool) -> Tensor:
    (b, k, m), d = logits.shape, library.shape[1]
    out, rows = _grad_library_output(grad, logits, library, rows, softmax), row_major(rows)
    if out.numel():
        row = pick(TABLES["_library_prompts_bwd_library"], logits.device, K=k, M=m, D=d)
        grid = (cdiv(m, row.sizes["BLOCK_M"]), cdiv(d, row.sizes["BLOCK_D"]))
        with torch.cuda.device_of(logits):
            launch(
                _library_prompts_bwd_library,
                grid,
                grad,
                logits,
                rows,
                out,
                b * k,
                k,
                m,
                d,
                *grad.stride(),
                *logits.stride(),
                SOFTMAX=softmax,
                **row.options,
            )
    return out


def _grad_library_output(grad: Tensor, logits: Tensor, library: Tensor, rows: Tensor, softmax: bool) -> Tensor:
    return library.new_empty(library.shape)


_NORM = "bool softmax, Tensor? weight, Tensor? bias, float eps, bool keep"
torch.library.define(
    "fastprompt::library_prompts", f"(Tensor logits, Tensor library, {_NORM}) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    "fastprompt::library_prompts_into",
    f"(Tensor(a!) sequence, Tensor logits, Tensor library, int slot, {_NORM}) -> (Tensor, Tensor)",
)
torch.library.define(
    "fastprompt::library_prompts_assemble",
    f"(Tensor logits, Tensor library, Tensor patches, Tensor? prefix, Tensor? position, {_NORM})"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fastprompt::library_prompts_grad_norm", "(Tensor grad, Tensor mixed, Tensor weight, float eps) -> Tensor"
)
torch.library.define(
    "fastprompt::library_prompts_grad_logits",
    "(Tensor grad, Tensor logits, Tensor library, Tensor prompts, Tensor rows, bool softmax) -> Tensor",
)
torch.library.define(
    "fastprompt::library_prompts_grad_library",
    "(Tensor grad, Tensor logits, Tensor library, Tensor rows, bool softmax) -> Tensor",
)
for _name, _kernel, _fake in (
    ("library_prompts", _fresh, _fresh_outputs),
    ("library_prompts_into", _into, _into_outputs),
    ("library_prompts_assemble", _assemble, _assemble_outputs),
    ("library_prompts_grad_norm", _grad_norm, _grad_norm_output),
    ("library_prompts_grad_logits", _grad_logits, _grad_logits_output),
    ("library_prompts_grad_library", _grad_library, _grad_library_output),
):
    torch.library.impl(f"fastprompt::{_name}", ("CUDA", "CPU"), _kernel)
    torch.library.register_fake(f"fastprompt::{_name}", _fake)

_op = torch.ops.fastprompt.library_prompts.default
_op_into = torch.ops.fastprompt.library_prompts_into.default
_op_assemble = torch.ops.fastprompt.library_prompts_assemble.default
_op_grad_norm = torch.ops.fastprompt.library_prompts_grad_norm.default
_op_grad_logits = torch.ops.fastprompt.library_prompts_grad_logits.default
_op_grad_library = torch.ops.fastprompt.library_prompts_grad_library.default


def _save(
    ctx: Any,
    logits: Tensor,
    library: Tensor,
    written: Tensor,
    slot: int,
    rows: Tensor,
    mixed: Tensor,
    softmax: bool,
    weight: Tensor | None,
    eps: float,
) -> None:
    """Keep what `_gradients` reads for the prompts that stand in `written` (B, T, D) from row `slot` on."""
    ctx.save_for_backward(logits, library, written if weight is None else mixed, rows, weight)
    ctx.slot, ctx.softmax, ctx.eps = slot, softmax, eps


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """dA and dL for the gradient of what was written, each only when it is needed."""
    logits, library, prompts, rows, weight = ctx.saved_tensors
    grad = grad[:, ctx.slot : ctx.slot + logits.shape[1]]
    of_logits, of_library = (_grad_logits, _grad_library) if unseen(grad) else (_op_grad_logits, _op_grad_library)
    if weight is None:
        prompts = prompts[:, ctx.slot : ctx.slot + logits.shape[1]]
    else:
        grad = _op_grad_norm(grad, prompts, weight, ctx.eps)
    return (
        of_logits(grad, logits, library, prompts, rows, ctx.softmax) if ctx.needs_input_grad[0] else None,
        of_library(grad, logits, library, rows, ctx.softmax) if ctx.needs_input_grad[1] else None,
    )


class _Fresh(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        library: Tensor,
        softmax: bool,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        keep: bool,
    ) -> Tensor:
        run = _fresh if unseen(logits) else _op
        prompts, rows, mixed = run(logits, library, softmax, weight, bias, eps, keep)
        _save(ctx, logits, library, prompts, 0, rows, mixed, softmax, weight, eps)
        return prompts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grad), *[None] * 5


class _Into(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        library: Tensor,
        sequence: Tensor,
        slot: int,
        softmax: bool,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        keep: bool,
    ) -> Tensor:
        run = _into if unseen(logits) else _op_into
        rows, mixed = run(sequence, logits, library, slot, softmax, weight, bias, eps, keep)
        ctx.mark_dirty(sequence)
        _save(ctx, logits, library, sequence, slot, rows, mixed, softmax, weight, eps)
        return sequence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        before = None
        if ctx.needs_input_grad[2]:  # what was in the slots is overwritten
            before = grad.clone()
            before[:, ctx.slot : ctx.slot + ctx.saved_tensors[0].shape[1]] = 0
        return *_gradients(ctx, grad), before, *[None] * 6


class _Assembled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        library: Tensor,
        patches: Tensor,
        prefix: Tensor | None,
        position: Tensor | None,
        softmax: bool,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        keep: bool,
    ) -> Tensor:
        run = _assemble if unseen(logits) else _op_assemble
        sequence, rows, mixed = run(logits, library, patches, prefix, position, softmax, weight, bias, eps, keep)
        _save(ctx, logits, library, sequence, sequence.shape[1] - logits.shape[1], rows, mixed, softmax, weight, eps)
        return sequence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grad), *[None] * 8


def library_prompts(
    logits: Tensor,
    library: Tensor,
    activation: str,
    out: Tensor | None = None,
    slot: int = 0,
    patches: Tensor | None = None,
    prefix: Tensor | None = None,
    position: Tensor | None = None,
    pre_norm: PreNorm | None = None,
    plans: Plans | None = None,
) -> Tensor:
    """See `fastprompt.kernels.library_prompts.library_prompts`; patches and what stands with them are constants."""
    weight, bias, eps = (None, None, 0.0) if pre_norm is None else pre_norm
    records = trains(logits, library)
    norm = (activation == "softmax", weight, bias, eps, weight is not None and records)
    if not records and out is None and unseen(logits):
        given = (logits, library, patches, prefix, position, weight, bias)
        if patches is None:
            return again(plans, given, lambda: _fresh(logits, library, *norm))[0]
        return again(plans, given, lambda: _assemble(logits, library, patches, prefix, position, *norm))[0]
    if patches is not None:
        return _Assembled.apply(logits, library, patches, prefix, position, *norm)
    if out is not None:
        return _Into.apply(logits, library, out, slot, *norm)
    return _Fresh.apply(logits, library, *norm)
