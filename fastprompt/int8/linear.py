"""`Int8Linear`, and the blocks that it runs in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastprompt.int8 import native
from fastprompt.int8.arithmetic import MOST_INNER, Rounded, packed, unpacked
from fastprompt.vit.linear import FrozenLinear, bfloat16_is_fast, linear
from fastprompt.vit.weights import ACTIVATIONS, Block, Dense, frozen

LINEARS = ("qkv", "proj", "fc1", "fc2")
"""The Linears of a block."""


def linear_of(block: Block, name: str) -> Dense:
    """Return one of a block's `LINEARS`."""
    found = getattr(block if name in ("qkv", "proj") else block.mlp, name)
    assert isinstance(found, Dense)
    return found


def set_linear(block: Block, name: str, dense: Dense) -> None:
    """Replace one of a block's `LINEARS`."""
    setattr(block if name in ("qkv", "proj") else block.mlp, name, dense)


class Int8Linear(FrozenLinear):
    """A frozen Linear whose product with tokens is computed in int8, and which fuses an activation: act(x Wᵀ + b).

    Its backward takes the gradient through the int8 weight, too, with gradients of 12 bits.

    Args:
        rounded: weight, scales and bits. bias: (N,) or None.
        weight: (N, K), kept for what reads it directly: the keys and values of prompts, and the one query of a last
            block. None: those get what the int8 weight stands for, computed when they ask.
        act: the fused activation. dtype: the backbone's. out_dtype: of the result; None: that of the rows.
    """

    packed: Tensor
    scale: Tensor
    factor: Tensor | None
    sums: Tensor
    like: Tensor

    def __init__(
        self,
        rounded: Rounded,
        bias: Tensor | None,
        weight: Tensor | None = None,
        act: str = "identity",
        dtype: torch.dtype = torch.float32,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.bits, self.act, self.out_dtype, self.sizes = rounded.bits, act, out_dtype, rounded.weight.shape
        self.register_buffer("packed", packed(rounded.weight))
        self.register_buffer("scale", rounded.scale)
        self.register_buffer("factor", None if bool((rounded.factor == 1).all()) else rounded.factor)
        self.register_buffer("sums", rounded.weight.sum(dim=1, dtype=torch.int32))
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self.bias, self.kept = frozen(bias), None
        if weight is not None:
            self.kept = nn.Parameter(weight, requires_grad=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(N, K), as kept, or what the int8 weight stands for."""
        if self.kept is not None:
            return self.kept
        plain = unpacked(self.packed, *self.sizes) * self.scale[:, None]
        return (plain if self.factor is None else plain * self.factor).to(self.like.dtype)

    @property
    def num_outputs(self) -> int:
        return self.sizes[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        """Cast the bias, the kept weight and `like`, but not scales and factors."""
        exact = {"scale": self.scale, "factor": self.factor}
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            setattr(self, name, None if tensor is None else tensor.to(self.packed.device))
        return self

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _Product.apply(x, self)
            return ACTIVATIONS[self.act](y)
        fused = self.act in native.ACTIVATIONS
        y = self.product(x, self.act if fused else "identity")
        return y if fused else ACTIVATIONS[self.act](y)

    def product(self, x: Tensor, act: str = "identity") -> Tensor:
        """Compute act(x Wᵀ + b) without a gradient."""
        return native.int8_linear(
            x,
            self.packed,
            self.scale,
            None if self.bias is None else self.bias.float(),
            act,
            bits=self.bits,
            factor=self.factor,
            sums=self.sums,
            in_bfloat16=(self.out_dtype or x.dtype) == torch.bfloat16,
        )

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        if self.kept is not None or not (torch.is_grad_enabled() and x.requires_grad):
            return super().part(x, outputs)
        y: Tensor = _PlainProduct.apply(x, self, outputs)
        return y

    def input_gradient(self, grad: Tensor) -> Tensor:
        if self.num_outputs > MOST_INNER:
            return super().input_gradient(grad)
        transposed = packed(unpacked(self.packed, *self.sizes).t())
        scale = torch.ones(self.sizes[1]) if self.factor is None else self.factor
        return native.int8_linear(
            grad, transposed, scale, None, factor=self.scale, in_bfloat16=grad.dtype == torch.bfloat16
        )


class _Product(torch.autograd.Function):
    """The int8 product of rows, and of their gradients with the same weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Int8Linear) -> Tensor:
        ctx.module, ctx.dtype = module, x.dtype
        return module.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.module.input_gradient(grad).to(ctx.dtype), None


class _PlainProduct(torch.autograd.Function):
    """The product of rows that are not rounded with some of the outputs' weights, which it does not keep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Int8Linear, rows: slice) -> Tensor:
        ctx.module, ctx.rows = module, rows
        return linear(x, module.weight[rows], None if module.bias is None else module.bias[rows])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return linear(grad, ctx.module.weight[ctx.rows].t(), None), None, None


def quantize_block(block: Block, weights: Mapping[str, Rounded], serving: bool = True) -> None:
    """Replace Linears of a folded block by `Int8Linear`s.

    Args:
        weights: of the Linears, by name; those that are not named stay as they are.
        serving: for inference: fuse the MLP's activation, keep the weights that prompts read, and where the CPU
            multiplies bfloat16, compute attention in that format and keep hidden activations in it. Otherwise for
            training.
    """
    mlp = block.mlp
    plain = block.q_norm is None and block.k_norm is None and block.bias is None and block.attn_norm is None
    narrow = serving and plain and not block.rotary and mlp.norm is None and set(LINEARS) == set(weights)
    narrow = narrow and block.qkv.weight.dtype == torch.float32 and bfloat16_is_fast(torch.device("cpu"))
    for name, rounded in weights.items():
        source = linear_of(block, name)
        fused = serving and name == "fc1" and mlp.glu == "none" and mlp.act in native.ACTIVATIONS
        out_dtype = (torch.bfloat16 if name in ("qkv", "fc1") else torch.float32) if narrow else None
        kept = source.weight if serving and name in ("qkv", "proj") else None
        act, dtype = mlp.act if fused else "identity", source.weight.dtype
        set_linear(block, name, Int8Linear(rounded, source.bias, kept, act, dtype, out_dtype))
        if fused:
            mlp.act = "identity"


def is_int8(block: Block) -> bool:
    """Whether a Linear of the block is computed in int8."""
    return any(isinstance(module, Int8Linear) for module in block.modules())
