"""Cross-attention of tokens to prompts, with a softmax of its own and the block's frozen projections.

    c = softmax(q(x) K(P)ᵀ) V(P) W_oᵀ + b_o

x and P are rows behind the block's first norm. Per head, q Kᵀ = x (W_q K_pᵀ) + b_q K_pᵀ and V W_oᵀ = (V_p W_oᵀ), so a
token needs two products with H · P columns instead of its q and its projection, each D × D. The weights of a head sum
to 1, so b_o is spread over the heads' values.
"""

from __future__ import annotations

from torch import Tensor

from fastprompt.kernels.prefix_attention.reference import attend
from fastprompt.vit.linear import linear
from fastprompt.vit.prompts import Prefix
from fastprompt.vit.queries import projected
from fastprompt.vit.weights import Block


def folds(block: Block, count: int) -> bool:
    """Whether `count` prompts are folded into the projections: where it is exact, and costs fewer products."""
    heads, width = block.num_heads, block.proj.num_outputs
    return block.q_norm is None and block.attn_norm is None and count * (heads - 1) < width


def read_of(block: Block, prompts: Tensor) -> Prefix:
    """Return what the block's tokens read of prompts (n, P, D), n being 1 or B.

    Folded, with H heads: W_q K_pᵀ (n, H · P, D), b_q K_pᵀ (n, 1, H, P) and V_p W_oᵀ + b_o / H (n, H · P, D). Otherwise
    keys and values (n, H, P, d).
    """
    (n, p, _), heads = prompts.shape, block.num_heads
    inner = heads * block.head_dim
    x = prompts if block.post_norm else block.norm1(prompts)
    weight, bias = block.qkv.weight, block.qkv.bias
    kv = linear(x, weight[inner:], None if bias is None else bias[inner:]).unflatten(-1, (2, heads, -1))
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # (n, H, P, d)
    k = k if block.k_norm is None else block.k_norm(k)
    if not folds(block, p):
        return k, v
    k = k * block.scale
    keys = (k @ weight[:inner].view(heads, block.head_dim, -1)).flatten(1, 2)
    offsets = k.new_zeros(n, heads, p) if bias is None else k @ bias[:inner].view(heads, -1, 1)
    proj = block.proj.weight.view(-1, heads, block.head_dim).permute(1, 2, 0)  # (H, d, D)
    values = (v @ proj).flatten(1, 2)
    return keys, offsets.view(n, 1, heads, p), values if block.proj.bias is None else values + block.proj.bias / heads


def attention(block: Block, rows: Tensor, read: Prefix) -> Tensor:
    """Return c, (B, R, D), for rows (B, R, D) behind the block's first norm, which read prompts as `read_of` says."""
    if len(read) == 2:
        k, v = (part.expand(len(rows), -1, -1, -1) for part in read)
        q = projected(block, rows, behind_norm=True)
        out = attend(q, k, v, scale=block.scale).transpose(1, 2).flatten(2)
        return block.proj(out if block.attn_norm is None else block.attn_norm(out))
    keys, offsets, values = read
    scores = rows @ keys.transpose(1, 2)  # (B, R, H · P)
    weights = (scores.unflatten(2, offsets.shape[2:]) + offsets).softmax(dim=3).flatten(2)
    return weights @ values
