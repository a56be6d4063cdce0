"""The specification of `library_prompts` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def mixture(logits: Tensor, activation: str) -> Tensor:
    """(B, K, M) weights of the library tokens, in float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.softmax(logits, dim=-1) if activation == "softmax" else torch.sigmoid(logits)


def library_prompts(logits: Tensor, library: Tensor, activation: str) -> Tensor:
    """(B, K, M), (M, D) → (B, K, D)."""
    weights = mixture(logits, activation)
    return (weights @ library.to(weights.dtype)).to(library.dtype)
