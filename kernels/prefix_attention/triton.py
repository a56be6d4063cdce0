"""`prefix_attention` as Triton kernels: the prompts are a second source of keys and values, nothing is concatenated.

Forward, per block of queries, over first the prefix's and then the tokens' keys (online softmax in base 2):
    m' = max(m, max s), o' = o 2^(m − m') + 2^(s − m') v, l' = l 2^(m − m') + Σ 2^(s − m');
    output o / l and the log-sum-exp m + log₂ l.
Backward, with p = 2^(s − lse), δ = Σ do ∘ o, ds = p ∘ (do vᵀ − δ):
    dq = scale · ds k per block of queries; dk = scale · dsᵀ q, dv = pᵀ do per block of keys.
dq, dk and dv of a packed product are written into one tensor of its layout, as the product's backward reads it.
A prefix that several images share sums dk and dv over them: the images of a run in order, then the runs in order.
Saved: the inputs, the output and lse. No atomics: two calls give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprompt.kernels.launch import Plans, again, cdiv, launch, power_of_2, trains, unseen
from fastprompt.kernels.layouts import heads_last, row_major
from fastprompt.kernels.prefix_attention.reference import unpacked
from fastprompt.kernels.tiles import Tiles, pick

LOG2E = tl.constexpr(1.4426950408889634)
FINITE_MIN = tl.constexpr(-1e30)
PROGRAMS = 132  # the sum over the images that share a prefix is cut into runs until so many programs work on it

TABLES = {
    "_prefix_attention_fwd": (
        Tiles({"BLOCK_R": 16, "BLOCK_P": 32, "BLOCK_T": 64}, limits={"bits": 16, "R": 16}),
        Tiles({"BLOCK_R": 64, "BLOCK_P": 32, "BLOCK_T": 64}, limits={"bits": 16}),
        Tiles({"BLOCK_R": 32, "BLOCK_P": 16, "BLOCK_T": 32}, num_warps=8, num_stages=1, limits={"D": 64}),
        Tiles({"BLOCK_R": 16, "BLOCK_P": 16, "BLOCK_T": 16}, num_warps=8, num_stages=1),
    ),
    "_prefix_attention_bwd_queries": (
        Tiles({"BLOCK_R": 16, "BLOCK_P": 32, "BLOCK_T": 64}, limits={"bits": 16, "R": 16}),
        Tiles({"BLOCK_R": 64, "BLOCK_P": 32, "BLOCK_T": 32}, num_stages=3, limits={"bits": 16}),
        Tiles({"BLOCK_R": 16, "BLOCK_P": 16, "BLOCK_T": 32}, num_warps=8, num_stages=1, limits={"D": 64}),
        Tiles({"BLOCK_R": 16, "BLOCK_P": 16, "BLOCK_T": 16}, num_warps=8, num_stages=1),
    ),
    "_prefix_attention_bwd_tokens": (
        Tiles({"BLOCK_R": 32, "BLOCK_T": 64}, limits={"bits": 16, "D": 64}),
        Tiles({"BLOCK_R": 16, "BLOCK_T": 32}, num_stages=1, families=("gfx",)),
        Tiles({"BLOCK_R": 32, "BLOCK_T": 64}, num_warps=8, limits={"bits": 16}),
        Tiles({"BLOCK_R": 32, "BLOCK_T": 16}, num_warps=8, num_stages=1),
    ),
    "_prefix_attention_bwd_prefix": (
        Tiles({"BLOCK_R": 64, "BLOCK_P": 16}, limits={"bits": 16, "D": 64}),
        Tiles({"BLOCK_R": 32, "BLOCK_P": 16}, num_stages=1, families=("gfx",)),
        Tiles({"BLOCK_R": 32, "BLOCK_P": 16}, limits={"bits": 16}),
        Tiles({"BLOCK_R": 32, "BLOCK_P": 16}, num_warps=8, num_stages=1),
    ),
    "_prefix_attention_sum_runs": (Tiles({"BLOCK_S": 8, "BLOCK": 32}, num_warps=1),),
}


@triton.jit
def _place(blocks, H):
    """Block, head and image of this program; the blocks of a head run side by side, as they read the same memory."""
    i = tl.program_id(0)
    return i % blocks, (i // blocks % H).to(tl.int64), (i // blocks // H).to(tl.int64)


@triton.jit
def _rows(base, start, count, stride, stride_d, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows start, start + 1, ... of a (count, D) matrix as (BLOCK, BLOCK_D), zeros outside."""
    row, column = start + tl.arange(0, BLOCK).to(tl.int64), tl.arange(0, BLOCK_D)
    return tl.load(
        base + row[:, None] * stride + column[None, :] * stride_d,
        mask=(row[:, None] < count) & (column[None, :] < D),
        other=0.0,
    )


