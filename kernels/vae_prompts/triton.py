"""Triton kernels of `vae_prompts`: noise, latent, decoder, domain prompts and KL in one launch per decoder.

Nothing between the statistics and the prompts reaches memory: every program draws the noise it needs from the Philox
counters of its images and goes through the first layer again, which is cheaper than a second launch. With a decoder for
each layer there is one launch per layer.

Backward, three launches per decoder, deterministic, the noise drawn again; G is the gradient of the instance prompts,
summed over the layers that share them:
    decoder: dW₂ = Gᵀ a, db₂ = Σ_b G, and the domain prompts' gradient Σ_b, in one pass over the gradient
    hidden:  da = G W₂, cut into shares of the M · D columns, as the few images and hidden units are little work else
    latent:  dh = Σ da ∘ GELU'(h) over the shares in order, dW₁ = dhᵀ z, db₁ = Σ_b dh, dz = dh W₁,
             dμ = dz + g_KL μ, d log σ² = ½ dz σ ε + ½ g_KL (σ² − 1)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprompt.kernels.launch import Plans, again, cdiv, launch, trains, unseen
from fastprompt.kernels.layouts import row_major
from fastprompt.kernels.tiles import Tiles, pick
from fastprompt.kernels.vae_prompts.reference import LOGVAR_RANGE, Decoder

TABLES = {
    "_vae_prompts_fwd": (
        Tiles({"BLOCK_B": 16, "BLOCK_D": 64, "BLOCK_H": 64, "BLOCK_Z": 32}, limits={"bits": 16}),
        Tiles({"BLOCK_B": 16, "BLOCK_D": 32, "BLOCK_H": 32, "BLOCK_Z": 32}),
    ),
    "_vae_prompts_bwd_decoder": (
        Tiles(
            {"BLOCK_B": 32, "BLOCK_D": 32, "BLOCK_H": 64, "BLOCK_Z": 32},
            num_warps=2,
            families=("gfx",),
            limits={"bits": 16},
        ),
        Tiles({"BLOCK_B": 32, "BLOCK_D": 32, "BLOCK_H": 64, "BLOCK_Z": 32}, limits={"bits": 16}),
        Tiles({"BLOCK_B": 16, "BLOCK_D": 32, "BLOCK_H": 32, "BLOCK_Z": 32}),
    ),
    "_vae_prompts_bwd_hidden": (
        Tiles({"BLOCK_B": 16, "BLOCK_D": 64, "BLOCK_H": 16}, num_warps=2, num_stages=3, limits={"bits": 16}),
        Tiles({"BLOCK_B": 16, "BLOCK_D": 32, "BLOCK_H": 16}, num_warps=2),
    ),
    "_vae_prompts_bwd_latent": (Tiles({"BLOCK_B": 32, "BLOCK_H": 64, "BLOCK_Z": 32, "BLOCK_S": 16}),),
}
PROGRAMS = 132  # the columns of the decoder are cut into shares until so many programs work on them
_LOW, _HIGH = tl.constexpr(LOGVAR_RANGE[0]), tl.constexpr(LOGVAR_RANGE[1])
_TWO_PI = tl.constexpr(6.283185307179586)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_NORMAL_DENSITY = tl.constexpr(0.3989422804014327)


@triton.jit
def _philox(seed, i):
    """The four words of the Philox block that number `i` (int64) of the stream comes from."""
    offset, block = tl.load(seed + 1), i // 4
    return tl.philox(
        tl.load(seed),
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32),
        tl.zeros_like(block).to(tl.uint32) + offset.to(tl.uint32),
        tl.zeros_like(block).to(tl.uint32) + (offset >> 32).to(tl.uint32),
    )


@triton.jit
def _normal(seed, i):
    """Standard normal number `i` of the stream: Box-Muller on pairs of words, by their upper 24 bits."""
    w0, w1, w2, w3 = _philox(seed, i)
    second = (i % 4) >= 2
    u1 = (tl.where(second, w2, w0) >> 8).to(tl.float32) * 5.9604644775390625e-08
    u2 = (tl.where(second, w3, w1) >> 8).to(tl.float32) * 5.9604644775390625e-08
    radius = tl.sqrt_rn(-2.0 * tl.log(1.0 - u1))
    return radius * _wave(u2 * _TWO_PI, ((i + 1) % 2).to(tl.int32))


@triton.jit
def _wave(angle, quarter):
    """sin(angle + quarter · π/2) for an angle in [0, 2π].

    The library's sine keeps an array in local memory for huge arguments. Here the angle is reduced by π/2 in three
    parts (Cody and Waite), whose products with 0 … 4 are exact, and Cephes' polynomials do the rest.
    """
    turns = (angle * 0.6366197723675814 + 0.5).to(tl.int32).to(tl.float32)
    x = ((angle - turns * 1.5703125) - turns * 4.837512969970703125e-4) - turns * 7.54978995489188216e-8
    square = x * x
    sine = x + x * square * ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1)
    cosine = (
        1.0
        - 0.5 * square
        + square * square * ((2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2)
    )
    quarter += turns.to(tl.int32)
    value = tl.where((quarter & 1) == 0, sine, cosine)
    return tl.where((quarter & 2) == 0, value, -value)


@triton.jit
def _gaussian(stats, b, j, B, Z, stride_sb, stride_sz):
    """μ, clamped log σ² and log σ² as it came, of images b and latent units j, (b, j)."""
    inside = (b[:, None] < B) & (j[None, :] < Z)
    at = stats + b.to(tl.int64)[:, None] * stride_sb + j[None, :] * stride_sz
    mu = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    raw = tl.load(at + Z * stride_sz, mask=inside, other=0.0).to(tl.float32)
    logvar = tl.minimum(
        tl.maximum(raw, _LOW, propagate_nan=tl.PropagateNan.ALL), _HIGH, propagate_nan=tl.PropagateNan.ALL
    )
    return mu, logvar, raw


@triton.jit
def _latent(stats, seed, b, j, B, Z, stride_sb, stride_sz, NOISE: tl.constexpr):
    """z = μ + σ ε of images b and latent units j, (b, j)."""
    mu, logvar, _ = _gaussian(stats, b, j, B, Z, stride_sb, stride_sz)
    if NOISE:
        mu += tl.exp(0.5 * logvar) * _normal(seed, b.to(tl.int64)[:, None] * Z + j[None, :])
    return mu


@triton.jit
def _hidden(
    stats,
    seed,
    w1,
    b1,
    b,
    h,
    B,
    Z,
    H,
    stride_sb,
    stride_sz,
    stride_1h,
    stride_1z,
    NOISE: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    """W₁ z + b₁ of images b and hidden units h, (b, h)."""
    bias = tl.load(b1 + h, mask=h < H, other=0.0).to(tl.float32)
    acc = tl.zeros_like(bias)[None, :] + tl.zeros_like(b).to(tl.float32)[:, None]
    for start in range(0, Z, BLOCK_Z):
        j = start + tl.arange(0, BLOCK_Z)
        z = _latent(stats, seed, b, j, B, Z, stride_sb, stride_sz, NOISE)
        w = tl.load(
            w1 + h[:, None] * stride_1h + j[None, :] * stride_1z, mask=(h[:, None] < H) & (j[None, :] < Z), other=0.0
        )  # (h, z)
        acc = tl.dot(z.to(w.dtype), tl.trans(w), acc, input_precision="ieee")
    return acc + bias[None, :]


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))


@triton.jit
def _gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * _SQRT_HALF)) + x * _NORMAL_DENSITY * tl.exp(-0.5 * x * x)


@triton.jit
def _vae_prompts_fwd(
    stats,
    seed,
    w1,
    b1,
    w2,
    b2,
    domain,
    prompts,
    kl,
    L,
    B,
    S,
    M,
    D,
    Z,
    H,
    stride_sb,
    stride_sz,
    stride_1h,
    stride_1z,
    stride_2c,
    stride_2h,
    stride_dl,
    stride_dp,
    stride_dd,
    NOISE: tl.constexpr,
    KL: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    """Programs (row, d tile; images): the first M rows are instance prompts, the other L · S rows domain prompts."""
    tiles = tl.cdiv(D, BLOCK_D)
    row = tl.program_id(0) // tiles
    d = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = (b[:, None] < B) & (d[None, :] < D)
    size = (S + M).to(tl.int64) * D  # of an image's prompts
    out = prompts + b[:, None] * size + d[None, :]
    if row < M:
        acc = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
        c = row * D + d
        for start in range(0, H, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)
            a = _gelu(
                _hidden(stats, seed, w1, b1, b, h, B, Z, H, stride_sb, stride_sz, stride_1h, stride_1z, NOISE, BLOCK_Z)
            )
            w = tl.load(
                w2 + c.to(tl.int64)[:, None] * stride_2c + h[None, :] * stride_2h,
                mask=(d[:, None] < D) & (h[None, :] < H),
                other=0.0,
            )  # (D, h)
            acc = tl.dot(a.to(w.dtype), tl.trans(w), acc, input_precision="ieee")
        acc += tl.load(b2 + c, mask=d < D, other=0.0).to(tl.float32)[None, :]
        for layer in range(L):
            tl.store(out + layer * B * size + (S + row) * D, acc.to(prompts.dtype.element_ty), mask=inside)
    else:
        layer, p = (row - M) // S, (row - M) % S
        static = tl.load(domain + layer * stride_dl + p * stride_dp + d * stride_dd, mask=d < D, other=0.0)
        tl.store(out + layer * B * size + p * D, tl.zeros((BLOCK_B, 1), static.dtype) + static[None, :], mask=inside)
    if KL:
        if tl.program_id(0) == 0:
            nats = tl.zeros((BLOCK_B,), tl.float32)
            for start in range(0, Z, BLOCK_Z):
                j = start + tl.arange(0, BLOCK_Z)
                mu, logvar, _ = _gaussian(stats, b, j, B, Z, stride_sb, stride_sz)
                nats += tl.sum(0.5 * (mu * mu + tl.exp(logvar) - 1.0 - logvar), axis=1)  # 0 beyond Z
            tl.store(kl + b, nats, mask=b < B)


@triton.jit
def _vae_prompts_bwd_decoder(
    grad,
    stats,
    seed,
    w1,
    b1,
    w2,
    instance,
    grad_w2,
    grad_b2,
    grad_domain,
    L,
    B,
    S,
    M,
    D,
    Z,
    H,
    stride_gl,
    stride_gb,
    stride_gp,
    stride_gd,
    stride_sb,
    stride_sz,
    stride_1h,
    stride_1z,
    NOISE: tl.constexpr,
    SUMMED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    """Programs (row, d tile; hidden units): rows as in the forward; `instance` receives G when SUMMED."""
    tiles = tl.cdiv(D, BLOCK_D)
    row = tl.program_id(0) // tiles
    d = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_D,), tl.float32)
    if row < M:
        acc = tl.zeros((BLOCK_D, BLOCK_H), tl.float32)
        c = row * D + d
        for start in range(0, B, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B)
            inside = (b[:, None] < B) & (d[None, :] < D)
            at = grad + b.to(tl.int64)[:, None] * stride_gb + (S + row) * stride_gp + d[None, :] * stride_gd
            g = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
            for layer in range(L):
                g += tl.load(at + layer * stride_gl, mask=inside, other=0.0).to(tl.float32)
            if SUMMED:
                if tl.program_id(1) == 0:
                    tl.store(
                        instance + b.to(tl.int64)[:, None] * M * D + c[None, :],
                        g.to(instance.dtype.element_ty),
                        mask=inside,
                    )
            a = _gelu(
                _hidden(stats, seed, w1, b1, b, h, B, Z, H, stride_sb, stride_sz, stride_1h, stride_1z, NOISE, BLOCK_Z)
            )
            acc = tl.dot(tl.trans(g.to(w2.dtype.element_ty)), a.to(w2.dtype.element_ty), acc, input_precision="ieee")
            total += tl.sum(g, axis=0)
        tl.store(
            grad_w2 + c.to(tl.int64)[:, None] * H + h[None, :],
            acc.to(grad_w2.dtype.element_ty),
            mask=(d[:, None] < D) & (h[None, :] < H),
        )
        tl.store(grad_b2 + c, total.to(grad_b2.dtype.element_ty), mask=(d < D) & (tl.program_id(1) == 0))
    elif tl.program_id(1) == 0:
        layer, p = (row - M) // S, (row - M) % S
        for start in range(0, B, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B)
            g = tl.load(
                grad
                + layer.to(tl.int64) * stride_gl
                + b.to(tl.int64)[:, None] * stride_gb
                + p * stride_gp
                + d[None, :] * stride_gd,
                mask=(b[:, None] < B) & (d[None, :] < D),
                other=0.0,
            )
            total += tl.sum(g.to(tl.float32), axis=0)
        tl.store(grad_domain + (row - M) * D + d, total.to(grad_domain.dtype.element_ty), mask=d < D)


@triton.jit
def _vae_prompts_bwd_hidden(
    grad,
    w2,
    shares,
    B,
    M,
    D,
    H,
    share,
    stride_gb,
    stride_gp,
    stride_gd,
    stride_2c,
    stride_2h,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Programs (images; hidden units; shares of so many tiles of d): da (shares, B, H) of each share."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    tiles, first = tl.cdiv(D, BLOCK_D), tl.program_id(2) * share
    da = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    for tile in range(first, tl.minimum(first + share, M * tiles)):
        row, d = tile // tiles, tile % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
        g = tl.load(
            grad + b.to(tl.int64)[:, None] * stride_gb + row * stride_gp + d[None, :] * stride_gd,
            mask=(b[:, None] < B) & (d[None, :] < D),
            other=0.0,
        )  # (b, D)
        w = tl.load(
            w2 + (row * D + d).to(tl.int64)[:, None] * stride_2c + h[None, :] * stride_2h,
            mask=(d[:, None] < D) & (h[None, :] < H),
            other=0.0,
        )  # (D, h)
        da = tl.dot(g.to(w.dtype), w, da, input_precision="ieee")
    at = (tl.program_id(2) * B + b).to(tl.int64)[:, None] * H + h[None, :]
    tl.store(shares + at, da, mask=(b[:, None] < B) & (h[None, :] < H))


@triton.jit
def _grad_hidden(
    shares,
    stats,
    seed,
    w1,
    b1,
    b,
    h,
    S,
    B,
    Z,
    H,
    stride_sb,
    stride_sz,
    stride_1h,
    stride_1z,
    NOISE: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dh of one image b (1,) and hidden units h (n,), or of images b (n,) and one hidden unit h (1,): (n,)."""
    at, inside = b.to(tl.int64) * H + h, (b < B) & (h < H)
    x = tl.load(b1 + h + 0 * b, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, Z, BLOCK_Z):
        j = start + tl.arange(0, BLOCK_Z)
        z = _latent(stats, seed, b, j, B, Z, stride_sb, stride_sz, NOISE)  # (b, z)
        w = tl.load(
            w1 + h[:, None] * stride_1h + j[None, :] * stride_1z, mask=(h[:, None] < H) & (j[None, :] < Z), other=0.0
        )  # (h, z)
        x += tl.sum(z * w.to(tl.float32), axis=1)
    da = tl.zeros_like(x)
    for start in range(0, S, BLOCK_S):
        share = (start + tl.arange(0, BLOCK_S))[:, None]
        da += tl.sum(
            tl.load(shares + share.to(tl.int64) * B * H + at[None, :], mask=(share < S) & inside[None, :], other=0.0),
            axis=0,
        )
    return da * _gelu_slope(x)


