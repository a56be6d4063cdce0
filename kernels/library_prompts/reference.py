"""The specification of `library_prompts` in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PreNorm(NamedTuple):
    """A LayerNorm that stands before the first block (CLIP's `ln_pre`): weight and bias (D,), epsilon."""

    weight: Tensor
    bias: Tensor
    eps: float


def mixture(logits: Tensor, activation: str) -> Tensor:
    """(B, K, M) weights of the library tokens, in float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.softmax(logits, dim=-1) if activation == "softmax" else torch.sigmoid(logits)


def library_prompts(
    logits: Tensor,
    library: Tensor,
    activation: str,
    out: Tensor | None = None,
    slot: int = 0,
    patches: Tensor | None = None,
    prefix: Tensor | None = None,
    position: Tensor | None = None,
    pre_norm: PreNorm | None = None,
) -> Tensor:
    """(B, K, M), (M, D) → (B, K, D), or `out` (B, T, D) with its rows from `slot` on replaced by them, or
    [prefix, patches + position, prompts]."""
    weights = mixture(logits, activation)
    prompts = weights @ library.to(weights.dtype)
    if patches is not None:
        rows = [*embedded(patches, prefix, position), prompts.to(patches.dtype)]
        return normed(torch.cat(rows, dim=1), pre_norm)
    prompts = normed(prompts.to(library.dtype if out is None else out.dtype), pre_norm)
    if out is None:
        return prompts
    out[:, slot : slot + prompts.shape[1]] = prompts
    return out


def embedded(patches: Tensor, prefix: Tensor | None, position: Tensor | None) -> list[Tensor]:
    """The prefix (B, R, D), if any, and the patches (B, N, D), each plus its rows of the position embedding."""
    dtype, front = patches.dtype, 0
    if position is not None:
        front = position.shape[1] - patches.shape[1]  # rows of it that are the prefix's
        patches = patches + position[:, front:].to(dtype)
    if prefix is None:
        return [patches]
    prefix = prefix.to(dtype) if position is None or not front else prefix.to(dtype) + position[:, :front].to(dtype)
    return [prefix.expand(patches.shape[0], -1, -1), patches]


def normed(x: Tensor, norm: PreNorm | None) -> Tensor:
    """LayerNorm of rows (..., D), in float32 or wider, in the dtype of the rows."""
    if norm is None:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias, eps = norm
    return F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps).to(x.dtype)
