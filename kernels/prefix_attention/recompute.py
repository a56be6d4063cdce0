"""`prefix_attention` for training on a CPU: saves its inputs alone and computes the weights again in the backward.

What autograd would save (keys and values behind a copied prefix, output, weights) is made again from q, k, v and the
prefix, which are views of what the projections returned. The C++ kernels do this where they can; elsewhere a few images
at a time go through buffers that stay in the cache: the weights of a whole batch would come from memory, page by page.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprompt.kernels.prefix_attention import native
from fastprompt.kernels.prefix_attention.reference import unpacked, with_prefix

BUFFER_SCORES = 5 * 2**18
"""Scores for each thread that the backward holds at a time, in two buffers: they stay in a core's cache."""


def prefix_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    scale: float,
    natively: bool = False,
) -> Tensor:
    """See `fastprompt.kernels.prefix_attention.prefix_attention`; `natively`: by the C++ kernels."""
    return _PrefixAttention.apply(q, k, v, prefix_k, prefix_v, scale, natively)


class _PrefixAttention(torch.autograd.Function):
    """With S = scale · q Kᵀ, A = softmax(S), O = A V and Ȯ = ∂L/∂O:

    V̇ = Aᵀ Ȯ, Ȧ = Ȯ Vᵀ, Ṡ = A ∘ (Ȧ − rowsum(A ∘ Ȧ)), q̇ = scale · Ṡ K, K̇ = scale · Ṡᵀ q; K, V = [prefix, tokens].
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        prefix_k: Tensor | None,
        prefix_v: Tensor | None,
        scale: float,
        natively: bool,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v)
        ctx.scale, ctx.natively = scale, natively
        if natively:
            return native.prefix_attention(q, k, v, prefix_k, prefix_v, None, scale)
        q, k, v = unpacked(q, k, v)
        return F.scaled_dot_product_attention(q, with_prefix(prefix_k, k), with_prefix(prefix_v, v), scale=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, prefix_k, prefix_v = ctx.saved_tensors
        packed = 3 if k is None else 2 if v is None else 1
        q, k, v = unpacked(q, k, v)
        (b, h, r, d), t = q.shape, k.shape[2]
        p = 0 if prefix_k is None else prefix_k.shape[2]
        wants_q, wants_tokens = ctx.needs_input_grad[0], any(ctx.needs_input_grad[0 if packed == 3 else 1 : 3])
        wants_prefix = p > 0 and (ctx.needs_input_grad[3] or ctx.needs_input_grad[4])
        read = slice(0 if wants_prefix else p, p + t if wants_tokens else p)  # the keys that need a gradient
        # the heads of a row lie side by side, as the products need them which take these gradients
        whole = q.new_empty(b, t, 3 if packed == 3 else 2, h, d) if wants_tokens else None
        parts = (None, None) if whole is None else whole.permute(2, 0, 3, 1, 4).unbind(0)
        grad_k, grad_v = parts[-2:]
        grad_q = parts[0] if packed == 3 else q.new_empty(b, r, h, d).transpose(1, 2) if wants_q else None
        grads = {3: (whole, None, None), 2: (grad_q, whole, None), 1: (grad_q, grad_k, grad_v)}[packed]
        if ctx.natively:
            of_prefix = [q.new_empty(b, h, p, d, dtype=torch.float32) for _ in range(2)] if wants_prefix else []
            written: list[Tensor | None] = [*of_prefix] or [None, None]
            grad = grad if grad.stride(3) == 1 else grad.contiguous()
            native.BACKWARD(grad, q, k, v, prefix_k, prefix_v, ctx.scale, grad_q, grad_k, grad_v, *written)
            if wants_prefix:
                shared = prefix_k.shape[0] == 1
                written = [(x.sum(0, keepdim=True) if shared else x).to(q.dtype) for x in of_prefix]
            return *grads, *written, None, None

        wide = torch.promote_types(q.dtype, torch.float32)
        prefix_grads = [q.new_zeros(x.shape, dtype=wide) for x in (prefix_k, prefix_v)] if wants_prefix else []
        room, head = BUFFER_SCORES * torch.get_num_threads(), max(1, r * (p + t))
        images, group = max(1, min(b, room // (h * head))), max(1, min(h, room // head))
        buffers = [
            q.new_empty(images * group * size)
            for size in (r * d, r * d, (p + t) * d, (p + t) * d, r * (p + t), r * (p + t), max(r, p + t) * d)
        ]
        for i in range(0, b, images):
            for j in range(0, h, group):
                at = (slice(i, i + images), slice(j, j + group))
                shape = q[at].shape[:2]
                queries, out, keys, values, weights, scores = (
                    buffer[: shape.numel() * rows * columns].view(*shape, rows, columns)
                    for buffer, rows, columns in zip(
                        buffers, (r, r, p + t, p + t, r, r), (d, d, d, d, p + t, p + t), strict=False
                    )
                )
                torch.mul(q[at], ctx.scale, out=queries)
                out.copy_(grad[at])
                for joined, prefix, own in ((keys, prefix_k, k), (values, prefix_v, v)):
                    if prefix is not None:
                        joined[:, :, :p] = prefix[at if prefix.shape[0] == b else (slice(0, 1), at[1])]
                    joined[:, :, p:] = own[at]
                _product(queries, keys.transpose(2, 3), scores)
                torch.softmax(scores, dim=-1, out=weights)
                _product(out, values.transpose(2, 3), scores)
                torch.ops.aten._softmax_backward_data.out(scores, weights, -1, q.dtype, grad_input=scores)
                if grad_q is not None:
                    torch.mul(_product(scores, keys, buffers[6]), ctx.scale, out=grad_q[at])
                for left, right, tokens, n in ((scores, queries, grad_k, 0), (weights, out, grad_v, 1)):
                    moved = _product(left[..., read].transpose(2, 3), right, buffers[6])  # (images, group, read, d)
                    if wants_prefix:
                        shared = prefix_grads[n].shape[0] == 1
                        into = prefix_grads[n][(slice(0, 1), at[1]) if shared else at]
                        into += moved[:, :, :p].sum(0, keepdim=True, dtype=wide) if shared else moved[:, :, :p]
                    if tokens is not None:
                        tokens[at] = moved[:, :, p - (read.start or 0) :]
        grad_prefix_k, grad_prefix_v = (g.to(q.dtype) for g in prefix_grads) if wants_prefix else (None, None)
        return *grads, grad_prefix_k, grad_prefix_v, None, None


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b of (n, h, i, j) and (n, h, j, k) into the memory of `out`."""
    n, h, i, k = *a.shape[:3], b.shape[3]
    out = out.view(-1)[: n * h * i * k].view(n * h, i, k)
    torch.bmm(a.reshape(n * h, i, a.shape[3]), b.reshape(n * h, a.shape[3], k), out=out)
    return out.view(n, h, i, k)