@triton.jit
def _store_rows(base, start, count, stride, x, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of `_rows`, for adjacent columns."""
    row, column = start + tl.arange(0, BLOCK).to(tl.int64), tl.arange(0, BLOCK_D)
    tl.store(
        base + row[:, None] * stride + column[None, :],
        x.to(base.dtype.element_ty),
        mask=(row[:, None] < count) & (column[None, :] < D),
    )


@triton.jit
def _scores(
    q,
    k,
    bias,
    first,
    start,
    R,
    S,
    scale,
    stride_r,
    stride_t,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Base-2 scores (BLOCK_R, BLOCK_S) of queries from `first` and keys from `start`, -inf beyond the last key."""
    r, t = first + tl.arange(0, BLOCK_R).to(tl.int64), start + tl.arange(0, BLOCK_S)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
    if HAS_BIAS:
        s += LOG2E * tl.load(
            bias + r[:, None] * stride_r + t[None, :] * stride_t, mask=(r[:, None] < R) & (t[None, :] < S), other=0.0
        ).to(tl.float32)
    return tl.where(t[None, :] < S, s, float("-inf"))


@triton.jit
def _attend(s, v, top, total, acc):
    """One step of the online softmax: scores s (BLOCK_R, BLOCK_S), values v (BLOCK_S, BLOCK_D)."""
    higher = tl.maximum(top, tl.max(s, axis=1))
    p = tl.exp2(s - higher[:, None])
    rescale = tl.exp2(top - higher)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return higher, total * rescale + tl.sum(p, axis=1), acc


@triton.jit
def _query_step(s, lse, delta, k, v, do, acc):
    """dq / scale (BLOCK_R, BLOCK_D) plus ds k over one block of keys."""
    p = tl.exp2(s - lse[:, None])  # (BLOCK_R, BLOCK_S)
    ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit
def _key_step(s, lse, delta, q, v, do, dk, dv):
    """dk / scale and dv (BLOCK_S, BLOCK_D) plus one block of queries; s (BLOCK_S, BLOCK_R)."""
    p = tl.exp2(s - lse[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee"), dv


@triton.jit
def _prefix_attention_fwd(
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    bias,
    out,
    lse,
    H,
    R,
    T,
    P,
    group,
    windows,
    scale,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_pkb,
    stride_pkh,
    stride_pkp,
    stride_pkd,
    stride_pvb,
    stride_pvh,
    stride_pvp,
    stride_pvd,
    stride_bw,
    stride_bh,
    stride_br,
    stride_bt,
    HAS_BIAS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    block, h, b = _place(tl.cdiv(R, BLOCK_R), H)
    first = block * BLOCK_R
    k, v = k + b * stride_kb + h * stride_kh, v + b * stride_vb + h * stride_vh
    prefix_k = prefix_k + b // group * stride_pkb + h * stride_pkh
    prefix_v = prefix_v + b // group * stride_pvb + h * stride_pvh
    bias = bias + b % windows * stride_bw + h * stride_bh
    query = _rows(q + b * stride_qb + h * stride_qh, first, R, stride_qr, stride_qd, D, BLOCK_R, BLOCK_D)
    top = tl.full((BLOCK_R,), FINITE_MIN, tl.float32)  # finite: after a block of -inf, -inf - -inf would be NaN
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, P, BLOCK_P):
        key = _rows(prefix_k, start, P, stride_pkp, stride_pkd, D, BLOCK_P, BLOCK_D)
        value = _rows(prefix_v, start, P, stride_pvp, stride_pvd, D, BLOCK_P, BLOCK_D)
        s = _scores(query, key, bias, first, start, R, P, scale, stride_br, stride_bt, False, BLOCK_R, BLOCK_P)
        top, total, acc = _attend(s, value, top, total, acc)
    for start in range(0, T, BLOCK_T):
        key = _rows(k, start, T, stride_kt, stride_kd, D, BLOCK_T, BLOCK_D)
        value = _rows(v, start, T, stride_vt, stride_vd, D, BLOCK_T, BLOCK_D)
        s = _scores(query, key, bias, first, start, R, T, scale, stride_br, stride_bt, HAS_BIAS, BLOCK_R, BLOCK_T)
        top, total, acc = _attend(s, value, top, total, acc)
    _store_rows(out + (b * R * H + h) * D, first, R, H * D, acc / total[:, None], D, BLOCK_R, BLOCK_D)
    r = first + tl.arange(0, BLOCK_R)
    tl.store(lse + (b * H + h) * R + r, top + tl.log2(total), mask=r < R)


@triton.jit
def _prefix_attention_bwd_queries(
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    bias,
    out,
    lse,
    grad,
    delta,
    dq,
    H,
    R,
    T,
    P,
    group,
    windows,
    scale,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_pkb,
    stride_pkh,
    stride_pkp,
    stride_pkd,
    stride_pvb,
    stride_pvh,
    stride_pvp,
    stride_pvd,
    stride_bw,
    stride_bh,
    stride_br,
    stride_bt,
    stride_gb,
    stride_gh,
    stride_gr,
    stride_gd,
    stride_ob,
    stride_or,
    HAS_BIAS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    block, h, b = _place(tl.cdiv(R, BLOCK_R), H)
    first = block * BLOCK_R
    k, v = k + b * stride_kb + h * stride_kh, v + b * stride_vb + h * stride_vh
    prefix_k = prefix_k + b // group * stride_pkb + h * stride_pkh
    prefix_v = prefix_v + b // group * stride_pvb + h * stride_pvh
    bias = bias + b % windows * stride_bw + h * stride_bh
    query = _rows(q + b * stride_qb + h * stride_qh, first, R, stride_qr, stride_qd, D, BLOCK_R, BLOCK_D)
    do = _rows(grad + b * stride_gb + h * stride_gh, first, R, stride_gr, stride_gd, D, BLOCK_R, BLOCK_D)
    o = _rows(out + (b * R * H + h) * D, first, R, H * D, 1, D, BLOCK_R, BLOCK_D)
    r = first + tl.arange(0, BLOCK_R)
    row_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    tl.store(delta + (b * H + h) * R + r, row_delta, mask=r < R)
    row_lse = tl.load(lse + (b * H + h) * R + r, mask=r < R, other=0.0)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, P, BLOCK_P):
        key = _rows(prefix_k, start, P, stride_pkp, stride_pkd, D, BLOCK_P, BLOCK_D)
        value = _rows(prefix_v, start, P, stride_pvp, stride_pvd, D, BLOCK_P, BLOCK_D)
        s = _scores(query, key, bias, first, start, R, P, scale, stride_br, stride_bt, False, BLOCK_R, BLOCK_P)
        acc = _query_step(s, row_lse, row_delta, key, value, do, acc)
    for start in range(0, T, BLOCK_T):
        key = _rows(k, start, T, stride_kt, stride_kd, D, BLOCK_T, BLOCK_D)
        value = _rows(v, start, T, stride_vt, stride_vd, D, BLOCK_T, BLOCK_D)
        s = _scores(query, key, bias, first, start, R, T, scale, stride_br, stride_bt, HAS_BIAS, BLOCK_R, BLOCK_T)
        acc = _query_step(s, row_lse, row_delta, key, value, do, acc)
    _store_rows(dq + b * stride_ob + h * D, first, R, stride_or, acc * scale, D, BLOCK_R, BLOCK_D)


@triton.jit
def _prefix_attention_bwd_tokens(
    q,
    k,
    v,
    bias,
    lse,
    grad,
    delta,
    dk,
    dv,
    H,
    R,
    T,
    windows,
    scale,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_bw,
    stride_bh,
    stride_br,
    stride_bt,
    stride_gb,
    stride_gh,
    stride_gr,
    stride_gd,
    stride_ob,
    stride_ot,
    HAS_BIAS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    block, h, b = _place(tl.cdiv(T, BLOCK_T), H)
    first = block * BLOCK_T
    q, grad = q + b * stride_qb + h * stride_qh, grad + b * stride_gb + h * stride_gh
    bias = bias + b % windows * stride_bw + h * stride_bh
    key = _rows(k + b * stride_kb + h * stride_kh, first, T, stride_kt, stride_kd, D, BLOCK_T, BLOCK_D)
    value = _rows(v + b * stride_vb + h * stride_vh, first, T, stride_vt, stride_vd, D, BLOCK_T, BLOCK_D)
    acc_k = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        query = _rows(q, start, R, stride_qr, stride_qd, D, BLOCK_R, BLOCK_D)
        do = _rows(grad, start, R, stride_gr, stride_gd, D, BLOCK_R, BLOCK_D)
        row_lse = tl.load(lse + (b * H + h) * R + r, mask=r < R, other=0.0)
        row_delta = tl.load(delta + (b * H + h) * R + r, mask=r < R, other=0.0)
        s = _scores(key, query, bias, first, start, T, R, scale, stride_bt, stride_br, HAS_BIAS, BLOCK_T, BLOCK_R)
        acc_k, acc_v = _key_step(s, row_lse, row_delta, query, value, do, acc_k, acc_v)
    _store_rows(dk + b * stride_ob + h * D, first, T, stride_ot, acc_k * scale, D, BLOCK_T, BLOCK_D)
    _store_rows(dv + b * stride_ob + h * D, first, T, stride_ot, acc_v, D, BLOCK_T, BLOCK_D)


@triton.jit
def _prefix_attention_bwd_prefix(
    q,
    prefix_k,
    prefix_v,
    out,
    lse,
    grad,
    dk,
    dv,
    H,
    R,
    P,
    group,
    runs,
    run,
    scale,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_qd,
    stride_pkb,
    stride_pkh,
    stride_pkp,
    stride_pkd,
    stride_pvb,
    stride_pvh,
    stride_pvp,
    stride_pvd,
    stride_gb,
    stride_gh,
    stride_gr,
    stride_gd,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dk, dv are (n · runs, P, H, D): a row is the share of `run` images in the gradient of their common prefix."""
    block, h, part = _place(tl.cdiv(P, BLOCK_P), H)
    first, n, begin = block * BLOCK_P, part // runs, part % runs * run
    key = _rows(prefix_k + n * stride_pkb + h * stride_pkh, first, P, stride_pkp, stride_pkd, D, BLOCK_P, BLOCK_D)
    value = _rows(prefix_v + n * stride_pvb + h * stride_pvh, first, P, stride_pvp, stride_pvd, D, BLOCK_P, BLOCK_D)
    acc_k = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    steps = tl.cdiv(R, BLOCK_R)
    for i in range(tl.minimum(run, group - begin) * steps):
        b, start = n * group + begin + i // steps, i % steps * BLOCK_R
        r = start + tl.arange(0, BLOCK_R)
        query = _rows(q + b * stride_qb + h * stride_qh, start, R, stride_qr, stride_qd, D, BLOCK_R, BLOCK_D)
        do = _rows(grad + b * stride_gb + h * stride_gh, start, R, stride_gr, stride_gd, D, BLOCK_R, BLOCK_D)
        o = _rows(out + (b * R * H + h) * D, start, R, H * D, 1, D, BLOCK_R, BLOCK_D)
        row_lse = tl.load(lse + (b * H + h) * R + r, mask=r < R, other=0.0)
        row_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
        s = _scores(key, query, q, first, start, P, R, scale, 0, 0, False, BLOCK_P, BLOCK_R)
        acc_k, acc_v = _key_step(s, row_lse, row_delta, query, value, do, acc_k, acc_v)
    _store_rows(dk + (part * P * H + h) * D, first, P, H * D, acc_k * scale, D, BLOCK_P, BLOCK_D)
    _store_rows(dv + (part * P * H + h) * D, first, P, H * D, acc_v, D, BLOCK_P, BLOCK_D)


@triton.jit
def _prefix_attention_sum_runs(parts_k, parts_v, dk, dv, runs, size, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """dk, dv (n, size) from float32 (n, runs, size), BLOCK_S runs after the other."""
    blocks = tl.cdiv(size, BLOCK)
    n, i = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    acc_k = tl.zeros((BLOCK,), tl.float32)
    acc_v = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, runs, BLOCK_S):
        run = start + tl.arange(0, BLOCK_S)[:, None]
        at, inside = (n * runs + run) * size + i[None, :], (run < runs) & (i[None, :] < size)
        acc_k += tl.sum(tl.load(parts_k + at, mask=inside, other=0.0), axis=0)
        acc_v += tl.sum(tl.load(parts_v + at, mask=inside, other=0.0), axis=0)
    tl.store(dk + n * size + i, acc_k.to(dk.dtype.element_ty), mask=i < size)
    tl.store(dv + n * size + i, acc_v.to(dv.dtype.element_ty), mask=i < size)


def _fresh(b: int, h: int, rows: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(b, h, rows, d) laid out as (b, rows, h, d): the heads of a row side by side, as the projection reads them."""
    return like.new_empty((b, rows, h, like.shape[-1]), dtype=dtype).transpose(1, 2)


def _run_length(prefix: Tensor, images: int, block: int) -> int:
    """How many of the images that share a prefix are summed by one program: as many as leave PROGRAMS programs."""
    n, h, p, _ = prefix.shape
    return max(images // n // cdiv(PROGRAMS, n * h * cdiv(p, block)), 1)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _forward_outputs(q, k, v, prefix_k, prefix_v, bias, scale)
    (b, h, r, d), t = q.shape, k.shape[2]
    if out.numel():
        sources = _sources(k, v, prefix_k, prefix_v, bias)
        row = pick(TABLES["_prefix_attention_fwd"], q.device, bits=8 * q.itemsize, R=r, D=d)
        with torch.cuda.device_of(q):
            launch(
                _prefix_attention_fwd,
                (cdiv(r, row.sizes["BLOCK_R"]) * h * b,),
                q,
                *sources,
                out,
                lse,
                h,
                r,
                t,
                *_counts(b, sources, bias),
                scale,
                *_strides(q, *sources),
                HAS_BIAS=bias is not None,
                **_width(d),
                **row.options,
            )
    return out, lse


def _forward_outputs(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    b, h, r, _ = q.shape
    return _fresh(b, h, r, q), q.new_empty((b, h, r), dtype=torch.float32)


def _sources(
    k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """What queries read; an empty prefix and an unread bias where there is none."""
    return (
        k,
        v,
        k[:, :, :0] if prefix_k is None else prefix_k,
        v[:, :, :0] if prefix_v is None else prefix_v,
        k if bias is None else bias,
    )


def _counts(images: int, sources: tuple[Tensor, ...], bias: Tensor | None) -> tuple[int, int, int]:
    """P, the images that share a prefix, the number of biases."""
    prefix = sources[2]
    return prefix.shape[2], max(images // prefix.shape[0], 1), 1 if bias is None else bias.shape[0]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()]


def _width(d: int) -> dict[str, int]:
    return {"D": d, "BLOCK_D": max(power_of_2(d), 16)}


def _backward_tokens(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    packed: bool,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    """dq (B, H, R, d) and, if wanted, dk and dv (B, T, 2, H, d); packed: all three as the first, (B, T, 3, H, d)."""
    dq, dkv = _backward_tokens_outputs(grad, q, k, v, prefix_k, prefix_v, bias, out, lse, scale, packed, wanted)
    out, lse = heads_last(out), row_major(lse)
    rows, tokens = (dq[:, :, 0], dq[:, :, 1:]) if packed else (dq.transpose(1, 2), dkv)
    (b, h, r, d), t = q.shape, k.shape[2]
    delta = torch.empty_like(lse)
    sources, bits = _sources(k, v, prefix_k, prefix_v, bias), 8 * q.itemsize
    p, group, windows = _counts(b, sources, bias)
    constants = {"HAS_BIAS": bias is not None, **_width(d)}
    with torch.cuda.device_of(q):
        if rows.numel():
            row = pick(TABLES["_prefix_attention_bwd_queries"], q.device, bits=bits, R=r, D=d)
            launch(
                _prefix_attention_bwd_queries,
                (cdiv(r, row.sizes["BLOCK_R"]) * h * b,),
                q,
                *sources,
                out,
                lse,
                grad,
                delta,
                rows,
                h,
                r,
                t,
                p,
                group,
                windows,
                scale,
                *_strides(q, *sources, grad),
                *rows.stride()[:2],
                **constants,
                **row.options,
            )
        if tokens.numel():
            row = pick(TABLES["_prefix_attention_bwd_tokens"], q.device, bits=bits, D=d)
            launch(
                _prefix_attention_bwd_tokens,
                (cdiv(t, row.sizes["BLOCK_T"]) * h * b,),
                q,
                k,
                v,
                sources[4],
                lse,
                grad,
                delta,
                tokens[:, :, 0],
                tokens[:, :, 1],
                h,
                r,
                t,
                windows,
                scale,
                *_strides(q, k, v, sources[4], grad),
                *tokens.stride()[:2],
                **constants,
                **row.options,
            )
    return dq, dkv


def _backward_tokens_outputs(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    packed: bool,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    (b, h, r, d), t = q.shape, k.shape[2]
    if packed:
        return q.new_empty(b, t, 3, h, d), q.new_empty(0)
    return _fresh(b, h, r, q), k.new_empty((b, t, 2, h, d) if wanted else (0, 0, 2, 0, 0))


def _backward_prefix(
    grad: Tensor, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    dk, dv = _backward_prefix_outputs(grad, q, prefix_k, prefix_v, out, lse, scale)
    out, lse = heads_last(out), row_major(lse)
    (n, h, p, d), b = prefix_k.shape, q.shape[0]
    if not dk.numel():
        return dk, dv
    row = pick(TABLES["_prefix_attention_bwd_prefix"], q.device, bits=8 * q.itemsize, D=d)
    run = _run_length(prefix_k, b, row.sizes["BLOCK_P"])
    runs = max(cdiv(b // n, run), 1)
    parts = (dk, dv) if runs == 1 else tuple(_fresh(n * runs, h, p, x, torch.float32) for x in (prefix_k, prefix_v))
    with torch.cuda.device_of(q):
        launch(
            _prefix_attention_bwd_prefix,
            (cdiv(p, row.sizes["BLOCK_P"]) * h * n * runs,),
            q,
            prefix_k,
            prefix_v,
            out,
            lse,
            grad,
            *parts,
            h,
            q.shape[2],
            p,
            b // n,
            runs,
            run,
            scale,
            *_strides(q, prefix_k, prefix_v, grad),
            **_width(d),
            **row.options,
        )
        if runs > 1:
            row = pick(TABLES["_prefix_attention_sum_runs"], q.device)
            launch(
                _prefix_attention_sum_runs,
                (n * cdiv(p * h * d, row.sizes["BLOCK"]),),
                *parts,
                dk,
                dv,
                runs,
                p * h * d,
                **row.options,
            )
    return dk, dv


def _backward_prefix_outputs(
    grad: Tensor, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    n, h, p, _ = prefix_k.shape
    return _fresh(n, h, p, prefix_k), _fresh(n, h, p, prefix_v)


_SOURCES = "Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor? bias"
torch.library.define("fastprompt::prefix_attention", f"({_SOURCES}, float scale) -> (Tensor, Tensor)")
torch.library.define(
    "fastprompt::prefix_attention_backward_tokens",
    f"(Tensor grad, {_SOURCES}, Tensor out, Tensor lse, float scale, bool packed, bool wanted) -> (Tensor, Tensor)",
)
torch.library.define(
    "fastprompt::prefix_attention_backward_prefix",
    "(Tensor grad, Tensor q, Tensor prefix_k, Tensor prefix_v, Tensor out, Tensor lse, float scale) "
    "-> (Tensor, Tensor)",
)
for _name, _launch, _fake in (
    ("prefix_attention", _forward, _forward_outputs),
    ("prefix_attention_backward_tokens", _backward_tokens, _backward_tokens_outputs),
    ("prefix_attention_backward_prefix", _backward_prefix, _backward_prefix_outputs),
):
    torch.library.impl(f"fastprompt::{_name}", ("CUDA", "CPU"), _launch)
    torch.library.register_fake(f"fastprompt::{_name}", _fake)

_op = torch.ops.fastprompt.prefix_attention.default
_op_backward_tokens = torch.ops.fastprompt.prefix_attention_backward_tokens.default
_op_backward_prefix = torch.ops.fastprompt.prefix_attention_backward_prefix.default


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        prefix_k: Tensor | None,
        prefix_v: Tensor | None,
        bias: Tensor | None,
        scale: float,
        plans: Plans | None,
    ) -> Tensor:
        given = *unpacked(q, k, v), prefix_k, prefix_v, bias
        if unseen(q):
            out, lse = again(plans, given, lambda: _forward(*given, scale))
        else:
            out, lse = _op(*given, scale)
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, bias, out, lse)
        ctx.scale, ctx.plans = scale, plans
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, prefix_k, prefix_v, bias, out, lse = ctx.saved_tensors
        all_packed, tokens_packed, wanted = k is None, v is None, any(ctx.needs_input_grad[1:3])
        q, k, v = unpacked(q, k, v)
        direct, plans, scale = unseen(grad), ctx.plans, ctx.scale
        if direct:
            out, lse = heads_last(out), row_major(lse)
        dq = dk = dv = dpk = dpv = None
        if any(ctx.needs_input_grad[:3]):
            read = (grad, q, k, v, prefix_k, prefix_v, bias, out, lse)
            if direct:
                part = ("tokens", wanted, *_layouts(read))
                dq, dk = again(plans, read, lambda: _backward_tokens(*read, scale, all_packed, wanted), part)
            else:
                dq, dk = _op_backward_tokens(*read, scale, all_packed, wanted)
            if not wanted:
                dk = None
            elif not tokens_packed:
                dk, dv = dk.permute(2, 0, 3, 1, 4).unbind(0)
        if any(ctx.needs_input_grad[3:5]):  # alone in the first block, where nothing before the tokens trains
            of_prefix = (grad, q, prefix_k, prefix_v, out, lse)
            if direct:
                part = ("prefix", *_layouts(of_prefix))
                dpk, dpv = again(plans, of_prefix, lambda: _backward_prefix(*of_prefix, scale), part)
            else:
                dpk, dpv = _op_backward_prefix(*of_prefix, scale)
        return dq, dk, dv, dpk, dpv, None, None, None


def _layouts(tensors: tuple[Tensor | None, ...]) -> list[tuple[int, ...]]:
    return [() if x is None else x.stride() for x in tensors]


def prefix_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    bias: Tensor | None,
    scale: float,
    plans: Plans | None = None,
) -> Tensor:
    """See `fastprompt.kernels.prefix_attention.prefix_attention`; under autocast, in autocast's dtype."""
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q = q.to(dtype)
        k, v, prefix_k, prefix_v = (x if x is None else x.to(dtype) for x in (k, v, prefix_k, prefix_v))
    if unseen(q) and not trains(q, k, v, prefix_k, prefix_v):
        given = *unpacked(q, k, v), prefix_k, prefix_v, bias
        return again(plans, given, lambda: _forward(*given, scale))[0]
    return _PrefixAttention.apply(q, k, v, prefix_k, prefix_v, bias, scale, plans)
