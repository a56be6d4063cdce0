"""`add_norm` as Triton kernels: a row is read once, and the norm is taken while it is in registers.

Forward, with D channels: s = x + branch in their dtype, μ = Σ s / D, r = 1 / √(Σ (s − μ)² / D + eps), n = (s − μ) r.
Backward, with the gradients ds and dn of both outputs and ŝ = (s − μ) r in float32:
    dx = dbranch = ds + r (dn − Σ dn / D − ŝ Σ (dn ∘ ŝ) / D).
Saved: s, μ and r; no input. No atomics: two calls give the same bits.
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
from fastprompt.kernels.tiles import Tiles, pick

TABLES = {
    "_add_norm_fwd": (
        Tiles({"BLOCK": 4}, limits={"D": 512}),
        Tiles({"BLOCK": 2}, limits={"D": 1024}),
        Tiles({"BLOCK": 1}, families=("gfx",)),
        Tiles({"BLOCK": 1}, num_warps=8),
    ),
    "_add_norm_bwd": (
        Tiles({"BLOCK": 4}, limits={"D": 512}),
        Tiles({"BLOCK": 2}, limits={"D": 1024}),
        Tiles({"BLOCK": 1}, families=("gfx",)),
        Tiles({"BLOCK": 1}, num_warps=8),
    ),
}


@triton.jit
def _add_norm_fwd(
    x,
    branch,
    added,
    normed,
    stats,
    N,
    R,
    eps,
    stride_xb,
    stride_xr,
    stride_bb,
    stride_br,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row i of N is row i % R of image i // R."""
    i, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    b, r = (i // R).to(tl.int64), (i % R).to(tl.int64)
    inside = (i[:, None] < N) & (d[None, :] < D)
    s = tl.load(x + b[:, None] * stride_xb + r[:, None] * stride_xr + d[None, :], mask=inside, other=0.0).to(tl.float32)
    s += tl.load(branch + b[:, None] * stride_bb + r[:, None] * stride_br + d[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    s = s.to(added.dtype.element_ty)  # the norm is of the sum as it is stored
    at = i.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(added + at, s, mask=inside)
    s = s.to(tl.float32)
    mean = tl.sum(s, axis=1) / D
    s = tl.where(inside, s - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(s * s, axis=1) / D + eps)
    tl.store(normed + at, (s * scale[:, None]).to(normed.dtype.element_ty), mask=inside)
    tl.store(stats + 2 * i, mean, mask=i < N)
    tl.store(stats + 2 * i + 1, scale, mask=i < N)


@triton.jit
def _add_norm_bwd(
    grad_added,
    grad_normed,
    added,
    stats,
    out,
    N,
    SUMMED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """SUMMED: the sum, too, has a gradient."""
    i, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    inside, at = (i[:, None] < N) & (d[None, :] < D), i.to(tl.int64)[:, None] * D + d[None, :]
    mean = tl.load(stats + 2 * i, mask=i < N, other=0.0)[:, None]
    scale = tl.load(stats + 2 * i + 1, mask=i < N, other=0.0)[:, None]
    g = tl.load(grad_normed + at, mask=inside, other=0.0).to(tl.float32)
    s = (tl.load(added + at, mask=inside, other=0.0).to(tl.float32) - mean) * scale
    along = tl.sum(tl.where(inside, g * s, 0.0), axis=1)[:, None] / D
    x = scale * (g - tl.sum(g, axis=1)[:, None] / D - s * along)
    if SUMMED:
        x += tl.load(grad_added + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, x.to(out.dtype.element_ty), mask=inside)


def _outputs(x: Tensor, branch: Tensor, eps: float, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    size = x.shape
    normed = x.new_empty(size, dtype=torch.float32 if wide else x.dtype)
    return x.new_empty(size), normed, x.new_empty((*size[:2], 2), dtype=torch.float32)


def _forward(x: Tensor, branch: Tensor, eps: float, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    added, normed, stats = _outputs(x, branch, eps, wide)
    images, rows, d = x.shape
    if x.numel():
        row = pick(TABLES["_add_norm_fwd"], x.device, D=d)
        with torch.cuda.device_of(x):
            launch(
                _add_norm_fwd,
                (cdiv(images * rows, row.sizes["BLOCK"]),),
                x,
                branch,
                added,
                normed,
                stats,
                images * rows,
                rows,
                eps,
                *x.stride()[:2],
                *branch.stride()[:2],
                **_width(d),
                **row.options,
            )
    return added, normed, stats


def _gradient(grad_added: Tensor | None, grad_normed: Tensor, added: Tensor, stats: Tensor) -> Tensor:
    return added.new_empty(added.shape)


def _backward(grad_added: Tensor | None, grad_normed: Tensor, added: Tensor, stats: Tensor) -> Tensor:
    out = _gradient(grad_added, grad_normed, added, stats)
    images, rows, d = added.shape
    if out.numel():
        row = pick(TABLES["_add_norm_bwd"], added.device, D=d)
        with torch.cuda.device_of(added):
            launch(
                _add_norm_bwd,
                (cdiv(images * rows, row.sizes["BLOCK"]),),
                grad_normed if grad_added is None else row_major(grad_added),
                row_major(grad_normed),
                row_major(added),
                row_major(stats),
                out,
                images * rows,
                SUMMED=grad_added is not None,
                **_width(d),
                **row.options,
            )
    return out


def _width(d: int) -> dict[str, int]:
    return {"D": d, "BLOCK_D": max(power_of_2(d), 16)}


torch.library.define(
    "fastprompt::add_norm", "(Tensor x, Tensor branch, float eps, bool wide) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    "fastprompt::add_norm_backward", "(Tensor? grad_added, Tensor grad_normed, Tensor added, Tensor stats) -> Tensor"
)
for _name, _kernel, _fake in (("add_norm", _forward, _outputs), ("add_norm_backward", _backward, _gradient)):
    torch.library.impl(f"fastprompt::{_name}", ("CUDA", "CPU"), _kernel)
    torch.library.register_fake(f"fastprompt::{_name}", _fake)

_op = torch.ops.fastprompt.add_norm.default
_op_backward = torch.ops.fastprompt.add_norm_backward.default


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, eps: float, wide: bool, plans: Plans | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        if unseen(x):
            added, normed, stats = again(plans, (x, branch), lambda: _forward(x, branch, eps, wide))
        else:
            added, normed, stats = _op(x, branch, eps, wide)
        ctx.save_for_backward(added, stats)
        return added, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_added: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_normed is None:
            return grad_added, grad_added, None, None, None
        run = _backward if unseen(grad_normed) else _op_backward
        grad = run(grad_added, grad_normed, *ctx.saved_tensors)
        return grad, grad, None, None, None


def add_norm(x: Tensor, branch: Tensor, eps: float, plans: Plans | None = None) -> tuple[Tensor, Tensor]:
    """See `fastprompt.kernels.add_norm.add_norm`; the norm is float32 under CUDA's autocast, as PyTorch's is."""
    size, wide = x.shape, x.device.type == "cuda" and torch.is_autocast_enabled("cuda")
    x, branch = _addressable(x), _addressable(branch)
    if unseen(x) and not trains(x, branch):
        added, normed, _ = again(plans, (x, branch), lambda: _forward(x, branch, eps, wide), (wide,))
    else:
        added, normed = _AddNorm.apply(x, branch, eps, wide, plans)
    return (added, normed) if len(size) == 3 else (added.view(size), normed.view(size))


def _addressable(x: Tensor) -> Tensor:
    """`x` as (images, rows, D) with adjacent elements in a row."""
    x = x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
    return x if x.stride(2) == 1 else row_major(x)
