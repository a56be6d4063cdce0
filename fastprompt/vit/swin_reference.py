"""VPT's forward of a prompted Swin transformer, written plainly: the reference and baseline of the faster one.

Prompt tokens precede the patches: [prompts, patches]. Every window attends to a copy of them, with relative-position
bias and mask 0 on prompt rows and columns. The copies' outputs are averaged over the windows. Patch merging
concatenates four patches on channels, and concatenates each prompt with itself four times. Deep prompts replace the
rows before every block.

With a batch of more than one image, the published shallow Swin also averages over windows of other images: its prompt
copies are in window-major order, its windows in batch-major order. Here each image has its own mean, which equals
theirs at batch size 1. VPT does not define Swin v2; the same rules apply to it here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fastprompt.vit.backbone import Backbone
from fastprompt.vit.prompts import NO_DRAWS, Draws, Prompts
from fastprompt.vit.reference import Sequence, embed, mlp, read_out
from fastprompt.vit.swin import Merge, Pair, SwinBlock, padded, partition

__all__ = ["embed", "encode", "read_out"]

SMALL_SCORES = 2**18


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    """Compute softmax(scale · q kᵀ + bias) v for (B, heads, S, d), by the faster of PyTorch's two ways.

    With 16-bit dtypes on a CPU, plain matrix products are faster than the fused kernel if a window has few scores.
    """
    if (
        q.device.type == "cpu"
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] * k.shape[2] <= SMALL_SCORES
    ):
        scores = (q if scale == 1 else q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias
        return torch.softmax(scores, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def attention(block: SwinBlock, x: Tensor, num_prompts: int, grid: Pair) -> Tensor:
    """Compute window attention over x (B, P + H·W, C), with heads joined and projected."""
    prompts, patches = x[:, :num_prompts], x[:, num_prompts:].unflatten(1, grid)
    if any(block.shift):
        patches = torch.roll(patches, (-block.shift[0], -block.shift[1]), (1, 2))
    whole = padded(grid, block.window)
    patches = F.pad(patches, (0, 0, 0, whole[1] - grid[1], 0, whole[0] - grid[0]))
    windows = partition(patches, block.window)  # (B, windows, N, C)
    num_windows = windows.shape[1]
    if num_prompts:
        windows = torch.cat([prompts[:, None].expand(-1, num_windows, -1, -1), windows], dim=2)
    qkv = block.qkv(windows).unflatten(-1, (3, block.num_heads, block.head_dim)).permute(3, 0, 1, 4, 2, 5)
    q, k, v = qkv.unbind(0)  # (B, windows, heads, P + N, d)
    if block.logit_scale is not None:
        q, k = F.normalize(q, dim=-1) * block.logit_scale, F.normalize(k, dim=-1)
    bias = F.pad(block.attention_bias(grid), (num_prompts, 0, num_prompts, 0))  # (windows or 1, heads, P + N, P + N)
    shape, scale = q.shape, None if block.logit_scale is None else 1.0
    if len(bias) == 1:
        x = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias, scale)
    else:
        x = attend(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), bias.flatten(0, 1), scale)
    x = block.proj(x.view(shape).transpose(2, 3).flatten(3))  # (B, windows, P + N, C)
    patches = reverse(x[:, :, num_prompts:], block.window, whole)[:, : grid[0], : grid[1]]
    if any(block.shift):
        patches = torch.roll(patches, block.shift, (1, 2))
    patches = patches.flatten(1, 2)
    return torch.cat([x[:, :, :num_prompts].mean(dim=1), patches], dim=1) if num_prompts else patches


def reverse(windows: Tensor, window: Pair, grid: Pair) -> Tensor:
    """Assemble (B, windows, N, C) into (B, H, W, C), the inverse of `partition`."""
    rows = grid[0] // window[0]
    return rearrange(windows, "b (rows columns) (h w) c -> b (rows h) (columns w) c", rows=rows, h=window[0])


def run_block(block: SwinBlock, x: Tensor, num_prompts: int, grid: Pair) -> Tensor:
    """Run one block over prompts and patches x (B, P + H·W, C)."""
    if block.post_norm:
        x = x + block.norm1(attention(block, x, num_prompts, grid))
        return x + block.norm2(mlp(block.mlp, x))
    x = x + attention(block, block.norm1(x), num_prompts, grid)
    return x + mlp(block.mlp, block.norm2(x))


SwinBlock.papers = run_block  # `encode` calls blocks as modules, so that forward hooks on them fire


def merge_patches(merge: Merge, x: Sequence) -> Sequence:
    """Merge 2 × 2 patches (odd sides zero-padded) on channels, and each prompt with itself four times."""
    (h, w), patches = x.grid, x.patches.unflatten(1, x.grid)
    patches = F.pad(patches, (0, 0, 0, w % 2, 0, h % 2))
    grid = ((h + 1) // 2, (w + 1) // 2)
    patches = rearrange(patches, "b (h down) (w right) c -> b (h w) (right down c)", down=2, right=2)
    if x.num_prompts:
        patches = torch.cat([x.prompts.repeat(1, 1, 4), patches], dim=1)
    return dataclasses.replace(x, tokens=merge(patches), grid=grid)


def encode(
    vit: Backbone,
    images: Tensor,
    generator: Prompts | None = None,
    context: Any = None,
    draws: Draws = NO_DRAWS,
    embedded: Sequence | None = None,
) -> Sequence:
    """Run normalised images (B, 3, H, W) through the blocks and the final norm: (B, P + H·W, C), prompts first.

    The arguments are those of `reference.encode`. Prompts come first whatever `prompts_last` is: neither attention nor
    means depend on the order.
    """
    x = embed(vit, images) if embedded is None else embedded
    for i, (block, merge) in enumerate(zip(vit.blocks, vit.merges, strict=True)):
        if merge is not None:
            x = merge_patches(merge, x)
        if generator is not None and i in generator.layers:
            x = x.with_prompts(generator.plain_prompts(i, context, x.patches, draws), prompts_last=False)
        x = dataclasses.replace(x, tokens=block(x.tokens, x.num_prompts, x.grid))
    return x if vit.norm is None else dataclasses.replace(x, tokens=vit.norm(x.tokens))
