"""`Int8Linear`, and the blocks that it runs in."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.int8 import native
from fastprompt.int8.arithmetic import packed
from fastprompt.vit.linear import FrozenLinear
from fastprompt.vit.weights import ACTIVATIONS, Block, Dense

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

    The float32 weight stays for what reads it directly, in float32: the keys and values of prompts, and the one query
    of a last block.
    """

    def __init__(self, source: Dense, weight: Tensor, scale: Tensor, act: str = "identity") -> None:
        super().__init__(source.weight, source.bias)
        self.weight, self.bias, self.act = source.weight, source.bias, act
        self.packed, self.scale = packed(weight), scale

    def forward(self, x: Tensor) -> Tensor:
        if self.act in native.ACTIVATIONS:
            return native.int8_linear(x, self.packed, self.scale, self.bias, self.act)
        return ACTIVATIONS[self.act](native.int8_linear(x, self.packed, self.scale, self.bias))


def quantize_block(block: Block, weights: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Replace Linears of a folded block by `Int8Linear`s, and fuse the MLP's activation.

    Args:
        weights: int8 weight (N, K) and scale (N,), by name; Linears that are not named stay in float32.
    """
    mlp = block.mlp
    for name, (weight, scale) in weights.items():
        fused = name == "fc1" and mlp.glu == "none" and mlp.act in native.ACTIVATIONS
        set_linear(block, name, Int8Linear(linear_of(block, name), weight, scale, mlp.act if fused else "identity"))
        if fused:
            mlp.act = "identity"


def is_int8(block: Block) -> bool:
    """Whether a Linear of the block is computed in int8."""
    return any(isinstance(module, Int8Linear) for module in block.modules())


def plain_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Return what an int8 weight (N, K) stands for, in float32."""
    return weight.to(torch.float32) * scale[:, None]