@triton.jit
def _vae_prompts_bwd_latent(
    shares,
    grad_kl,
    stats,
    seed,
    w1,
    b1,
    carried,
    grad_stats,
    grad_w1,
    grad_b1,
    S,
    B,
    Z,
    H,
    stride_kb,
    stride_sb,
    stride_sz,
    stride_1h,
    stride_1z,
    NOISE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Programs (hidden unit, latent units) for dW₁ and db₁, and behind them (image, latent units) for the statistics.

    `carried` takes dz from one decoder to the next, FIRST to LAST.
    """
    tiles = tl.cdiv(Z, BLOCK_Z)
    i, j = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_Z + tl.arange(0, BLOCK_Z)
    if i < H:
        unit = i + tl.arange(0, 1)
        total = tl.zeros((1,), tl.float32)
        dw = tl.zeros((BLOCK_Z,), tl.float32)
        for start in range(0, B, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B)
            of_unit = _grad_hidden(
                shares,
                stats,
                seed,
                w1,
                b1,
                b,
                unit,
                S,
                B,
                Z,
                H,
                stride_sb,
                stride_sz,
                stride_1h,
                stride_1z,
                NOISE,
                BLOCK_Z,
                BLOCK_S,
            )[:, None]
            dw += tl.sum(of_unit * _latent(stats, seed, b, j, B, Z, stride_sb, stride_sz, NOISE), axis=0)
            total += tl.sum(of_unit, axis=0)
        tl.store(grad_w1 + i.to(tl.int64) * Z + j, dw.to(grad_w1.dtype.element_ty), mask=j < Z)
        tl.store(grad_b1 + unit, total.to(grad_b1.dtype.element_ty), mask=(unit < H) & (tl.program_id(0) % tiles == 0))
    else:
        image = i - H + tl.arange(0, 1)
        dz = tl.zeros((BLOCK_Z,), tl.float32)
        for start in range(0, H, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)
            of_image = _grad_hidden(
                shares,
                stats,
                seed,
                w1,
                b1,
                image,
                h,
                S,
                B,
                Z,
                H,
                stride_sb,
                stride_sz,
                stride_1h,
                stride_1z,
                NOISE,
                BLOCK_Z,
                BLOCK_S,
            )[:, None]
            w = tl.load(
                w1 + h[:, None] * stride_1h + j[None, :] * stride_1z,
                mask=(h[:, None] < H) & (j[None, :] < Z),
                other=0.0,
            )  # (h, z)
            dz += tl.sum(of_image * w.to(tl.float32), axis=0)
        at, inside = image.to(tl.int64) * Z + j, j < Z
        if not FIRST:
            dz += tl.load(carried + at, mask=inside, other=0.0)
        if LAST:
            mu, logvar, raw = _gaussian(stats, image, j, B, Z, stride_sb, stride_sz)  # (1, z)
            dz, nats = dz[None, :], tl.load(grad_kl + image.to(tl.int64) * stride_kb).to(tl.float32)[:, None]
            dlogvar = 0.5 * nats * (tl.exp(logvar) - 1.0)
            if NOISE:
                dlogvar += 0.5 * dz * tl.exp(0.5 * logvar) * _normal(seed, at[None, :])
            dlogvar = tl.where((raw > _LOW) & (raw < _HIGH), dlogvar, 0.0)
            out = grad_stats + image.to(tl.int64)[:, None] * 2 * Z + j[None, :]
            tl.store(out, (dz + nats * mu).to(grad_stats.dtype.element_ty), mask=inside[None, :])
            tl.store(out + Z, dlogvar.to(grad_stats.dtype.element_ty), mask=inside[None, :])
        else:
            tl.store(carried + at, dz, mask=inside)


def _decoders(weights: list[Tensor]) -> list[Decoder]:
    return [Decoder(*weights[i : i + 4]) for i in range(0, len(weights), 4)]


def _outputs(stats: Tensor, weights: list[Tensor], domain: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    (layers, static, d), batch = domain.shape, stats.shape[0]
    return (
        domain.new_empty(layers, batch, static + weights[2].shape[0] // d, d),
        stats.new_empty(batch, dtype=torch.float32),
    )


def _forward(stats: Tensor, weights: list[Tensor], domain: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    prompts, kl = _outputs(stats, weights, domain, seed)
    (layers, batch, _, d), static, (h, z) = prompts.shape, domain.shape[1], weights[0].shape
    if batch == 0:
        return prompts, kl
    instance = weights[2].shape[0] // d
    row = pick(TABLES["_vae_prompts_fwd"], stats.device, bits=8 * weights[2].element_size())
    decoders = _decoders(weights)
    group = layers // len(decoders)  # layers that a decoder serves: all or one
    with torch.cuda.device_of(stats):
        for i, (w1, b1, w2, b2) in enumerate(decoders):
            grid = (
                (instance + group * static) * cdiv(d, row.sizes["BLOCK_D"]),
                cdiv(batch, row.sizes["BLOCK_B"]),
            )
            own = domain[i * group : (i + 1) * group]
            launch(
                _vae_prompts_fwd,
                grid,
                stats,
                seed,
                w1,
                b1,
                w2,
                b2,
                own,
                prompts[i * group : (i + 1) * group],
                kl,
                group,
                batch,
                static,
                instance,
                d,
                z,
                h,
                *stats.stride(),
                *w1.stride(),
                *w2.stride(),
                *own.stride(),
                NOISE=seed is not None,
                KL=i == 0,
                **row.options,
            )
    return prompts, kl


def _shares(batch: int, hidden: int, instance: int, d: int, sizes: Mapping[str, int]) -> tuple[int, tuple[int, ...]]:
    """Tiles of d in a share of the decoder's columns, as many as leave PROGRAMS programs, and the grid."""
    rows = cdiv(batch, sizes["BLOCK_B"]), cdiv(hidden, sizes["BLOCK_H"])
    tiles = instance * cdiv(d, sizes["BLOCK_D"])
    share = max(tiles // cdiv(PROGRAMS, max(rows[0] * rows[1], 1)), 1)
    return share, (*rows, cdiv(tiles, share))


def _gradients(
    grad: Tensor, grad_kl: Tensor, stats: Tensor, weights: list[Tensor], domain: Tensor, seed: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return (stats.new_empty(stats.shape), domain.new_empty(domain.shape), [w.new_empty(w.shape) for w in weights])


def _backward(
    grad: Tensor, grad_kl: Tensor, stats: Tensor, weights: list[Tensor], domain: Tensor, seed: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    grad_stats, grad_domain, grad_weights = _gradients(grad, grad_kl, stats, weights, domain, seed)
    (layers, static, d), batch, (h, z) = domain.shape, stats.shape[0], weights[0].shape
    instance = weights[2].shape[0] // d
    seed = None if seed is None else row_major(seed)
    decoders, found, noise = _decoders(weights), _decoders(grad_weights), seed is not None
    group = layers // len(decoders)
    bits = 8 * weights[2].element_size()
    rows = {name: pick(table, stats.device, bits=bits) for name, table in TABLES.items()}
    share, grid_hidden = _shares(batch, h, instance, d, rows["_vae_prompts_bwd_hidden"].sizes)
    shares = stats.new_empty(grid_hidden[2], batch, h, dtype=torch.float32)
    carried = stats.new_empty(batch, z, dtype=torch.float32) if len(decoders) > 1 else shares
    with torch.cuda.device_of(stats):
        for i, (w1, b1, w2, _) in enumerate(decoders):
            b1 = row_major(b1)
            row = rows["_vae_prompts_bwd_decoder"]
            own, own_domain = grad[i * group : (i + 1) * group], grad_domain[i * group : (i + 1) * group]
            summed = grad.new_empty(batch, instance, d) if group > 1 else own[0, :, static:]
            grid = (
                (instance + group * static) * cdiv(d, row.sizes["BLOCK_D"]),
                cdiv(h, row.sizes["BLOCK_H"]),
            )
            launch(
                _vae_prompts_bwd_decoder,
                grid,
                own,
                stats,
                seed,
                w1,
                b1,
                w2,
                summed,
                found[i].w2,
                found[i].b2,
                own_domain,
                group,
                batch,
                static,
                instance,
                d,
                z,
                h,
                *own.stride(),
                *stats.stride(),
                *w1.stride(),
                NOISE=noise,
                SUMMED=group > 1,
                **row.options,
            )
            if batch:
                launch(
                    _vae_prompts_bwd_hidden,
                    grid_hidden,
                    summed,
                    w2,
                    shares,
                    batch,
                    instance,
                    d,
                    h,
                    share,
                    *summed.stride(),
                    *w2.stride(),
                    **rows["_vae_prompts_bwd_hidden"].options,
                )
            row = rows["_vae_prompts_bwd_latent"]
            launch(
                _vae_prompts_bwd_latent,
                ((h + batch) * cdiv(z, row.sizes["BLOCK_Z"]),),
                shares,
                grad_kl,
                stats,
                seed,
                w1,
                b1,
                carried,
                grad_stats,
                found[i].w1,
                found[i].b1,
                len(shares),
                batch,
                z,
                h,
                *grad_kl.stride(),
                *stats.stride(),
                *w1.stride(),
                NOISE=noise,
                FIRST=i == 0,
                LAST=i == len(decoders) - 1,
                **row.options,
            )
    return grad_stats, grad_domain, grad_weights


torch.library.define(
    "fastprompt::vae_prompts", "(Tensor stats, Tensor[] weights, Tensor domain, Tensor? seed) -> (Tensor, Tensor)"
)
torch.library.define(
    "fastprompt::vae_prompts_backward",
    "(Tensor grad, Tensor grad_kl, Tensor stats, Tensor[] weights, Tensor domain, Tensor? seed)"
    " -> (Tensor, Tensor, Tensor[])",
)
for _name, _kernel, _fake in (("vae_prompts", _forward, _outputs), ("vae_prompts_backward", _backward, _gradients)):
    torch.library.impl(f"fastprompt::{_name}", ("CUDA", "CPU"), _kernel)
    torch.library.register_fake(f"fastprompt::{_name}", _fake)

_op = torch.ops.fastprompt.vae_prompts.default
_op_backward = torch.ops.fastprompt.vae_prompts_backward.default


class _VAEPrompts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, stats: Tensor, domain: Tensor, seed: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(stats, domain, seed, *weights)
        return (_forward if unseen(stats) else _op)(stats, list(weights), domain, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        stats, domain, seed, *weights = ctx.saved_tensors
        run = _backward if unseen(grad) else _op_backward
        grad_stats, grad_domain, grad_weights = run(grad, grad_kl, stats, weights, domain, seed)
        return grad_stats, grad_domain, None, *grad_weights


def vae_prompts(
    stats: Tensor, decoders: list[Decoder], domain: Tensor, seed: Tensor | None, plans: Plans | None = None
) -> tuple[Tensor, Tensor]:
    """See `fastprompt.kernels.vae_prompts.vae_prompts`."""
    weights = [w for decoder in decoders for w in decoder]
    if unseen(stats) and not trains(stats, domain, *weights):
        prompts, kl = again(plans, (stats, domain, seed, *weights), lambda: _forward(stats, weights, domain, seed))
        return prompts, kl
    return _VAEPrompts.apply(stats, domain, seed, *weights)
