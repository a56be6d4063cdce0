"""The rotation of queries and keys in the rewritten graph.

A pair of channels (a, b) is rotated by θ as the complex number (a + i b) e^{iθ}. Where the channels of a pair are
neighbours (`Block.interleaved`), this is one product, in place where gradients are off; else it writes the values and
the rows that are not rotated too. Elsewhere it is a copy and four products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprompt.vit import reference
from fastprompt.vit.weights import Block, Turns

COMPLEX = (torch.float32, torch.float64)
"""Dtypes whose pairs PyTorch multiplies as complex numbers."""


def rotated(x: Tensor, turns: Turns, interleaved: bool = False) -> Tensor:
    """Rotate the patches of x, its queries or keys (B, H, T, d) or all three packed (B, T, 3, H, d).

    `interleaved`: pairs are neighbouring channels. Then x is overwritten where gradients are off.
    """
    turns = Turns(turns.sin.to(x.dtype), turns.cos.to(x.dtype), turns.first)
    if turns.sin.shape[-2] == 0:
        return x
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _plain(x, turns, interleaved)
    if torch.is_grad_enabled():  # groups of images may be views of one product, of which others are saved
        return _Rotated.apply(x, *turns, interleaved)
    return _written(x, *turns, interleaved, in_place=True)


def turned(x: Tensor, block: Block, turns: Turns | None, rows: slice | None = None) -> Tensor:
    """Rotate queries or keys (B, H, T, d) of all rows of the sequence, or of these alone; None: no rotation.

    x may be overwritten, as by `rotated`.
    """
    if turns is None:
        return x
    return rotated(x, turns if rows is None else turns.of(rows), block.interleaved)


def _plain(x: Tensor, turns: Turns, interleaved: bool) -> Tensor:
    """Operators alone, which compilers fuse and exporters know."""
    if x.ndim == 5:
        q, k, v = x.transpose(1, 3).unbind(2)  # (B, H, T, d)
        q, k = _plain(q, turns, interleaved), _plain(k, turns, interleaved)
        return torch.stack([q, k, v], dim=2).transpose(1, 3)
    if not interleaved:
        return reference.rotated(x, turns)
    sin, cos, first = turns
    before, patches, behind = x.tensor_split((first, first + sin.shape[-2]), dim=2)
    a, b = patches.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat([before, torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2), behind], dim=2)


class _Rotated(torch.autograd.Function):
    """A copy of x with its patches rotated; the backward rotates the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sin: Tensor, cos: Tensor, first: int, interleaved: bool) -> Tensor:
        ctx.save_for_backward(sin, cos)
        ctx.first, ctx.interleaved = first, interleaved
        return _written(x, sin, cos, first, interleaved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sin, cos = ctx.saved_tensors
        return _written(grad, -sin, cos, ctx.first, ctx.interleaved), None, None, None, None


def _written(x: Tensor, sin: Tensor, cos: Tensor, first: int, interleaved: bool, in_place: bool = False) -> Tensor:
    """Write the rotation of x, in x itself only if it is interleaved."""
    stop, dim = first + sin.shape[-2], 2
    if x.ndim == 5:
        sin, cos, dim = sin.transpose(0, 1)[:, None], cos.transpose(0, 1)[:, None], 1  # (N, 1, H or 1, d / 2)
    if not interleaved or x.dtype not in COMPLEX:
        out = x.clone()
        (a, b), (of_a, of_b) = (_pairs(_turning(y).narrow(dim, first, stop - first), interleaved) for y in (x, out))
        torch.mul(a, cos, out=of_a).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=of_b).addcmul_(a, sin)
        return out
    if x.stride(-1) != 1 or any(stride % 2 for stride in (x.storage_offset(), *x.stride()[:-1])):
        x = x.contiguous()
    out = x if in_place else torch.empty_like(x)
    own, found = _turning(x), _turning(out)
    patches, places = (
        torch.view_as_complex(y.narrow(dim, first, stop - first).unflatten(-1, (-1, 2))) for y in (own, found)
    )
    torch.mul(patches, torch.complex(cos, sin), out=places)
    if not in_place:
        for start, end in ((0, first), (stop, x.shape[dim])):
            if start < end:
                found.narrow(dim, start, end - start).copy_(own.narrow(dim, start, end - start))
        if x.ndim == 5:
            out[:, :, 2].copy_(x[:, :, 2])
    return out


def _turning(x: Tensor) -> Tensor:
    """What rotates of x: queries and keys."""
    return x[:, :, :2] if x.ndim == 5 else x


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, ...]:
    """The two channels of each pair, each (..., d / 2)."""
    return x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
