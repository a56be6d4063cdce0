"""The parts of a frozen Swin transformer (v1 and v2), and the constants of its windows.

`swin_reference.py` computes the papers' graph with them, `swin_forward.py` the optimised one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fastprompt.vit.weights import Block, Dense, Mlp, Norm, frozen

Pair = tuple[int, int]


class Layout(NamedTuple):
    """The order of patches in one block.

    Attributes:
        grid: (rows, columns) of the block's feature map.
        rows: for each of the block's patches, its index in the previous block's order; after a merging, four indices
            in turn per patch. None: the same order. back: the inverse of `rows`; None if `rows` also reads index T,
            the row of zeros for patches outside the map.
        windows: (windows · N), the patch at each place of the windows, or T for padding; None: the patches are
            already in that order. places: its inverse, the place of each patch.
    """

    grid: Pair
    rows: Tensor | None
    back: Tensor | None
    windows: Tensor | None
    places: Tensor | None


class SwinBlock(nn.Module):
    """One block: attention inside (shifted) windows with a relative-position bias, then an MLP.

    `post_norm` False (v1): x + attn(norm1(x)), then x + mlp(norm2(x)).
    `post_norm` True (v2):  x + norm1(attn(x)), then x + norm2(mlp(x)), and cosine attention scaled by `logit_scale`.

    Attributes:
        grid: (rows, columns) of the feature map the block was built for. window, shift: in tokens.
        bias_table: ((2h − 1)(2w − 1), heads), the bias for each offset inside an h × w window.
        logit_scale: (heads, 1, 1), or None: 1/√d.
        constant_bias: (windows or 1, heads, N, N): bias and shift mask for `grid`, computed once and not saved.
    """

    papers: ClassVar[Callable[..., Tensor]]
    """The papers' block, which `swin_reference.py` defines."""
    constant_bias: Tensor

    def __init__(
        self,
        *,
        norm1: Norm,
        qkv: Dense,
        proj: Dense,
        norm2: Norm,
        mlp: Mlp,
        num_heads: int,
        grid: Pair,
        window: Pair,
        shift: Pair,
        bias_table: Tensor,
        logit_scale: Tensor | None = None,
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm1, self.qkv, self.proj, self.norm2, self.mlp = norm1, qkv, proj, norm2, mlp
        self.num_heads, self.post_norm = num_heads, post_norm
        self.head_dim = qkv.num_outputs // (3 * num_heads)
        self.grid, self.window, self.shift = grid, window, shift
        self.bias_table: nn.Parameter = frozen(bias_table)
        self.logit_scale: nn.Parameter | None = frozen(logit_scale)
        self.register_buffer("constant_bias", self.bias_for(grid).detach(), persistent=False)
        for name in Layout._fields[1:]:
            self.register_buffer(name, None, persistent=False)

    def forward(self, *inputs: Any) -> Tensor:
        return type(self).papers(self, *inputs)

    @property
    def layout(self) -> Layout:
        """The layout for `grid`."""
        return Layout(self.grid, *(getattr(self, name) for name in Layout._fields[1:]))

    @property
    def width(self) -> int:
        return self.proj.num_outputs

    def attention_bias(self, grid: Pair) -> Tensor:
        """Return (windows or 1, heads, N, N): relative-position bias, plus the shift mask if windows are shifted."""
        if self.bias_table.requires_grad or (grid != self.grid and any(self.shift)):
            return self.bias_for(grid)
        return self.constant_bias

    def bias_for(self, grid: Pair) -> Tensor:
        """Compute `attention_bias` without the cached value."""
        h, w = self.window
        table, index = self.bias_table, relative_positions(self.window).to(self.bias_table.device)
        bias = table[index.flatten()].view(1, h * w, h * w, self.num_heads).permute(0, 3, 1, 2)  # (1, heads, N, N)
        if any(self.shift):
            bias = bias + shift_mask(grid, self.window, self.shift).to(table)[:, None]
        return bias.contiguous()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.bias_table.device.type != "meta":
            self.constant_bias = self.bias_for(self.grid).detach()


class Merge(nn.Module):
    """Patch merging: concatenate 2 × 2 neighbours on channels, then norm and reduction (v2: reduction and norm)."""

    def __init__(self, norm: Norm | None, reduction: Dense, norm_first: bool) -> None:
        super().__init__()
        self.norm, self.reduction, self.norm_first = norm, reduction, norm_first

    def forward(self, x: Tensor) -> Tensor:
        """Reduce (..., 4C) to (..., C')."""
        if self.norm is None:
            return self.reduction(x)
        return self.reduction(self.norm(x)) if self.norm_first else self.norm(self.reduction(x))


def padded(grid: Pair, window: Pair) -> Pair:
    """Round the grid up to whole windows."""
    return (math.ceil(grid[0] / window[0]) * window[0], math.ceil(grid[1] / window[1]) * window[1])


def partition(x: Tensor, window: Pair) -> Tensor:
    """Partition (B, H, W, C), a whole number of windows, into (B, windows, N, C)."""
    b, height, width, c = x.shape
    h, w = window
    x = x.view(b, height // h, h, width // w, w, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (height // h) * (width // w), h * w, c)


def relative_positions(window: Pair) -> Tensor:
    """Return (N, N): the row of the bias table for each pair of tokens in a window."""
    h, w = window
    place = torch.arange(h * w, device="cpu")
    rows, columns = place // w, place % w
    return (rows[:, None] - rows + h - 1) * (2 * w - 1) + columns[:, None] - columns + w - 1


def shift_mask(grid: Pair, window: Pair, shift: Pair) -> Tensor:
    """Return (windows, N, N): −100 between tokens that share a shifted window but are not neighbours, else 0."""
    regions = torch.zeros(1, *padded(grid, window), 1, device="cpu")
    slices = [(slice(0, -w), slice(-w, -s), slice(-s, None)) for w, s in zip(window, shift, strict=True)]
    for i, rows in enumerate(slices[0]):
        for j, columns in enumerate(slices[1]):
            regions[:, rows, columns] = 3 * i + j
    region = partition(regions, window)[0, :, :, 0]  # (windows, N)
    return torch.where(region[:, :, None] == region[:, None], 0.0, -100.0)


def layouts(blocks: Sequence[Block], merges: Sequence[Merge | None], grid: Pair) -> list[Layout]:
    """Return the layout of each block for images of `grid` patches; those for the backbone's own size are cached."""
    own = cast("Sequence[SwinBlock]", blocks)
    if grid == own[0].grid:
        return [block.layout for block in own]
    return compute_layouts(own, merges, grid, own[0].bias_table.device)


def keep_layouts(blocks: Sequence[Block], merges: Sequence[Merge | None]) -> None:
    """Compute the layouts for the backbone's own size once; each block stores its own."""
    own = cast("Sequence[SwinBlock]", blocks)
    device = own[0].bias_table.device
    device = torch.device("cpu") if device.type == "meta" else device
    for block, layout in zip(own, compute_layouts(own, merges, own[0].grid, device), strict=True):
        for name in Layout._fields[1:]:
            setattr(block, name, getattr(layout, name))


def compute_layouts(
    blocks: Sequence[SwinBlock], merges: Sequence[Merge | None], grid: Pair, device: torch.device
) -> list[Layout]:
    """Compute the layout of each block for images of `grid` patches."""
    result = []
    order = torch.arange(grid[0] * grid[1], device="cpu")  # the image's patch at each place of the previous order
    for block, merge in zip(blocks, merges, strict=True):
        position = order.argsort()  # the place of each patch in the previous order
        if merge is not None:
            size, (height, width) = len(order), grid
            grid = ((height + 1) // 2, (width + 1) // 2)
            position = F.pad(position.view(height, width), (0, width % 2, 0, height % 2), value=size)
            position = rearrange(position, "(rows y) (columns x) -> (rows columns) (x y)", y=2, x=2)  # (patches, 4)
        places = window_places(grid, block.window, block.shift)
        whole = bool((places < grid[0] * grid[1]).all())
        order = places if whole else torch.arange(grid[0] * grid[1], device="cpu")
        rows = position[order].flatten()
        exact = len(rows) == len(rows.unique()) and (merge is None or bool((rows < size).all()))
        same = merge is None and torch.equal(rows, torch.arange(len(rows), device="cpu"))
        result.append(
            Layout(
                grid,
                None if same else rows.to(device),
                rows.argsort().to(device) if exact else None,
                None if whole else places.to(device),
                None if whole else places.argsort()[: len(order)].to(device),
            )
        )
    return result


def window_places(grid: Pair, window: Pair, shift: Pair) -> Tensor:
    """Return (windows · N): the image's patch at each place of the (shifted) windows; H · W if there is none."""
    height, width = grid
    index = torch.arange(height * width, device="cpu").view(height, width).roll((-shift[0], -shift[1]), (0, 1))
    whole = padded(grid, window)
    index = F.pad(index, (0, whole[1] - width, 0, whole[0] - height), value=height * width)
    return partition(index[None, :, :, None], window).flatten()
