"""`adaptive_prompts` as Triton kernels.

With x̂ = (x − mean) / √(var + eps) per token, W = M x̂, s = Σ_n M:
    u = mask ∘ (γ W + β s) + bias, a = W₁ u, h = hidden mask ∘ σ(a), prompts = u + scale · W₂ h.
One launch mixes the positions: it reads the tokens once, as a block of whole rows gives their statistics and then
enters the product. A second one does the rest. Backward, for the gradient g of the prompts, with t = W₂ᵀ g:
    da = scale · t ∘ hidden mask ∘ σ'(a), du = g + W₁ᵀ da, dv = mask ∘ du;
    per token q = (γ dv)ᵀ x̂, dM = q + Σ_d β dv, y = Mᵀ γ dv, dx = (y − mean(y) − x̂ mean(x̂ y)) / √(var + eps);
    dγ = Σ dv ∘ W, dβ = Σ dv s, dW₁ = Σ da u, dW₂ = scale · Σ g h, dbias = Σ du, dscale = Σ h t.
Saved: the inputs, W, s and the row statistics. Sums over images and prompts are cut into shares, which a last launch
adds in a fixed order, without atomics: two calls give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprompt.kernels.launch import Plans, again, cdiv, launch, power_of_2, trains, unseen
from fastprompt.kernels.layouts import row_major
from fastprompt.kernels.tiles import Tiles, pick

PROGRAMS = 132  # channels and rows are cut into shares until so many programs work on them

TABLES = {
    "_adaptive_prompts_mix": (
        Tiles({"BLOCK_P": 16, "BLOCK_N": 16}, num_warps=8, limits={"bits": 16, "given": 0}),
        Tiles({"BLOCK_P": 16, "BLOCK_N": 8}, num_warps=16, num_stages=1, limits={"given": 0}),
        Tiles({"BLOCK_P": 64, "BLOCK_N": 32}, limits={"bits": 16}),
        Tiles({"BLOCK_P": 32, "BLOCK_N": 16}, num_stages=1),
    ),
    "_adaptive_prompts_fwd": (
        Tiles({"BLOCK_R": 16, "BLOCK_D": 128, "BLOCK_W": 64}, num_stages=1, limits={"bits": 16, "H": 16}),
        Tiles({"BLOCK_R": 16, "BLOCK_D": 32, "BLOCK_W": 32}, num_stages=1, limits={"H": 16}),
        Tiles({"BLOCK_R": 16, "BLOCK_D": 64, "BLOCK_W": 64}, num_stages=1),
    ),
    "_adaptive_prompts_bwd_prompts": (
        Tiles({"BLOCK_R": 16, "BLOCK_D": 128, "BLOCK_W": 64}, num_stages=1, limits={"bits": 16, "H": 16}),
        Tiles({"BLOCK_R": 16, "BLOCK_D": 64, "BLOCK_W": 64}, num_warps=8, num_stages=1, limits={"bits": 16}),
        Tiles({"BLOCK_R": 16, "BLOCK_D": 32, "BLOCK_W": 32}, num_stages=1),
    ),
    "_adaptive_prompts_bwd_tokens": (
        Tiles({"BLOCK_P": 16, "BLOCK_N": 32, "BLOCK_D": 64}, num_stages=1, limits={"bits": 16}),
        Tiles({"BLOCK_P": 16, "BLOCK_N": 16, "BLOCK_D": 64}, num_warps=8, num_stages=1),
    ),
    "_adaptive_prompts_bwd_weights": (
        Tiles({"BLOCK_R": 64, "BLOCK_D": 16}, num_warps=2, num_stages=1, limits={"H": 16}),
        Tiles({"BLOCK_R": 32, "BLOCK_D": 16}, num_stages=1),
    ),
    "_adaptive_prompts_sum_shares": (Tiles({"BLOCK_S": 8, "BLOCK": 64}, num_warps=1),),
}


@triton.jit
def _tile(base, row, column, rows, columns, stride_r, stride_c):
    """The (row, column) numbers of a matrix, zeros outside of it."""
    return tl.load(
        base + row[:, None].to(tl.int64) * stride_r + column[None, :].to(tl.int64) * stride_c,
        mask=(row[:, None] < rows) & (column[None, :] < columns),
        other=0.0,
    )


@triton.jit
def _row(base, i, count, stride):
    """Numbers i of a vector in float32, zeros outside of it."""
    return tl.load(base + i * stride, mask=i < count, other=0.0).to(tl.float32)


@triton.jit
def _activate(a, ACTIVATION: tl.constexpr):
    """σ(a) and σ'(a)."""
    if ACTIVATION == "relu":
        return tl.maximum(a, 0.0), tl.where(a > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        below = 0.5 + 0.5 * tl.erf(a * 0.7071067811865476)
        return a * below, below + a * tl.exp(-0.5 * a * a) * 0.3989422804014327
    elif ACTIVATION == "silu":
        s = tl.sigmoid(a)
        return a * s, s + a * s * (1.0 - s)
    elif ACTIVATION == "tanh":
        e = tl.exp(-2.0 * tl.abs(a))
        s = (1.0 - e) / (1.0 + e)
        return tl.where(a < 0.0, -s, s), 4.0 * e / ((1.0 + e) * (1.0 + e))
    else:
        s = tl.sigmoid(a)
        return s, s * (1.0 - s)


@triton.jit
def _channels(x, channel_mask, r, d, R, P, D, stride_cb, stride_cd, HAS_CHANNELS: tl.constexpr):
    """mask ∘ x for rows r = image · P + prompt."""
    if HAS_CHANNELS:
        mask = (r[:, None] < R) & (d[None, :] < D)
        at = channel_mask + (r // P)[:, None].to(tl.int64) * stride_cb + d[None, :] * stride_cd
        x = x * tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _before_bottleneck(
    mixed,
    sums,
    norm_weight,
    norm_bias,
    bias,
    channel_mask,
    r,
    d,
    R,
    P,
    D,
    stride_w,
    stride_b,
    stride_p,
    stride_cb,
    stride_cd,
    HAS_CHANNELS: tl.constexpr,
):
    """u = mask ∘ (γ W + β s) + bias for rows r of (R, D), in float32."""
    p = r % P
    x = _tile(mixed, r, d, R, D, D, 1).to(tl.float32) * _row(norm_weight, d, D, stride_w)[None, :]
    x += tl.load(sums + p)[:, None] * _row(norm_bias, d, D, stride_b)[None, :]
    x = _channels(x, channel_mask, r, d, R, P, D, stride_cb, stride_cd, HAS_CHANNELS)
    return x + tl.load(bias + p * stride_p).to(tl.float32)[:, None]


@triton.jit
def _hidden_mask(
    hidden_mask,
    r,
    j,
    R,
    P,
    H,
    stride_hb,
    stride_hp,
    stride_hr,
    HAS_HIDDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """(BLOCK_R, BLOCK_H) mask of the hidden units."""
    if HAS_HIDDEN:
        at = hidden_mask + (r // P).to(tl.int64)[:, None] * stride_hb + (r % P)[:, None] * stride_hp
        mask = (r[:, None] < R) & (j[None, :] < H)
        return tl.load(at + j[None, :] * stride_hr, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.full((BLOCK_R, BLOCK_H), 1.0, tl.float32)


@triton.jit
def _adaptive_prompts_mix(
    tokens,
    stats,
    mix,
    mixed,
    sums,
    N,
    P,
    D,
    eps,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_mp,
    stride_mn,
    stride_sb,
    stride_sn,
    stride_ss,
    GIVEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """W (B, P, D) and s (P,); the statistics (mean, variance) are read if GIVEN, else computed and written."""
    i, blocks_d, blocks_p = tl.program_id(0), tl.cdiv(D, BLOCK_D), tl.cdiv(P, BLOCK_P)
    block_d, block_p, b = i % blocks_d, i // blocks_d % blocks_p, (i // blocks_d // blocks_p).to(tl.int64)
    p, d = block_p * BLOCK_P + tl.arange(0, BLOCK_P), block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_P,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        x = _tile(tokens + b * stride_xb, n, d, N, D, stride_xn, stride_xd)  # (N, D)
        m = _tile(mix, p, n, P, N, stride_mp, stride_mn)  # (P, N)
        row = stats + b * stride_sb + n.to(tl.int64) * stride_sn
        if GIVEN:
            mean = tl.load(row, mask=n < N, other=0.0).to(tl.float32)
            variance = tl.load(row + stride_ss, mask=n < N, other=0.0).to(tl.float32)
            centred = x.to(tl.float32) - mean[:, None]
        else:
            mean = tl.sum(x.to(tl.float32), axis=1) / D
            centred = tl.where(d[None, :] < D, x.to(tl.float32) - mean[:, None], 0.0)
            variance = tl.sum(centred * centred, axis=1) / D
            tl.store(row, mean, mask=(n < N) & (block_p == 0))
            tl.store(row + stride_ss, variance, mask=(n < N) & (block_p == 0))
        normed = centred * tl.rsqrt(variance + eps)[:, None]
        acc = tl.dot(m.to(x.dtype), normed.to(x.dtype), acc, input_precision="ieee")
        total += tl.sum(m.to(tl.float32), axis=1)
    at = mixed + (b * P + p)[:, None] * D + d[None, :]
    tl.store(at, acc.to(mixed.dtype.element_ty), mask=(p[:, None] < P) & (d[None, :] < D))
    tl.store(sums + p, total, mask=(p < P) & (b == 0) & (block_d == 0))


@triton.jit
def _adaptive_prompts_fwd(
    mixed,
    sums,
    norm_weight,
    norm_bias,
    bias,
    w1,
    w2,
    scale,
    channel_mask,
    hidden_mask,
    prompts,
    R,
    P,
    D,
    H,
    share,
    factor,
    stride_w,
    stride_b,
    stride_p,
    stride_1r,
    stride_1d,
    stride_2d,
    stride_2r,
    stride_cb,
    stride_cd,
    stride_hb,
    stride_hp,
    stride_hr,
    ACTIVATION: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_CHANNELS: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Programs (rows; shares of the channels): all of them are read for the hidden units, each writes its share."""
    r, j = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_H)
    dtype = mixed.dtype.element_ty
    if BOTTLENECK:
        a = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            u = _before_bottleneck(
                mixed,
                sums,
                norm_weight,
                norm_bias,
                bias,
                channel_mask,
                r,
                d,
                R,
                P,
                D,
                stride_w,
                stride_b,
                stride_p,
                stride_cb,
                stride_cd,
                HAS_CHANNELS,
            )
            up = _tile(w1, j, d, H, D, stride_1r, stride_1d).to(dtype)  # (H, D)
            a = tl.dot(u.to(dtype), tl.trans(up), a, input_precision="ieee")
        hidden, _ = _activate(a, ACTIVATION)
        hidden *= _hidden_mask(
            hidden_mask, r, j, R, P, H, stride_hb, stride_hp, stride_hr, HAS_HIDDEN, BLOCK_R, BLOCK_H
        )
        if SCALED:
            factor = tl.load(scale).to(tl.float32)
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, D), BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        u = _before_bottleneck(
            mixed,
            sums,
            norm_weight,
            norm_bias,
            bias,
            channel_mask,
            r,
            w,
            R,
            P,
            D,
            stride_w,
            stride_b,
            stride_p,
            stride_cb,
            stride_cd,
            HAS_CHANNELS,
        )
        if BOTTLENECK:
            down = _tile(w2, w, j, D, H, stride_2d, stride_2r).to(dtype)  # (D, H)
            u += factor * tl.dot(hidden.to(dtype), tl.trans(down), input_precision="ieee")
        at = prompts + r[:, None].to(tl.int64) * D + w[None, :]
        tl.store(at, u.to(prompts.dtype.element_ty), mask=(r[:, None] < R) & (w[None, :] < D))


@triton.jit
def _adaptive_prompts_bwd_prompts(
    grad,
    mixed,
    sums,
    norm_weight,
    norm_bias,
    bias,
    w1,
    w2,
    scale,
    channel_mask,
    hidden_mask,
    dv,
    dunits,
    units,
    parts,
    R,
    P,
    D,
    H,
    N,
    size,
    share,
    factor,
    stride_gb,
    stride_gp,
    stride_gd,
    stride_w,
    stride_b,
    stride_p,
    stride_1r,
    stride_1d,
    stride_2d,
    stride_2r,
    stride_cb,
    stride_cd,
    stride_hb,
    stride_hp,
    stride_hr,
    ACTIVATION: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_CHANNELS: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """dv (R, D), da and h (R, H), and columns N and N + 1 of parts: dbias and dscale.

    Programs as in the forward; Σ_d du = Σ_d g + Σ_j da_j Σ_d W₁ needs no share but the first.
    """
    r, j = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_H)
    dtype = mixed.dtype.element_ty
    alone = tl.program_id(1) == 0
    grad = grad + (r // P).to(tl.int64)[:, None] * stride_gb + (r % P)[:, None] * stride_gp  # (R, 1)
    dscale = tl.zeros((BLOCK_R,), tl.float32)
    dbias = tl.zeros((BLOCK_R,), tl.float32)
    a = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    t = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        g = tl.load(grad + d[None, :] * stride_gd, mask=(r[:, None] < R) & (d[None, :] < D), other=0.0)
        dbias += tl.sum(g.to(tl.float32), axis=1)
        if BOTTLENECK:
            u = _before_bottleneck(
                mixed,
                sums,
                norm_weight,
                norm_bias,
                bias,
                channel_mask,
                r,
                d,
                R,
                P,
                D,
                stride_w,
                stride_b,
                stride_p,
                stride_cb,
                stride_cd,
                HAS_CHANNELS,
            )
            up = _tile(w1, j, d, H, D, stride_1r, stride_1d).to(dtype)  # (H, D)
            a = tl.dot(u.to(dtype), tl.trans(up), a, input_precision="ieee")
            down = _tile(w2, d, j, D, H, stride_2d, stride_2r).to(dtype)  # (D, H)
            t = tl.dot(g.to(dtype), down, t, input_precision="ieee")
            total += tl.sum(up.to(tl.float32), axis=1)
    if BOTTLENECK:
        hidden, slope = _activate(a, ACTIVATION)
        mask = _hidden_mask(hidden_mask, r, j, R, P, H, stride_hb, stride_hp, stride_hr, HAS_HIDDEN, BLOCK_R, BLOCK_H)
        hidden *= mask
        if SCALED:
            factor = tl.load(scale).to(tl.float32)
        dscale = tl.sum(tl.where(j[None, :] < H, hidden * t, 0.0), axis=1)
        da = factor * t * mask * slope
        dbias += tl.sum(da.to(dtype).to(tl.float32) * total[None, :], axis=1)
        at, known = r[:, None].to(tl.int64) * H + j[None, :], (r[:, None] < R) & (j[None, :] < H) & alone
        tl.store(dunits + at, da, mask=known)
        tl.store(units + at, hidden, mask=known)
    part = parts + (r // P).to(tl.int64) * size + r % P * (N + 2) + N
    tl.store(part, dbias, mask=(r < R) & alone)
    tl.store(part + 1, dscale, mask=(r < R) & alone)
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, D), BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        inside = (r[:, None] < R) & (w[None, :] < D)
        du = tl.load(grad + w[None, :] * stride_gd, mask=inside, other=0.0).to(tl.float32)
        if BOTTLENECK:
            columns = _tile(w1, j, w, H, D, stride_1r, stride_1d).to(dtype)  # (H, W)
            du = tl.dot(da.to(dtype), columns, du, input_precision="ieee")
        du = _channels(du, channel_mask, r, w, R, P, D, stride_cb, stride_cd, HAS_CHANNELS)
        tl.store(dv + r[:, None].to(tl.int64) * D + w[None, :], du.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def _adaptive_prompts_bwd_tokens(
    tokens,
    stats,
    norm_weight,
    norm_bias,
    mix,
    dv,
    dtokens,
    parts,
    N,
    P,
    D,
    size,
    eps,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_sb,
    stride_sn,
    stride_ss,
    stride_w,
    stride_b,
    stride_mp,
    stride_mn,
    WANTED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx (B, N, D) if WANTED, fresh; columns 0 to N − 1 of parts: each image's share of dM."""
    blocks = tl.cdiv(N, BLOCK_N)
    n, b = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N), (tl.program_id(0) // blocks).to(tl.int64)
    tokens, dv = tokens + b * stride_xb, dv + b * P * D
    dtype = tokens.dtype.element_ty
    row = stats + b * stride_sb + n.to(tl.int64) * stride_sn
    mean = tl.load(row, mask=n < N, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.load(row + stride_ss, mask=n < N, other=0.0).to(tl.float32) + eps)
    mean_g = tl.zeros((BLOCK_N,), tl.float32)
    mean_gx = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        q = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
        sum_g = tl.zeros((BLOCK_P,), tl.float32)
        sum_b = tl.zeros((BLOCK_P,), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            x = _tile(tokens, n, d, N, D, stride_xn, stride_xd).to(tl.float32)
            normed = (x - mean[:, None]) * rstd[:, None]  # (N, D)
            g = _tile(dv, p, d, P, D, D, 1).to(tl.float32)  # (P, D)
            sum_b += tl.sum(g * _row(norm_bias, d, D, stride_b)[None, :], axis=1)
            g = (g * _row(norm_weight, d, D, stride_w)[None, :]).to(dtype)
            sum_g += tl.sum(g.to(tl.float32), axis=1)
            q = tl.dot(g, tl.trans(normed.to(dtype)), q, input_precision="ieee")
        m = _tile(mix, p, n, P, N, stride_mp, stride_mn).to(dtype).to(tl.float32)  # (P, N), rounded as in the products
        mean_g += tl.sum(m * sum_g[:, None], axis=0) / D
        mean_gx += tl.sum(m * q, axis=0) / D
        tl.store(
            parts + b * size + p[:, None] * (N + 2) + n[None, :],
            q + sum_b[:, None],
            mask=(p[:, None] < P) & (n[None, :] < N),
        )
    if WANTED:
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            dx = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            for first in range(0, P, BLOCK_P):
                p = first + tl.arange(0, BLOCK_P)
                m = _tile(mix, p, n, P, N, stride_mp, stride_mn).to(dtype)
                g = _tile(dv, p, d, P, D, D, 1).to(tl.float32) * _row(norm_weight, d, D, stride_w)[None, :]
                dx = tl.dot(tl.trans(m), g.to(dtype), dx, input_precision="ieee")
            x = _tile(tokens, n, d, N, D, stride_xn, stride_xd).to(tl.float32)
            normed = (x - mean[:, None]) * rstd[:, None]
            dx = (dx - mean_g[:, None] - normed * mean_gx[:, None]) * rstd[:, None]
            tl.store(
                dtokens + (b * N + n)[:, None] * D + d[None, :], dx.to(dtype), mask=(n[:, None] < N) & (d[None, :] < D)
            )


@triton.jit
def _adaptive_prompts_bwd_weights(
    grad,
    mixed,
    sums,
    norm_weight,
    norm_bias,
    bias,
    scale,
    channel_mask,
    dv,
    dunits,
    units,
    weights,
    R,
    P,
    D,
    H,
    share,
    factor,
    stride_gb,
    stride_gp,
    stride_gd,
    stride_w,
    stride_b,
    stride_p,
    stride_cb,
    stride_cd,
    BOTTLENECK: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dγ, dβ (D,), dW₁ (H, D), dW₂ (D, H) of a share of all prompts of all images, one after the other in `weights`.

    Programs (channels; shares).
    """
    d, j = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H)
    dtype = mixed.dtype.element_ty
    first = tl.program_id(1) * share
    acc_w = tl.zeros((BLOCK_D,), tl.float32)
    acc_b = tl.zeros((BLOCK_D,), tl.float32)
    acc_1 = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    acc_2 = tl.zeros((BLOCK_D, BLOCK_H), tl.float32)
    for start in range(first, tl.minimum(first + share, R), BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        g = _tile(dv, r, d, R, D, D, 1).to(tl.float32)  # (R, D)
        acc_w += tl.sum(g * _tile(mixed, r, d, R, D, D, 1).to(tl.float32), axis=0)
        acc_b += tl.sum(g * tl.load(sums + r % P)[:, None], axis=0)
        if BOTTLENECK:
            u = _before_bottleneck(
                mixed,
                sums,
                norm_weight,
                norm_bias,
                bias,
                channel_mask,
                r,
                d,
                R,
                P,
                D,
                stride_w,
                stride_b,
                stride_p,
                stride_cb,
                stride_cd,
                HAS_CHANNELS,
            )
            da = _tile(dunits, r, j, R, H, H, 1).to(dtype)  # (R, H)
            acc_1 = tl.dot(tl.trans(da), u.to(dtype), acc_1, input_precision="ieee")
            hidden = _tile(units, r, j, R, H, H, 1).to(dtype)
            at = grad + (r // P).to(tl.int64)[:, None] * stride_gb + (r % P)[:, None] * stride_gp
            g = tl.load(at + d[None, :] * stride_gd, mask=(r[:, None] < R) & (d[None, :] < D), other=0.0).to(dtype)
            acc_2 = tl.dot(tl.trans(g), hidden, acc_2, input_precision="ieee")
    weights += tl.program_id(1).to(tl.int64) * (2 + 2 * H) * D
    tl.store(weights + d, acc_w, mask=d < D)
    tl.store(weights + D + d, acc_b, mask=d < D)
    if BOTTLENECK:
        if SCALED:
            factor = tl.load(scale).to(tl.float32)
        inside = (j[:, None] < H) & (d[None, :] < D)
        tl.store(weights + 2 * D + j[:, None] * D + d[None, :], acc_1, mask=inside)
        tl.store(weights + (2 + H) * D + d[:, None] * H + j[None, :], acc_2 * factor, mask=tl.trans(inside))


@triton.jit
def _sum(shares, i, count, size, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers i of the sum over `count` shares, which are `size` numbers apart."""
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK_S):
        share = start + tl.arange(0, BLOCK_S)
        acc += tl.sum(
            tl.load(
                shares + share[:, None].to(tl.int64) * size + i[None, :],
                mask=(share[:, None] < count) & (i[None, :] < size),
                other=0.0,
            ),
            axis=0,
        )
    return acc


@triton.jit
def _adaptive_prompts_sum_shares(
    parts,
    weights,
    dmix,
    rest,
    dweight,
    dbias,
    dw1,
    dw2,
    B,
    P,
    N,
    size,
    S,
    D,
    H,
    BOTTLENECK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dM (P, N) and rest (P, 2), dbias and each prompt's share of dscale, from `parts`, (P, N + 2) of each image.

    The programs behind these make dγ, dβ, dW₁ and dW₂ from `weights`.
    """
    blocks = tl.cdiv(size, BLOCK)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) < blocks:
        mixed = _sum(parts, k, B, size, BLOCK_S, BLOCK)
        p, n = k // (N + 2), k % (N + 2)
        tl.store(dmix + p * N + n, mixed.to(dmix.dtype.element_ty), mask=(p < P) & (n < N))
        tl.store(rest + p * 2 + n - N, mixed, mask=(p < P) & (n >= N))
    else:
        i = k - blocks * BLOCK
        acc = _sum(weights, i, S, (2 + 2 * H) * D, BLOCK_S, BLOCK)
        tl.store(dweight + i, acc.to(dweight.dtype.element_ty), mask=i < D)
        tl.store(dbias + i - D, acc.to(dbias.dtype.element_ty), mask=(i >= D) & (i < 2 * D))
        if BOTTLENECK:
            first, second = i - 2 * D, i - (2 + H) * D
            tl.store(dw1 + first, acc.to(dw1.dtype.element_ty), mask=(first >= 0) & (second < 0))
            tl.store(dw2 + second, acc.to(dw2.dtype.element_ty), mask=(second >= 0) & (second < H * D))


def _shares(programs: int, size: int, block: int) -> tuple[tuple[int, int], int]:
    """The grid of `programs` per share of `size` numbers, and those of a share: as many as leave PROGRAMS programs."""
    share = max(cdiv(size, block) // cdiv(PROGRAMS, programs), 1) * block
    return (programs, cdiv(size, share)), share


def _vectors(norm_weight: Tensor, norm_bias: Tensor, bias: Tensor) -> list[int]:
    return [norm_weight.stride(0), norm_bias.stride(0), bias.stride(0)]


def _strides(x: Tensor | None, rank: int) -> list[int]:
    return [0] * rank if x is None else list(x.stride())


def _bottleneck(w1: Tensor | None, scale: Tensor | None, channel_mask: Tensor | None) -> dict[str, Any]:
    """Constants of the launches; the width of the bottleneck is padded to what `tl.dot` takes."""
    return {
        "BOTTLENECK": w1 is not None,
        "SCALED": scale is not None and w1 is not None,
        "HAS_CHANNELS": channel_mask is not None,
        "BLOCK_H": 16 if w1 is None else max(power_of_2(w1.shape[0]), 16),
    }


def _forward(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mix: Tensor,
    bias: Tensor,
    w1: Tensor | None,
    w2: Tensor | None,
    scale: Tensor | None,
    factor: float,
    activation: str,
    eps: float,
    channel_mask: Tensor | None,
    hidden_mask: Tensor | None,
    stats: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    prompts, mixed, sums, computed = _forward_outputs(
        tokens,
        norm_weight,
        norm_bias,
        mix,
        bias,
        w1,
        w2,
        scale,
        factor,
        activation,
        eps,
        channel_mask,
        hidden_mask,
        stats,
    )
    (b, n, d), p, h = tokens.shape, mix.shape[0], 0 if w1 is None else w1.shape[0]
    if not prompts.numel():
        return prompts, mixed, sums, computed
    row = pick(TABLES["_adaptive_prompts_mix"], tokens.device, bits=8 * tokens.itemsize, given=int(stats is not None))
    width = 64 if stats is not None else max(power_of_2(d), 16)
    statistics, constants = computed if stats is None else stats, _bottleneck(w1, scale, channel_mask)
    with torch.cuda.device_of(tokens):
        launch(
            _adaptive_prompts_mix,
            (b * cdiv(p, row.sizes["BLOCK_P"]) * cdiv(d, width),),
            tokens,
            statistics,
            mix,
            mixed,
            sums,
            n,
            p,
            d,
            eps,
            *tokens.stride(),
            *mix.stride(),
            *statistics.stride(),
            GIVEN=stats is not None,
            BLOCK_D=width,
            **row.options,
        )
        row = pick(TABLES["_adaptive_prompts_fwd"], tokens.device, bits=8 * tokens.itemsize, H=h)
        grid, share = _shares(cdiv(b * p, row.sizes["BLOCK_R"]), d, row.sizes["BLOCK_W"])
        launch(
            _adaptive_prompts_fwd,
            grid,
            mixed,
            sums,
            norm_weight,
            norm_bias,
            bias,
            w1,
            w2,
            scale,
            channel_mask,
            hidden_mask,
            prompts,
            b * p,
            p,
            d,
            h,
            share,
            factor,
            *_vectors(norm_weight, norm_bias, bias),
            *_strides(w1, 2),
            *_strides(w2, 2),
            *_strides(channel_mask, 2),
            *_strides(hidden_mask, 3),
            ACTIVATION=activation,
            HAS_HIDDEN=hidden_mask is not None and w1 is not None,
            **constants,
            **row.options,
        )
    return prompts, mixed, sums, computed


def _forward_outputs(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mix: Tensor,
    bias: Tensor,
    w1: Tensor | None,
    w2: Tensor | None,
    scale: Tensor | None,
    factor: float,
    activation: str,
    eps: float,
    channel_mask: Tensor | None,
    hidden_mask: Tensor | None,
    stats: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (b, n, d), p = tokens.shape, mix.shape[0]
    return (
        mix.new_empty(b, p, d),
        tokens.new_empty(b, p, d),
        mix.new_empty(p, dtype=torch.float32),
        tokens.new_empty((b, n, 2) if stats is None else (0, 0, 2), dtype=torch.float32),
    )


def _backward(
    grad: Tensor,
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mix: Tensor,
    bias: Tensor,
    w1: Tensor | None,
    w2: Tensor | None,
    scale: Tensor | None,
    factor: float,
    activation: str,
    eps: float,
    channel_mask: Tensor | None,
    hidden_mask: Tensor | None,
    stats: Tensor,
    mixed: Tensor,
    sums: Tensor,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _backward_outputs(
        grad,
        tokens,
        norm_weight,
        norm_bias,
        mix,
        bias,
        w1,
        w2,
        scale,
        factor,
        activation,
        eps,
        channel_mask,
        hidden_mask,
        stats,
        mixed,
        sums,
        wanted,
    )
    dtokens, dweight, dbias, dmix, rest, dw1, dw2 = outputs
    (b, n, d), p, h = tokens.shape, mix.shape[0], 0 if w1 is None else w1.shape[0]
    if not mixed.numel():
        for x in outputs:
            x.zero_()
        return outputs
    mixed, sums = row_major(mixed), row_major(sums)
    dv = torch.empty_like(mixed)
    dunits, units = (tokens.new_empty(b * p, h, dtype=torch.float32) for _ in range(2))
    size, bits = cdiv(p * (n + 2), 16) * 16, 8 * tokens.itemsize  # aligned: the parts are summed in wide loads
    parts = tokens.new_empty(b, size, dtype=torch.float32)
    vectors, constants = _vectors(norm_weight, norm_bias, bias), _bottleneck(w1, scale, channel_mask)
    with torch.cuda.device_of(tokens):
        row = pick(TABLES["_adaptive_prompts_bwd_prompts"], tokens.device, bits=bits, H=h)
        grid, share = _shares(cdiv(b * p, row.sizes["BLOCK_R"]), d, row.sizes["BLOCK_W"])
        launch(
            _adaptive_prompts_bwd_prompts,
            grid,
            grad,
            mixed,
            sums,
            norm_weight,
            norm_bias,
            bias,
            w1,
            w2,
            scale,
            channel_mask,
            hidden_mask,
            dv,
            dunits,
            units,
            parts,
            b * p,
            p,
            d,
            h,
            n,
            size,
            share,
            factor,
            *grad.stride(),
            *vectors,
            *_strides(w1, 2),
            *_strides(w2, 2),
            *_strides(channel_mask, 2),
            *_strides(hidden_mask, 3),
            ACTIVATION=activation,
            HAS_HIDDEN=hidden_mask is not None and w1 is not None,
            **constants,
            **row.options,
        )
        row = pick(TABLES["_adaptive_prompts_bwd_tokens"], tokens.device, bits=bits)
        launch(
            _adaptive_prompts_bwd_tokens,
            (b * cdiv(n, row.sizes["BLOCK_N"]),),
            tokens,
            stats,
            norm_weight,
            norm_bias,
            mix,
            dv,
            dtokens,
            parts,
            n,
            p,
            d,
            size,
            eps,
            *tokens.stride(),
            *stats.stride(),
            *vectors[:2],
            *mix.stride(),
            WANTED=wanted,
            **row.options,
        )
        row = pick(TABLES["_adaptive_prompts_bwd_weights"], tokens.device, H=h)
        grid, share = _shares(cdiv(d, row.sizes["BLOCK_D"]), b * p, row.sizes["BLOCK_R"])
        weights = tokens.new_empty(grid[1], (2 + 2 * h) * d, dtype=torch.float32)
        launch(
            _adaptive_prompts_bwd_weights,
            grid,
            grad,
            mixed,
            sums,
            norm_weight,
            norm_bias,
            bias,
            scale,
            channel_mask,
            dv,
            dunits,
            units,
            weights,
            b * p,
            p,
            d,
            h,
            share,
            factor,
            *grad.stride(),
            *vectors,
            *_strides(channel_mask, 2),
            **constants,
            **row.options,
        )
        row = pick(TABLES["_adaptive_prompts_sum_shares"], tokens.device)
        blocks = cdiv(size, row.sizes["BLOCK"]) + cdiv(weights.shape[1], row.sizes["BLOCK"])
        launch(
            _adaptive_prompts_sum_shares,
            (blocks,),
            parts,
            weights,
            dmix,
            rest,
            dweight,
            dbias,
            dw1,
            dw2,
            b,
            p,
            n,
            size,
            len(weights),
            d,
            h,
            BOTTLENECK=w1 is not None,
            **row.options,
        )
    return outputs


def _backward_outputs(
    grad: Tensor,
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mix: Tensor,
    bias: Tensor,
    w1: Tensor | None,
    w2: Tensor | None,
    scale: Tensor | None,
    factor: float,
    activation: str,
    eps: float,
    channel_mask: Tensor | None,
    hidden_mask: Tensor | None,
    stats: Tensor,
    mixed: Tensor,
    sums: Tensor,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dw1, dw2 = (mix.new_empty(0) if x is None else x.new_empty(x.shape) for x in (w1, w2))
    return (
        tokens.new_empty(tokens.shape if wanted else (0,)),
        norm_weight.new_empty(norm_weight.shape),
        norm_bias.new_empty(norm_bias.shape),
        mix.new_empty(mix.shape),
        mix.new_empty((mix.shape[0], 2), dtype=torch.float32),
        dw1,
        dw2,
    )


_INPUTS = (
    "Tensor tokens, Tensor norm_weight, Tensor norm_bias, Tensor mix, Tensor bias, Tensor? w1, Tensor? w2, "
    "Tensor? scale, float factor, str activation, float eps, Tensor? channel_mask, Tensor? hidden_mask"
)
torch.library.define("fastprompt::adaptive_prompts", f"({_INPUTS}, Tensor? stats) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.define(
    "fastprompt::adaptive_prompts_backward",
    f"(Tensor grad, {_INPUTS}, Tensor stats, Tensor mixed, Tensor sums, bool wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
for _name, _launch, _fake in (
    ("adaptive_prompts", _forward, _forward_outputs),
    ("adaptive_prompts_backward", _backward, _backward_outputs),
):
    torch.library.impl(f"fastprompt::{_name}", ("CUDA", "CPU"), _launch)
    torch.library.register_fake(f"fastprompt::{_name}", _fake)

_op = torch.ops.fastprompt.adaptive_prompts.default
_op_backward = torch.ops.fastprompt.adaptive_prompts_backward.default


class _AdaptivePrompts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        mix: Tensor,
        bias: Tensor,
        w1: Tensor | None,
        w2: Tensor | None,
        scale: Tensor | None,
        factor: float,
        activation: str,
        eps: float,
        channel_mask: Tensor | None,
        hidden_mask: Tensor | None,
        stats: Tensor | None,
    ) -> Tensor:
        prompts, mixed, sums, computed = (_forward if unseen(tokens) else _op)(
            tokens,
            norm_weight,
            norm_bias,
            mix,
            bias,
            w1,
            w2,
            scale,
            factor,
            activation,
            eps,
            channel_mask,
            hidden_mask,
            stats,
        )
        ctx.save_for_backward(
            tokens,
            norm_weight,
            norm_bias,
            mix,
            bias,
            w1,
            w2,
            scale,
            channel_mask,
            hidden_mask,
            computed if stats is None else stats,
            mixed,
            sums,
        )
        ctx.options = factor, activation, eps
        return prompts

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        bias, w1, scale = saved[4], saved[5], saved[7]
        run: Callable[..., Any] = _backward if unseen(grad) else _op_backward
        dtokens, dweight, dnorm, dmix, rest, dw1, dw2 = run(
            grad, *saved[:8], *ctx.options, *saved[8:], ctx.needs_input_grad[0]
        )
        dscale = None if scale is None else rest[:, 1].sum().to(scale.dtype)
        return (
            dtokens if ctx.needs_input_grad[0] else None,
            dweight,
            dnorm,
            dmix,
            rest[:, 0].to(bias.dtype),
            *((None, None) if w1 is None else (dw1, dw2)),
            dscale,
            *[None] * 6,
        )


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
    plans: Plans | None = None,
) -> Tensor:
    """See `fastprompt.kernels.adaptive_prompts.adaptive_prompts`; products are in the dtype of the tokens."""
    learned = scale if isinstance(scale, Tensor) else None
    factor = 1.0 if isinstance(scale, Tensor) else float(scale)
    arguments = (
        tokens,
        norm_weight,
        norm_bias,
        mix,
        bias,
        w1,
        w2,
        learned,
        factor,
        activation,
        eps,
        channel_mask,
        hidden_mask,
        stats,
    )
    given = (tokens, norm_weight, norm_bias, mix, bias, w1, w2, learned, channel_mask, hidden_mask, stats)
    if unseen(tokens) and not trains(*given):
        return again(plans, given, lambda: _forward(*arguments))[0]
    return _AdaptivePrompts.apply(*arguments)
