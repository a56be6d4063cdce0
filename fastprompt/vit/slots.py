"""Token sequences on a GPU: write rows directly to their final place instead of concatenating them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprompt.vit.prompts import Apart

Summands = tuple[Tensor, Tensor | None]
"""Rows (1 or B, R, D) and the tensor to add to them, or None."""


def in_slots(x: Tensor) -> bool:
    """Whether rows like x are written into their places in a sequence: True on a GPU.

    On a CPU the graph concatenates, which exporters and CPU compilers support.
    """
    return x.is_cuda


def assembled(apart: Apart, room: int = 0) -> Tensor:
    """Assemble [prefix, patches] with position embedding, (B, R + N + room, D); the last `room` rows are undefined."""
    patches, prefix, position = apart
    front = 0 if position is None else position.shape[1] - patches.shape[1]  # its rows for the prefix
    own = (patches, None if position is None else position[:, front:])
    if prefix is None:
        return sums(patches[:, :0], None, *own, room)
    return sums(prefix, position[:, :front] if position is not None and front else None, *own, room)


def sums(first: Tensor, to_first: Tensor | None, second: Tensor, to_second: Tensor | None, room: int = 0) -> Tensor:
    """Compute [first + to_first, second + to_second], each written directly to its rows of (B, R + S + room, D).

    Args:
        first, to_first: (1 or B, R, D); None adds nothing. second, to_second: (1 or B, S, D).
        room: number of extra rows at the end, left undefined.
    """
    given = (first, to_first, second, to_second)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        return _Sums.apply(*given, room)
    return _written(*given, room)


def _written(first: Tensor, to_first: Tensor | None, second: Tensor, to_second: Tensor | None, room: int) -> Tensor:
    given = [x for x in (first, to_first, second, to_second) if x is not None]
    dtype = given[0].dtype
    for x in given[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    images, (r, s, d) = max(x.shape[0] for x in given), (first.shape[1], second.shape[1], first.shape[2])
    out = first.new_empty(images, r + s + room, d, dtype=dtype)
    # a compiler fuses a sum with its copy, and does not support an `out` with gaps between its rows
    plain = torch.compiler.is_compiling()
    for rows, x, y in ((out[:, :r], first, to_first), (out[:, r : r + s], second, to_second)):
        if y is None or plain:
            rows.copy_(x if y is None else x + y)
        else:
            torch.add(x.expand(rows.shape), y, out=rows)
    return out


class _Sums(torch.autograd.Function):
    """`_written` with a backward: each summand's gradient is a view of the rows it was written to."""

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, to_first: Tensor | None, second: Tensor, to_second: Tensor | None, room: int
    ) -> Tensor:
        given = (first, to_first, second, to_second)
        ctx.shapes = [None if x is None else x.shape for x in given]
        return _written(*given, room)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        r, s = ctx.shapes[0][1], ctx.shapes[2][1]
        rows = [grad[:, :r], grad[:, :r], grad[:, r : r + s], grad[:, r : r + s]]
        return *[
            part.sum_to_size(shape) if shape is not None and needed else None
            for part, shape, needed in zip(rows, ctx.shapes, ctx.needs_input_grad, strict=False)
        ], None


class LastRows(torch.autograd.Function):
    """Return `rows` (B, T, D), whose last P rows are `last` (B, P, D); only `last` gets a gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, last: Tensor) -> Tensor:
        ctx.first = rows.shape[1] - last.shape[1]
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad[:, ctx.first :]
