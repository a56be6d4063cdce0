"""The parts of a frozen vision transformer: containers of tensors and switches.

Every reader (`fastprompt/vit/readers/`) fills the same few containers, so each forward is written once. `Norm` and
`Dense` are callable; `reference.py` and `forward.py` compute blocks, MLPs and pooling. Calling a `Block` is the papers'
block of `reference.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, overload

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastprompt.arguments import ArgumentError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": F.hardsigmoid,
    "hard_swish": F.hardswish,
    "identity": lambda x: x,
}


@overload
def frozen(tensor: Tensor) -> nn.Parameter: ...
@overload
def frozen(tensor: Tensor | None) -> nn.Parameter | None: ...
def frozen(tensor: Tensor | None) -> nn.Parameter | None:
    """Return a detached copy of `tensor` that does not train."""
    return None if tensor is None else nn.Parameter(tensor.detach().clone(), requires_grad=False)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis: x̂ · weight + bias.

    `upcast` computes in float32 whatever the input's dtype (timm's `*Fp32` norms).
    """

    def __init__(
        self, kind: str, size: int, eps: float, weight: Tensor | None, bias: Tensor | None, upcast: bool = False
    ) -> None:
        super().__init__()
        if kind not in ("layernorm", "rmsnorm"):
            raise ArgumentError("kind", f"must be 'layernorm' or 'rmsnorm', got {kind!r}")
        self.kind, self.size, self.eps, self.upcast = kind, size, eps, upcast
        self.weight, self.bias = frozen(weight), frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        dtype = x.dtype
        if self.upcast and dtype in (torch.float16, torch.bfloat16):
            x = x.float()
            weight = weight.float() if weight is not None else None
            bias = bias.float() if bias is not None else None
        if self.kind == "layernorm":
            x = F.layer_norm(x, (self.size,), weight, bias, self.eps)
        else:
            x = F.rms_norm(x, (self.size,), weight, self.eps)
        return x.to(dtype)


class Dense(nn.Module):
    """A frozen Linear: weight (out, in), optional bias (out,)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = frozen(weight)
        self.bias = frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Mlp(nn.Module):
    """fc2(norm(gate(fc1 x))). `glu` selects how fc1's output is gated.

    `glu`: "none" act(h); "first" act(h₁)·h₂ (SwiGLU); "last" h₁·act(h₂) (GLU), with h = [h₁, h₂].
    """

    def __init__(self, fc1: Dense, fc2: Dense, act: str, norm: Norm | None = None, glu: str = "none") -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = fc1, fc2, norm
        self.act, self.glu = act, glu


class Block(nn.Module):
    """One encoder block.

    `post_norm` False: x + ls1·attn(norm1(x)), then x + ls2·mlp(norm2(x)).
    `post_norm` True:  x + norm1(attn(x)), then x + norm2(mlp(x)) (timm's ResPostBlock).
    `qkv` stacks q, k, v; `q_norm`, `k_norm` act per head, `attn_norm` on the heads' joined output. `scale` multiplies
    the attention scores; None: 1/√d.
    """

    papers: ClassVar[Callable[..., Tensor]]
    """The papers' block, which `reference.py` defines."""

    def __init__(
        self,
        *,
        norm1: Norm,
        qkv: Dense,
        proj: Dense,
        norm2: Norm,
        mlp: Mlp,
        num_heads: int,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        attn_norm: Norm | None = None,
        ls1: Tensor | None = None,
        ls2: Tensor | None = None,
        post_norm: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.qkv, self.proj, self.norm2, self.mlp = norm1, qkv, proj, norm2, mlp
        self.q_norm, self.k_norm, self.attn_norm = q_norm, k_norm, attn_norm
        self.ls1, self.ls2 = frozen(ls1), frozen(ls2)
        self.num_heads, self.post_norm = num_heads, post_norm
        self.head_dim = qkv.weight.shape[0] // (3 * num_heads)
        self.scale = self.head_dim**-0.5 if scale is None else scale

    def forward(self, *inputs: Any) -> Tensor:
        return type(self).papers(self, *inputs)

    @property
    def width(self) -> int:
        return self.proj.weight.shape[0]


class Folded(NamedTuple):
    """A backbone's parts with their constants folded (`folding.py`).

    Attributes:
        blocks: every block. pixels: the patch embedding for raw pixels 0 … 255.
    """

    blocks: tuple[Block, ...]
    pixels: Dense


class MapPool(nn.Module):
    """Attention pooling with one learned query (timm's AttentionPoolLatent, SigLIP's head)."""

    def __init__(
        self,
        *,
        latent: Tensor,
        q: Dense | None,
        kv: Dense,
        proj: Dense,
        norm: Norm | None,
        mlp: Mlp,
        num_heads: int,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
    ) -> None:
        super().__init__()
        self.latent = frozen(latent)
        self.q, self.kv, self.proj, self.norm, self.mlp = q, kv, proj, norm, mlp
        self.q_norm, self.k_norm, self.num_heads = q_norm, k_norm, num_heads


@dataclasses.dataclass(frozen=True)
class ViTSpec:
    """Properties of a ViT that its tensors do not show.

    Attributes:
        image_size: (height, width) in pixels that the position embedding is for.
        grid: (rows, columns) of patches.
        pool: "cls", "patches" or "map": the readout of the model's own head.
        pos_on_prefix: whether the position embedding has rows for class and register tokens.
        pool_prefix: whether the model's own pooling also reads class and register tokens.
        dynamic_size: whether the model takes images of other sizes and resamples the position embedding.
        dynamic_pad: whether images are zero-padded to whole patches.
        antialias: whether the model's library antialiases when it resamples the position embedding for other sizes.
    """

    name: str
    image_size: tuple[int, int]
    grid: tuple[int, int]
    patch_size: int
    num_heads: int
    has_cls: bool
    num_registers: int
    pool: str
    pos_on_prefix: bool = True
    pool_prefix: bool = False
    dynamic_size: bool = False
    dynamic_pad: bool = False
    antialias: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def obstacle(self, height: int, width: int) -> str:
        """Return why images of `height` x `width` pixels are not accepted; empty if they are."""
        p = self.patch_size
        if not self.dynamic_size:
            if (height, width) != self.image_size:
                return (
                    f"images must be {self.image_size[0]} x {self.image_size[1]} pixels for this backbone, got "
                    f"{height} x {width}; resize them, or build the backbone with image_size="
                )
        elif not self.dynamic_pad and (height % p or width % p or not height or not width):
            return f"images must have sides that are multiples of the patch size {p}, got {height} x {width}"
        return ""


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has no NaN or infinite values: one pass, and a second one if its sum overflows."""
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    return math.isfinite(tensor.detach().sum().item()) or bool(torch.isfinite(tensor).all())


def per_channel(values: tuple[float, float, float], images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (3, 1, 1) on the device of `images`, filled there: CUDA graphs cannot capture a copy from the host."""
    return torch.cat([images.new_full((1, 1, 1), value, dtype=dtype) for value in values])
