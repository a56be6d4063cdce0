"""The specification of `library_prompts` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def mixture(logits: Tensor, activation: str) -> Tensor:
    """(B, K, M) weights of the library tokens, in float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.softmax(logits, dim=-1) if activation == "softmax" else torch.sigmoid(logits)


def library_prompts(logits: Tensor, library: Tensor, activation: str, out: Tensor | None = None, slot: int = 0
                    ) -> Tensor:
    """(B, K, M), (M, D) → (B, K, D), or `out` (B, T, D) with its rows from `slot` on replaced by them."""
    weights = mixture(logits, activation)
    prompts = (weights @ library.to(weights.dtype)).to(library.dtype)
    if out is None:
        return prompts
    out[:, slot:slot + prompts.shape[1]] = prompts
    return out
