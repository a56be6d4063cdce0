"""The forward of a prompted ViT without the rows nobody reads; the same numbers as `reference.py`.

* Prompts that the next block replaces need no query, no attention output, no projection and no MLP: they enter
  their block as extra keys and values only, and never become rows of the sequence.
* Prompts that are the same for every image give their keys and values once, not once per image.
* With a class-token readout the last block computes one query row and one MLP row.

All three hold in exact arithmetic, for outputs and gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from fastprompt.kernels.prefix_attention import prefix_attention
from fastprompt.vit import reference
from fastprompt.vit.reference import Sequence
from fastprompt.vit.weights import Block, FrozenViT

if TYPE_CHECKING:
    from fastprompt.generators.base import Draws, PromptGenerator


def features(vit: FrozenViT, embedded: Sequence, generator: PromptGenerator | None, context: Any,
             draws: Draws | None, readout: str) -> Tensor:
    """(B, D): what the head sees.

    Args:
        embedded: the result of `reference.embed`.
        generator, context, draws: as for `reference.encode`.
        readout: as for `reference.read_out`.
    """
    sequence, layers = embedded, () if generator is None else generator.layers
    if generator is not None and generator.before_pre_norm:
        first = generator.prompts(0, context, sequence.patches, draws)
        sequence, layers = sequence.with_prompts(first, generator.prompts_last), layers[1:]
    tokens = sequence.tokens if vit.norm_pre is None else vit.norm_pre(sequence.tokens)
    sequence = Sequence(tokens, sequence.num_prefix, sequence.num_prompts, sequence.prompts_last)
    last = vit.depth - 1
    for i, block in enumerate(vit.blocks):
        prompts = None
        if generator is not None and i in layers:
            prompts = generator.prompts(i, context, sequence.patches, draws)
            if i + 1 in layers or (i == last and "prompts" not in readout):
                sequence = sequence.without_prompts()
            else:
                sequence, prompts = sequence.with_prompts(prompts, generator.prompts_last), None
        rows = 1 if i == last and readout == "cls" else None
        tokens = run_block(block, sequence.tokens, prompts, rows)
        sequence = Sequence(tokens, sequence.num_prefix, sequence.num_prompts, sequence.prompts_last)
    if vit.norm is not None:
        sequence.tokens = vit.norm(sequence.tokens)
    return reference.read_out(vit, sequence, readout)


def attention(block: Block, x: Tensor, prompts: Tensor | None, rows: int | None) -> Tensor:
    """Attention of the first `rows` (None: all) of x (B, T, D) over [prompts, x] → (B, rows, D).

    x and `prompts` (1 or B, P, D) are what the block's projections read: normed, in a pre-norm block.
    """
    inner, heads = block.num_heads * block.head_dim, block.num_heads
    weight, bias = block.qkv.weight, block.qkv.bias
    kv_bias = None if bias is None else bias[inner:]
    if rows is None:
        q, k, v = block.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, d)
    else:
        q = F.linear(x[:, :rows], weight[:inner], None if bias is None else bias[:inner])
        q = q.unflatten(-1, (heads, -1)).transpose(1, 2)
        k, v = F.linear(x, weight[inner:], kv_bias).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    prefix_k = prefix_v = None
    if prompts is not None:
        kv = F.linear(prompts, weight[inner:], kv_bias)  # (1 or B, P, 2 · inner)
        prefix_k, prefix_v = kv.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if block.k_norm is not None:
            prefix_k = block.k_norm(prefix_k)
    if block.q_norm is not None:
        q = block.q_norm(q)
    if block.k_norm is not None:
        k = block.k_norm(k)
    x = prefix_attention(q, k, v, prefix_k, prefix_v).transpose(1, 2).flatten(2)
    return block.proj(x if block.attn_norm is None else block.attn_norm(x))


def run_block(block: Block, x: Tensor, prompts: Tensor | None = None, rows: int | None = None) -> Tensor:
    """One encoder block: the first `rows` (None: all) of x (B, T, D), which also attend to `prompts`."""
    if prompts is not None:
        prompts = prompts.to(x.dtype)
    if block.post_norm:
        x, h = x[:, :rows], attention(block, x, prompts, rows)
        x = x + block.norm1(h)
        return x + block.norm2(reference.mlp(block.mlp, x))
    if prompts is not None:
        prompts = block.norm1(prompts)
    x, h = x[:, :rows], attention(block, block.norm1(x), prompts, rows)
    x = x + (h if block.ls1 is None else h * block.ls1)
    h = reference.mlp(block.mlp, block.norm2(x))
    return x + (h if block.ls2 is None else h * block.ls2)
