"""Triton kernels of `library_prompts`: the mixture never leaves registers, prompts go where their reader wants them.

Forward, one launch: P = w L with w = softmax(A) by an online softmax over the library, or w = sigmoid(A).
Backward, one launch each, both deterministic:
    dA = w ∘ (dP Lᵀ − δ), δ = Σ_d dP ∘ P (softmax)   or   dA = w ∘ (1 − w) ∘ dP Lᵀ (sigmoid)
    dL = wᵀ dP, reduced over the B · K prompts in order.
Saved: A, L, P, and the maximum and the sum of exponentials of A's rows; w is computed again from them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprompt.kernels.tiles import Tiles, pick

TABLES = {
    "_library_prompts_fwd": (
        Tiles({"BLOCK_R": 16, "BLOCK_M": 64, "BLOCK_D": 64}, num_stages=3, limits={"K": 16}),
        Tiles({"BLOCK_R": 32, "BLOCK_M": 64, "BLOCK_D": 64}, num_warps=8, limits={"K": 64}),
        Tiles({"BLOCK_R": 64, "BLOCK_M": 64, "BLOCK_D": 64}, num_warps=8, families=("gfx",)),
        Tiles({"BLOCK_R": 64, "BLOCK_M": 32, "BLOCK_D": 64}, num_warps=8),
    ),
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
def _library_prompts_fwd(
    logits, library, prompts, rows,
    R, K, M, D,
    stride_ab, stride_ak, stride_am, stride_lm, stride_ld, stride_pb, stride_pk, stride_pd,
    SOFTMAX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b, k = (r // K).to(tl.int64), r % K
    a_row = logits + b * stride_ab + k * stride_ak  # (R,)
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        a = tl.load(a_row[:, None] + m[None, :] * stride_am, mask=(r[:, None] < R) & (m[None, :] < M),
                    other=float("-inf")).to(tl.float32)  # (R, M)
        tokens = tl.load(library + m[:, None] * stride_lm + d[None, :] * stride_ld,
                         mask=(m[:, None] < M) & (d[None, :] < D), other=0.0)  # (M, D)
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
        first = (r < R) & (tl.program_id(1) == 0)
        tl.store(rows + 2 * r, top, mask=first)
        tl.store(rows + 2 * r + 1, total, mask=first)
    tl.store(prompts + b[:, None] * stride_pb + k[:, None] * stride_pk + d[None, :] * stride_pd,
             acc.to(prompts.dtype.element_ty), mask=(r[:, None] < R) & (d[None, :] < D))


@triton.jit
def _library_prompts_bwd_logits(
    grad, logits, library, prompts, rows, grad_logits,
    R, K, M, D,
    stride_gb, stride_gk, stride_gd, stride_ab, stride_ak, stride_am, stride_lm, stride_ld,
    stride_pb, stride_pk, stride_pd,
    SOFTMAX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    b, k = (r // K).to(tl.int64), r % K
    delta = tl.zeros((BLOCK_R,), tl.float32)
    dw = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (r[:, None] < R) & (d[None, :] < D)
        g = tl.load(grad + b[:, None] * stride_gb + k[:, None] * stride_gk + d[None, :] * stride_gd,
                    mask=inside, other=0.0)  # (R, D)
        tokens = tl.load(library + m[:, None] * stride_lm + d[None, :] * stride_ld,
                         mask=(m[:, None] < M) & (d[None, :] < D), other=0.0)  # (M, D)
        dw = tl.dot(g, tl.trans(tokens), dw, input_precision="ieee")
        if SOFTMAX:
            p = tl.load(prompts + b[:, None] * stride_pb + k[:, None] * stride_pk + d[None, :] * stride_pd,
                        mask=inside, other=0.0)  # (R, D)
            delta += tl.sum(g.to(tl.float32) * p.to(tl.float32), axis=1)
    inside = (r[:, None] < R) & (m[None, :] < M)
    a = tl.load(logits + b[:, None] * stride_ab + k[:, None] * stride_ak + m[None, :] * stride_am,
                mask=inside, other=0.0).to(tl.float32)  # (R, M)
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
    grad, logits, rows, grad_library,
    R, K, M, D,
    stride_gb, stride_gk, stride_gd, stride_ab, stride_ak, stride_am,
    SOFTMAX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        b, k = (r // K).to(tl.int64), r % K
        a = tl.load(logits + b[:, None] * stride_ab + k[:, None] * stride_ak + m[None, :] * stride_am,
                    mask=(r[:, None] < R) & (m[None, :] < M), other=float("-inf")).to(tl.float32)  # (R, M)
        g = tl.load(grad + b[:, None] * stride_gb + k[:, None] * stride_gk + d[None, :] * stride_gd,
                    mask=(r[:, None] < R) & (d[None, :] < D), other=0.0)  # (R, D)
        if SOFTMAX:
            highest = tl.load(rows + 2 * r, mask=r < R, other=0.0)
            total = tl.load(rows + 2 * r + 1, mask=r < R, other=1.0)
            w = tl.exp(a - highest[:, None]) / total[:, None]
        else:
            w = tl.sigmoid(a)
        acc = tl.dot(tl.trans(w.to(g.dtype)), g, acc, input_precision="ieee")
    tl.store(grad_library + m.to(tl.int64)[:, None] * D + d[None, :], acc.to(grad_library.dtype.element_ty),
             mask=(m[:, None] < M) & (d[None, :] < D))


def _launch_forward(logits: Tensor, library: Tensor, prompts: Tensor, rows: Tensor, softmax: bool) -> None:
    """Mix into `prompts` (B, K, D), which may be a slice of a sequence."""
    (b, k, m), d = logits.shape, library.shape[1]
    if b * k * d == 0:
        return
    row = pick(TABLES["_library_prompts_fwd"], logits.device, K=k, M=m, D=d)
    grid = (triton.cdiv(b * k, row.sizes["BLOCK_R"]), triton.cdiv(d, row.sizes["BLOCK_D"]))
    with torch.cuda.device_of(logits):
        _library_prompts_fwd[grid](logits, library, prompts, rows, b * k, k, m, d, *logits.stride(), *library.stride(),
                                   *prompts.stride(), SOFTMAX=softmax, **row.options)


def _forward(logits: Tensor, library: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    prompts, rows = _forward_outputs(logits, library, softmax)
    _launch_forward(logits, library, prompts, rows, softmax)
    return prompts, rows


def _forward_outputs(logits: Tensor, library: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    b, k, _ = logits.shape
    return (library.new_empty(b, k, library.shape[1]),
            logits.new_empty(b, k, 2 * softmax, dtype=torch.float32))


def _into(sequence: Tensor, logits: Tensor, library: Tensor, slot: int, softmax: bool) -> Tensor:
    rows = _into_outputs(sequence, logits, library, slot, softmax)
    _launch_forward(logits, library, sequence[:, slot:slot + logits.shape[1]], rows, softmax)
    return rows


def _into_outputs(sequence: Tensor, logits: Tensor, library: Tensor, slot: int, softmax: bool) -> Tensor:
    b, k, _ = logits.shape
    return logits.new_empty(b, k, 2 * softmax, dtype=torch.float32)


def _grad_logits(grad: Tensor, logits: Tensor, library: Tensor, prompts: Tensor, rows: Tensor, softmax: bool
                 ) -> Tensor:
    (b, k, m), d = logits.shape, library.shape[1]
    out = _grad_logits_output(grad, logits, library, prompts, rows, softmax)
    if out.numel():
        row = pick(TABLES["_library_prompts_bwd_logits"], logits.device, K=k, M=m, D=d)
        grid = (triton.cdiv(b * k, row.sizes["BLOCK_R"]), triton.cdiv(m, row.sizes["BLOCK_M"]))
        with torch.cuda.device_of(logits):
            _library_prompts_bwd_logits[grid](
                grad, logits, library, prompts, rows, out, b * k, k, m, d, *grad.stride(), *logits.stride(),
                *library.stride(), *prompts.stride(), SOFTMAX=softmax, **row.options)
    return out


def _grad_logits_output(grad: Tensor, logits: Tensor, library: Tensor, prompts: Tensor, rows: Tensor, softmax: bool
                        ) -> Tensor:
    return logits.new_empty(logits.shape)


def _grad_library(grad: Tensor, logits: Tensor, library: Tensor, rows: Tensor, softmax: bool) -> Tensor:
    (b, k, m), d = logits.shape, library.shape[1]
    out = _grad_library_output(grad, logits, library, rows, softmax)
    if out.numel():
        row = pick(TABLES["_library_prompts_bwd_library"], logits.device, K=k, M=m, D=d)
        grid = (triton.cdiv(m, row.sizes["BLOCK_M"]), triton.cdiv(d, row.sizes["BLOCK_D"]))
        with torch.cuda.device_of(logits):
            _library_prompts_bwd_library[grid](grad, logits, rows, out, b * k, k, m, d, *grad.stride(),
                                               *logits.stride(), SOFTMAX=softmax, **row.options)
    return out


def _grad_library_output(grad: Tensor, logits: Tensor, library: Tensor, rows: Tensor, softmax: bool) -> Tensor:
    return library.new_empty(library.shape)


torch.library.define("fastprompt::library_prompts", "(Tensor logits, Tensor library, bool softmax) -> (Tensor, Tensor)")
torch.library.define("fastprompt::library_prompts_into",
                     "(Tensor(a!) sequence, Tensor logits, Tensor library, int slot, bool softmax) -> Tensor")
torch.library.define("fastprompt::library_prompts_grad_logits",
                     "(Tensor grad, Tensor logits, Tensor library, Tensor prompts, Tensor rows, bool softmax)"
                     " -> Tensor")
torch.library.define("fastprompt::library_prompts_grad_library",
                     "(Tensor grad, Tensor logits, Tensor library, Tensor rows, bool softmax) -> Tensor")
for _name, _kernel, _fake in (("library_prompts", _forward, _forward_outputs),
                              ("library_prompts_into", _into, _into_outputs),
                              ("library_prompts_grad_logits", _grad_logits, _grad_logits_output),
                              ("library_prompts_grad_library", _grad_library, _grad_library_output)):
    torch.library.impl(f"fastprompt::{_name}", ("CUDA", "CPU"), _kernel)
    torch.library.register_fake(f"fastprompt::{_name}", _fake)

_op = torch.ops.fastprompt.library_prompts.default
_op_into = torch.ops.fastprompt.library_prompts_into.default
_op_grad_logits = torch.ops.fastprompt.library_prompts_grad_logits.default
_op_grad_library = torch.ops.fastprompt.library_prompts_grad_library.default


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """dA and dL for the gradient of the prompts, each only when it is needed."""
    logits, library, prompts, rows = ctx.saved_tensors
    if ctx.slot is not None:
        prompts = prompts[:, ctx.slot:ctx.slot + logits.shape[1]]
    return (_op_grad_logits(grad, logits, library, prompts, rows, ctx.softmax) if ctx.needs_input_grad[0] else None,
            _op_grad_library(grad, logits, library, rows, ctx.softmax) if ctx.needs_input_grad[1] else None)


class _Fresh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, library: Tensor, softmax: bool) -> Tensor:
        prompts, rows = _op(logits, library, softmax)
        ctx.save_for_backward(logits, library, prompts, rows)
        ctx.softmax, ctx.slot = softmax, None
        return prompts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grad), None


class _Into(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, library: Tensor, sequence: Tensor, slot: int, softmax: bool) -> Tensor:
        rows = _op_into(sequence, logits, library, slot, softmax)
        ctx.mark_dirty(sequence)
        ctx.save_for_backward(logits, library, sequence, rows)
        ctx.softmax, ctx.slot = softmax, slot
        return sequence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        k = ctx.saved_tensors[0].shape[1]
        grads = _gradients(ctx, grad[:, ctx.slot:ctx.slot + k])
        before = None
        if ctx.needs_input_grad[2]:  # what was in the slots is overwritten
            before = grad.clone()
            before[:, ctx.slot:ctx.slot + k] = 0
        return *grads, before, None, None


def library_prompts(logits: Tensor, library: Tensor, activation: str, out: Tensor | None = None, slot: int = 0
                    ) -> Tensor:
    """See `fastprompt.kernels.library_prompts.library_prompts`."""
    if out is None:
        return _Fresh.apply(logits, library, activation == "softmax")
    return _Into.apply(logits, library, out, slot, activation == "softmax")
