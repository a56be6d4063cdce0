"""The rotation of queries and keys in the rewritten graph: four passes over the patches' rows and one copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprompt.vit import reference
from fastprompt.vit.weights import Turns


def rotated(x: Tensor, turns: Turns) -> Tensor:
    """Rotate the patches of x, its queries or keys (B, H, T, d) or all three packed (B, T, 3, H, d)."""
    turns = Turns(turns.sin.to(x.dtype), turns.cos.to(x.dtype), turns.first)
    if turns.sin.shape[-2] == 0:
        return x
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _plain(x, turns)
    return _Rotated.apply(x, *turns)


def turned(x: Tensor, turns: Turns | None, rows: slice | None = None) -> Tensor:
    """Rotate queries or keys (B, H, T, d) of all rows of the sequence, or of these alone; None: no rotation."""
    if turns is None:
        return x
    return rotated(x, turns if rows is None else turns.of(rows))


def _plain(x: Tensor, turns: Turns) -> Tensor:
    """Operators alone, which compilers fuse and exporters know."""
    if x.ndim == 4:
        return reference.rotated(x, turns)
    q, k, v = x.transpose(1, 3).unbind(2)  # (B, H, T, d)
    return torch.stack([reference.rotated(q, turns), reference.rotated(k, turns), v], dim=2).transpose(1, 3)


class _Rotated(torch.autograd.Function):
    """A copy of x with its patches rotated; the backward rotates the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sin: Tensor, cos: Tensor, first: int) -> Tensor:
        ctx.save_for_backward(sin, cos)
        ctx.first = first
        return _written(x, sin, cos, first)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sin, cos = ctx.saved_tensors
        return _written(grad, -sin, cos, ctx.first), None, None, None


def _written(x: Tensor, sin: Tensor, cos: Tensor, first: int) -> Tensor:
    out, rows = x.clone(), slice(first, first + sin.shape[-2])
    if x.ndim == 4:
        patches, places = x[:, :, rows], out[:, :, rows]
    else:
        patches, places = x[:, rows, :2], out[:, rows, :2]
        sin, cos = sin.transpose(0, 1)[:, None], cos.transpose(0, 1)[:, None]  # (N, 1, H or 1, d / 2)
    (a, b), (of_a, of_b) = patches.chunk(2, dim=-1), places.chunk(2, dim=-1)
    torch.mul(a, cos, out=of_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=of_b).addcmul_(a, sin)
    return out
