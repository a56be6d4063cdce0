"""Activations that keep their derivative in 8 or 2 bits for the backward, instead of their input in full.

The activation of a frozen MLP needs nothing else: fc2 is a constant, so its input need not be kept. The forward is
exact; the backward multiplies by a derivative that was rounded. Of a row of d numbers between l and h,

    8 bits: code c = round((d − l) / s), s = (h − l) / 255, and c stands for l + c · s;
    2 bits: the same with s = (h − l) / 3, and each of the four codes stands for the mean of the numbers that have it.

Rounding the derivative loses less than rounding the input (results/training.md). Means keep the sum of each row, which
four evenly spaced levels do not; few numbers lie between the two ends of GELU's derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.vit.weights import ACTIVATIONS, Block

BITS = (8, 2)
CHUNK = 2**20
"""Numbers that are rounded at a time."""
DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: torch.ops.aten.gelu_backward(torch.ones_like(x), x),
    "gelu_tanh": lambda x: torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate="tanh"),
    "quick_gelu": lambda x: torch.ops.aten.silu_backward(torch.ones_like(x), 1.702 * x),
    "silu": lambda x: torch.ops.aten.silu_backward(torch.ones_like(x), x),
}
"""act′(x) by the name of act. x σ(k x) = silu(k x) / k, so that its derivative is silu′(k x)."""


def obstacle(block: Block) -> str:
    """Return why the block's activation cannot be kept in few bits; "" if it can."""
    if block.mlp.glu != "none":
        return "a gated MLP"
    return "" if block.mlp.act in DERIVATIVES else f"the activation {block.mlp.act!r}"


def activation(x: Tensor, act: str, bits: int) -> Tensor:
    """Compute act(x) for rows x (..., H), keeping act′(x) in `bits` bits, 8 or 2, for the backward."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return ACTIVATIONS[act](x)
    y: Tensor = _Compressed.apply(x, act, bits)[0]
    return y


def quantised(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes (..., H · bits / 8, rounded up) uint8 of rows (..., H), and what they stand for.

    The latter is (..., 2) for 8 bits, the lowest value and the step; (..., 4) for 2 bits, the value of each code.
    """
    low, high = rows.aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = ((rows - low) / step.clamp(min=torch.finfo(rows.dtype).tiny)).round_()  # (..., H)
    if bits == 8:
        return codes.to(torch.uint8), torch.cat([low, step], dim=-1)
    levels = []
    for code in range(4):
        own = codes == code
        count = own.sum(dim=-1, keepdim=True)
        mean = (rows * own).sum(dim=-1, keepdim=True) / count
        levels.append(torch.where(count > 0, mean, low + code * step))
    codes = F.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % 4)).unflatten(-1, (-1, 4))
    first, second, third, fourth = codes.unbind(-1)
    return first | second << 2 | third << 4 | fourth << 6, torch.cat(levels, dim=-1)


def dequantised(codes: Tensor, values: Tensor, columns: int) -> Tensor:
    """Return the rows (..., `columns`) that the result of `quantised` stands for, in the dtype of `values`."""
    if values.shape[-1] == 2:
        low, step = values.split(1, dim=-1)
        return torch.addcmul(low, codes.to(values.dtype), step)
    unpacked = torch.stack([codes >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)[..., :columns]
    return values.gather(-1, unpacked.long())


def chunk(columns: int) -> int:
    """Return how many rows are rounded at a time, which bounds what that takes beside what is kept."""
    return max(1, CHUNK // columns)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of all parts."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class _Compressed(torch.autograd.Function):
    """act(x), beside the codes of its derivative and what they stand for, in float32 or wider."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, act: str, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        rows, wide = x.reshape(-1, x.shape[-1]), torch.promote_types(x.dtype, torch.float32)
        parts = [quantised(DERIVATIVES[act](part.to(wide)), bits) for part in rows.split(chunk(x.shape[-1]))]
        codes, values = (joined(each) for each in zip(*parts, strict=True))
        return ACTIVATIONS[act](x), codes, values

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, codes, values = output
        ctx.mark_non_differentiable(codes, values)
        ctx.set_materialize_grads(False)
        ctx.columns = inputs[0].shape[-1]
        ctx.save_for_backward(codes, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *others: None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        size = chunk(ctx.columns)
        codes, values = (kept.split(size) for kept in ctx.saved_tensors)
        parts = [
            rows * dequantised(of_rows, stand_for, ctx.columns).to(grad.dtype)
            for rows, of_rows, stand_for in zip(grad.reshape(-1, ctx.columns).split(size), codes, values, strict=True)
        ]
        return joined(parts).view(grad.shape), None, None
