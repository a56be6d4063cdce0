"""Tokens that only query: what they become in a block whose own tokens do not see them.

The block's tokens X stay as they are. A query token u attends to X alone, and then passes the rest of the block as a
row of the sequence would:

    a = softmax(q(u) K(X)ᵀ) V(X),   z = u + W_o a,   z ← z + MLP(norm₂(z))

For a head, q Kᵀ = (q W_k) X̂ᵀ and a V = (a X̂) W_vᵀ with the normed rows X̂, so no token needs a key or a value; the key
bias cancels in the softmax. W_k q of learned queries is the same for every image.

A query has no place in the image: like class token and registers, it is not rotated by a rotary embedding, whose keys
are, and a relative position bias adds nothing to its scores. A rotation stands between q and W_k, so keys are needed.
"""

from __future__ import annotations

from torch import Tensor

from fastprompt.kernels.prefix_attention.reference import attend
from fastprompt.vit import reference
from fastprompt.vit.linear import linear
from fastprompt.vit.rotary import turned
from fastprompt.vit.weights import Block, Turns


def absorbs(block: Block) -> bool:
    """Whether W_k can be absorbed into the queries: there is neither a norm on the keys nor a rotation of them."""
    return block.k_norm is None and not block.rotary


def asked(block: Block, queries: Tensor) -> Tensor:
    """Return W_kᵀ q of each head and query, (1 or B, heads · P, D), for queries (1 or B, P, D) entering the block."""
    inner, heads, d = block.num_heads * block.head_dim, block.num_heads, queries.shape[2]
    q = projected(block, queries) * block.scale  # (n, heads, P, d)
    w_k = block.qkv.weight[inner : 2 * inner].view(heads, -1, d)
    return (q @ w_k).flatten(1, 2)


def projected(block: Block, queries: Tensor, behind_norm: bool = False) -> Tensor:
    """Return q, (n, heads, P, d), of rows (n, P, D) that enter the block, or are `behind_norm`; scaling is left out."""
    inner = block.num_heads * block.head_dim
    bias = None if block.qkv.bias is None else block.qkv.bias[:inner]
    x = queries if block.post_norm or behind_norm else block.norm1(queries)
    q = linear(x, block.qkv.weight[:inner], bias).unflatten(-1, (block.num_heads, -1)).transpose(1, 2)
    return q if block.q_norm is None else block.q_norm(q)


def answers(
    block: Block, queries: Tensor, rows: Tensor, wanted: Tensor | None = None, turns: Turns | None = None
) -> Tensor:
    """Return what the queries become in the block, (B, P, D).

    Args:
        queries: (1 or B, P, D), as they enter the block.
        rows: (B, T, D), the input of the block's projections: its tokens behind its first norm.
        wanted: the result of `asked`, if it is known.
        turns: the rotation of the keys.
    """
    (b, _, d), p, heads = rows.shape, queries.shape[1], block.num_heads
    inner = heads * block.head_dim
    if absorbs(block):
        scores = (asked(block, queries) if wanted is None else wanted) @ rows.transpose(1, 2)
    else:
        q = projected(block, queries) * block.scale
        scores = (q @ keys(block, rows, turns).transpose(2, 3)).flatten(1, 2)
    weights = scores.softmax(dim=2)  # (B, heads · P, T)
    read = (weights @ rows).unflatten(1, (heads, p)).transpose(0, 1).flatten(1, 2)  # (heads, B · P, D)
    w_v = block.qkv.weight[2 * inner :].view(heads, -1, d)
    out = (read @ w_v.transpose(1, 2)).unflatten(1, (b, p))  # (heads, B, P, d)
    out = out.permute(1, 2, 0, 3).flatten(2)
    return _leaving(block, queries, out if block.qkv.bias is None else out + block.qkv.bias[2 * inner :])


def keys(block: Block, rows: Tensor, turns: Turns | None = None) -> Tensor:
    """Return keys (B, heads, T, d) of `rows` (B, T, D) as in `answers`."""
    inner = block.num_heads * block.head_dim
    (k,) = _heads(block, rows, slice(inner, 2 * inner))
    return turned(k if block.k_norm is None else block.k_norm(k), block, turns)


def keys_and_values(block: Block, rows: Tensor, turns: Turns | None = None) -> tuple[Tensor, Tensor]:
    """Return keys and values, each (B, heads, T, d), of `rows` (B, T, D) as in `answers`."""
    k, v = _heads(block, rows, slice(block.num_heads * block.head_dim, None))
    return turned(k if block.k_norm is None else block.k_norm(k), block, turns), v


def _heads(block: Block, rows: Tensor, columns: slice) -> tuple[Tensor, ...]:
    """These columns of the projection of rows (B, T, D), each part (B, heads, T, d)."""
    bias = None if block.qkv.bias is None else block.qkv.bias[columns]
    parts = linear(rows, block.qkv.weight[columns], bias).unflatten(-1, (-1, block.num_heads, block.head_dim))
    return parts.permute(2, 0, 3, 1, 4).unbind(0)


def answers_from_keys(block: Block, queries: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return `answers` from the keys and values (B, heads, T, d) of the block's tokens."""
    q = projected(block, queries).expand(k.shape[0], -1, -1, -1)
    return _leaving(block, queries, attend(q, k, v, scale=block.scale).transpose(1, 2).flatten(2))


def _leaving(block: Block, queries: Tensor, out: Tensor) -> Tensor:
    """Projection, residual and MLP of the queries, with their attention's output (B, P, heads · d)."""
    h = block.proj(out if block.attn_norm is None else block.attn_norm(out))
    return reference.add_branches(block, queries, h)
