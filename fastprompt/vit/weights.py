"""The parts of a frozen vision transformer: containers of tensors and switches.

Every reader (`fastprompt/vit/readers/`) fills the same few containers, so each forward is written once. `Norm` and
`Dense` are callable; `reference.py` and `forward.py` compute blocks, MLPs and pooling. Calling a `Block` is the papers'
block of `reference.py`.
"""

from __future__ import annotations

import copy
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

    @property
    def num_outputs(self) -> int:
        return self.weight.shape[0]

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


class Turns(NamedTuple):
    """The rotation of queries and keys in one block, for the patches of one grid.

    Attributes:
        sin, cos: (H or 1, N, d / 2), of the angle of each pair of channels at each patch.
        first: row of the first patch in the sequence. Rows before it and behind the last patch are not rotated.
    """

    sin: Tensor
    cos: Tensor
    first: int

    def of(self, rows: slice) -> Turns:
        """Return the rotation of these rows of the sequence alone."""
        start = rows.start or 0
        stop = self.first + self.sin.shape[-2] if rows.stop is None else rows.stop
        patches = slice(max(0, start - self.first), max(0, stop - self.first))
        return Turns(self.sin[..., patches, :], self.cos[..., patches, :], max(0, self.first - start))


class Rotary(nn.Module):
    """Rotary position embedding: the angles by which the queries and keys of patches are rotated.

    Channels i and i + d / 2 of a head are a pair (a, b), which becomes (a cos θ − b sin θ, b cos θ + a sin θ) with
    θ = row · frequency + column · frequency. A reader reorders the projections of a model that pairs neighbouring
    channels. Class token, registers and prompts are not rotated.

    Sine and cosine for the backbone's own grid are the library's; those of other grids are computed here. No tensor
    here is cast below float32, and none trains.

    Args:
        frequencies: (2, L, H, d / 2), of row and column; L is the number of blocks or 1, H that of heads or 1.
        sin, cos: (L, H, N, d / 2), for the backbone's own grid.
        centred: row i of n is at 2π (2 (i + 1/2 + offset) / n − 1), as in DINOv3; False: at i + offset.
        offset: shifts rows and columns. reference: the grid that positions are scaled to, as in EVA-02; None: unscaled.
        size: n of a centred position: "separate" (rows or columns), or the "min" or "max" of both.
    """

    frequencies: Tensor
    sin: Tensor
    cos: Tensor

    def __init__(
        self,
        frequencies: Tensor,
        sin: Tensor,
        cos: Tensor,
        *,
        centred: bool = False,
        offset: float = 0.0,
        reference: tuple[int, int] | None = None,
        size: str = "separate",
    ) -> None:
        super().__init__()
        for name, tensor in (("frequencies", frequencies), ("sin", sin), ("cos", cos)):
            self.register_buffer(name, tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True))
        self.centred, self.offset, self.reference, self.size = centred, offset, reference, size

    @property
    def rule(self) -> tuple[Any, ...]:
        """What the angles of a grid depend on besides the frequencies."""
        return self.centred, self.offset, self.reference, self.size

    def move(self, grid: tuple[int, int]) -> None:
        """Make this the rotation of a backbone with another grid."""
        angles = self.angles(grid)
        self.sin, self.cos = angles.sin(), angles.cos()

    def angles(self, grid: tuple[int, int]) -> Tensor:
        """Compute the angles (L, H, N, d / 2) of a grid of patches, in radians."""
        rows, columns = (self._positions(grid, axis) for axis in (0, 1))
        row, column = rows.repeat_interleave(grid[1])[:, None], columns.repeat(grid[0])[:, None]  # (N, 1)
        frequencies = self.frequencies.unsqueeze(3)  # (2, L, H, 1, d / 2)
        return row * frequencies[0] + column * frequencies[1]

    def _positions(self, grid: tuple[int, int], axis: int) -> Tensor:
        """The positions of rows (axis 0) or columns (axis 1)."""
        at = torch.arange(grid[axis], device=self.frequencies.device, dtype=torch.float32)
        if self.centred:
            n = {"separate": grid[axis], "min": min(grid), "max": max(grid)}[self.size]
            return 2 * math.pi * (2 * ((at + 0.5 + self.offset) / n) - 1).to(self.frequencies.dtype)
        at = at + self.offset
        return at if self.reference is None else at / grid[axis] * self.reference[axis]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Move the tensors, but keep at least float32: an angle is a product of a frequency and a large position."""

        def wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device)

        super()._apply(wide, recurse)
        return self


class RelativeBias(nn.Module):
    """A term of the attention scores that depends on how far apart two patches are, as in BEiT. Prompts have none.

    Args:
        table: (H, 2 rows − 1, 2 columns − 1); the query at (i, j) adds [:, i − k + rows − 1, j − l + columns − 1] to
            its score with the key at (k, l).
        prefix: (H, 3), of the class token's scores with patches, of patches' with the class token, and of its own;
            None: there is no class token.
    """

    whole: Tensor | None

    def __init__(self, table: Tensor, prefix: Tensor | None) -> None:
        super().__init__()
        self.table: nn.Parameter = frozen(table)
        self.prefix: nn.Parameter | None = frozen(prefix)
        self.register_buffer("whole", None, persistent=False)

    def forward(self) -> Tensor:
        """Return (1, H, T, T) for [class token, patches]."""
        if self.whole is not None:
            return self.whole
        rows, columns = (self.table.shape[1] + 1) // 2, (self.table.shape[2] + 1) // 2
        bias = self.table.unfold(1, rows, 1).unfold(2, columns, 1).flip(3, 4)  # (H, i, j, k, l)
        bias = bias.flatten(3, 4).flatten(1, 2)
        if self.prefix is not None:
            of_cls, to_cls, own = self.prefix[:, :, None, None].unbind(1)  # each (H, 1, 1)
            to_patches = of_cls.expand(-1, 1, bias.shape[2])
            first = torch.cat([own, to_patches], dim=2)
            bias = torch.cat([first, torch.cat([to_cls.expand(-1, bias.shape[1], 1), bias], dim=2)], dim=1)
        return bias[None]

    def folded(self) -> RelativeBias:
        """Return the same bias, written out once instead of at every call."""
        folded = RelativeBias(self.table, self.prefix)
        folded.table, folded.prefix, folded.whole = self.table, self.prefix, self().detach()
        return folded


class Block(nn.Module):
    """One encoder block.

    `post_norm` False: x + ls1·attn(norm1(x)), then x + ls2·mlp(norm2(x)).
    `post_norm` True:  x + norm1(attn(x)), then x + norm2(mlp(x)) (timm's ResPostBlock).
    `qkv` stacks q, k, v; `q_norm`, `k_norm` act per head, `attn_norm` on the heads' joined output. `scale` multiplies
    the attention scores; None: 1/√d. `rotary`: queries and keys of patches are rotated, behind their norms.
    `interleaved`: a pair that is rotated is channels 2i and 2i + 1 of a head, not i and i + d / 2. `bias` is added to
    the scores.
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
        rotary: bool = False,
        interleaved: bool = False,
        bias: RelativeBias | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.qkv, self.proj, self.norm2, self.mlp = norm1, qkv, proj, norm2, mlp
        self.q_norm, self.k_norm, self.attn_norm = q_norm, k_norm, attn_norm
        self.ls1, self.ls2 = frozen(ls1), frozen(ls2)
        self.bias = bias
        self.num_heads, self.post_norm = num_heads, post_norm
        self.rotary, self.interleaved = rotary, interleaved
        self.head_dim = qkv.num_outputs // (3 * num_heads)
        self.scale = self.head_dim**-0.5 if scale is None else scale

    def forward(self, *inputs: Any) -> Tensor:
        return type(self).papers(self, *inputs)

    @property
    def width(self) -> int:
        return self.proj.num_outputs


class Folded(NamedTuple):
    """A backbone's parts with their constants folded (`folding.py`).

    Attributes:
        blocks: every block. pixels: the patch embedding for raw pixels 0 … 255; None: there is a stem before it.
    """

    blocks: tuple[Block, ...]
    pixels: Dense | None


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


class Stem(nn.Module):
    """A frozen copy of the convolutional network that a hybrid ViT runs before its patch embedding."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = copy.deepcopy(body).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to the feature map (B, C, h, w) that is cut into patches."""
        features = self.body(images)
        return features[-1] if isinstance(features, (list, tuple)) else features


@dataclasses.dataclass(frozen=True)
class ViTSpec:
    """Properties of a ViT that its tensors do not show.

    Attributes:
        image_size: (height, width) in pixels that the position embedding is for.
        grid: (rows, columns) of patches.
        pool: "cls", "cls+dist", "patches" or "map": the readout of the model's own head.
        pos_on_prefix: whether the position embedding has rows for class and register tokens.
        pool_prefix: whether the model's own pooling also reads class and register tokens.
        dynamic_size: whether the model takes images of other sizes and resamples the position embedding.
        dynamic_pad: whether images are zero-padded to whole patches.
        mean, std: of each channel, for pixels in [0, 1].
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
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

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


def per_channel(values: tuple[float, ...], images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (C, 1, 1) on the device of `images`, filled there: CUDA graphs cannot capture a copy from the host."""
    return torch.cat([images.new_full((1, 1, 1), value, dtype=dtype) for value in values])
