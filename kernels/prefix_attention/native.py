"""`prefix_attention` in C++ (`csrc/`): reads prompts and tokens where they are, and writes what the projection reads.

Per head and 24 or 32 queries: scores s over all keys, p = 2^(log₂e · scale · (s − max s)), out = p v / Σ p. On AMX and
on AVX-512 with its bfloat16 instructions the products of bfloat16 are theirs, and p is rounded to bfloat16 for the
second; elsewhere all is float32.

The backward, whose products are float32's, takes the same weights from q and k again; `recompute.py` calls it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.kernels.prefix_attention.reference import unpacked

torch.library.define(
    "fastprompt::prefix_attention_native",
    "(Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, float scale) -> Tensor",
)
OPERATOR = torch.ops.fastprompt.prefix_attention_native.default


@torch.library.register_fake("fastprompt::prefix_attention_native")
def _fake(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, scale: float) -> Tensor:
    b, h, r, d = q.shape
    return q.new_empty(b, r, h, d)


def prefix_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """See `fastprompt.kernels.prefix_attention.prefix_attention`; without bias."""
    q, k, v = unpacked(q, k, v)
    return OPERATOR(q, k, v, prefix_k, prefix_v, scale).transpose(1, 2)


torch.library.define(
    "fastprompt::prefix_attention_backward_native",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, float scale, Tensor(a!)? grad_q, "
    "Tensor(b!)? grad_k, Tensor(c!)? grad_v, Tensor(d!)? grad_prefix_k, Tensor(e!)? grad_prefix_v) -> ()",
)
BACKWARD = torch.ops.fastprompt.prefix_attention_backward_native.default


@torch.library.register_fake("fastprompt::prefix_attention_backward_native")
def _fake_backward(*arguments: Tensor | None) -> None:
    """The gradients are written into tensors that exist."""
