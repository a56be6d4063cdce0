"""The forward of a prompted ViT without the work nobody reads; the same numbers as `reference.py`.

* Prompts that the next block replaces need no query, no attention output, no projection and no MLP: they enter
  their block as keys and values only, and never become rows of the sequence.
* Prompts that are the same for every image give their keys and values once, not once per image; at inference once
  for an adapter.
* The last block computes only the rows that the head reads. With one query row, W_k and W_v are absorbed into the
  query's side, and there is no key and value product at all.
* The blocks are those of `folding.fold`: constants have moved into the Linears.
* Prompts that stay rows of the sequence join it behind the attention of their block, so that the backward of the
  first block reaches only them: the tokens of a frozen embedding need no gradient.

All of it holds in exact arithmetic, for outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastprompt.kernels.prefix_attention import prefix_attention
from fastprompt.vit import reference
from fastprompt.vit.linear import linear
from fastprompt.vit.reference import Sequence
from fastprompt.vit.weights import Block, FrozenViT, Norm

if TYPE_CHECKING:
    from fastprompt.generators.base import Draws, PromptGenerator

Prefix = tuple[Tensor, Tensor]
"""Keys and values of prompts, each (1 or B, heads, P, d)."""


def features(vit: FrozenViT, embedded: Sequence, generator: PromptGenerator | None, context: Any,
             draws: Draws | None, readout: str, prefixes: Mapping[int, Prefix] | None = None,
             recompute: bool = False) -> Tensor:
    """(B, D): what the head sees.

    Args:
        embedded: class token, registers and patches of `reference.embed`.
        generator, context, draws: as for `reference.encode`.
        readout: as for `reference.read_out`.
        prefixes: block → what `static_prefixes` returned for these prompts; other blocks compute theirs.
        recompute: keep only what enters a block for the backward and compute the block again there.
    """
    folded = vit.folded()
    blocks = vit.blocks if folded is None else folded.blocks
    layers = () if generator is None else generator.layers
    x, first = embedded.tokens, None
    if generator is not None and generator.before_pre_norm:
        first = generator.prompts(0, context, embedded.patches, draws).to(x.dtype)
        first = first if vit.norm_pre is None else vit.norm_pre(first)
    x = x if vit.norm_pre is None else vit.norm_pre(x)
    own, last = x.shape[1], vit.depth - 1  # the rows that are no prompts come first
    patches = slice(vit.num_prefix, own)

    def step(i: int, x: Tensor) -> Tensor:
        """Block i. Prompt rows that stay stand last."""
        kept = slice(0, own) if i + 1 in layers else slice(0, None)  # the next block replaces all prompt rows
        if i == last:
            kept = rows_read(vit, readout, own)
        block, prompts = blocks[i], None
        if generator is not None and i in layers:
            if prefixes is not None and i in prefixes:
                return run_block(block, x, prefixes[i], rows=kept)
            prompts = first
            if i > 0 or prompts is None:
                prompts = generator.prompts(i, context, x[:, patches], draws).to(x.dtype)
            if prompts_stay(generator, i, last, readout):
                return run_block(block, x, joining=prompts, rows=kept)
        if one_query(block, kept):
            return one_query_block(block, x, prompts)
        return run_block(block, x, None if prompts is None else prompt_keys(block, prompts), rows=kept)

    for i in range(vit.depth):
        if recompute and torch.is_grad_enabled():
            x = checkpoint(step, i, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = step(i, x)
    x = x if vit.norm is None else vit.norm(x)
    return reference.read_out(vit, rows_left(vit, readout, x, own), readout)


def embed(vit: FrozenViT, raw: Tensor, images: Tensor) -> Sequence:
    """`reference.embed` of `images`, from the `raw` uint8 pixels they were made of where that is possible."""
    folded = vit.folded()
    if raw.dtype != torch.uint8 or folded is None or vit.spec.dynamic_pad:
        return reference.embed(vit, images.to(vit.dtype))
    return reference.embed(vit, raw.to(vit.dtype), folded.pixels)


def static_prefixes(vit: FrozenViT, generator: PromptGenerator, readout: str) -> dict[int, Prefix]:
    """Block → keys and values of prompts that depend on parameters only, for all blocks that only read theirs."""
    folded = vit.folded()
    blocks, last = vit.blocks if folded is None else folded.blocks, vit.depth - 1
    return {i: prompt_keys(blocks[i], generator.prompts(i, None).to(vit.dtype)) for i in generator.layers
            if not prompts_stay(generator, i, last, readout) and not (i == 0 and generator.before_pre_norm)
            and not (i == last and one_query(blocks[i], rows_read(vit, readout, 0)))}


def prompts_stay(generator: PromptGenerator, i: int, last: int, readout: str) -> bool:
    """Whether prompts that enter block i are rows of what leaves it."""
    return "prompts" in readout if i == last else i + 1 not in generator.layers


def rows_read(vit: FrozenViT, readout: str, own: int) -> slice:
    """The rows of the last block's output that `reference.read_out` reads; `own`: class token, registers, patches."""
    if readout == "cls":
        return slice(0, 1)
    if readout == "prompts":
        return slice(own, None)
    if readout == "patches+prompts":
        return slice(vit.num_prefix, None)
    return slice(0 if vit.spec.pool_prefix else vit.num_prefix, own)


def rows_left(vit: FrozenViT, readout: str, x: Tensor, own: int) -> Sequence:
    """The rows that `rows_read` kept, as a sequence."""
    num_patches = own - vit.num_prefix
    if readout in ("cls", "prompts"):
        return Sequence(x, 0, x.shape[1], prompts_last=True)
    if readout == "patches+prompts":
        return Sequence(x, 0, x.shape[1] - num_patches, prompts_last=True)
    return Sequence(x, x.shape[1] - num_patches)


def one_query(block: Block, rows: slice) -> bool:
    """Whether `one_query_block` computes what leaves the block: one row, and keys that no norm changes."""
    return rows == slice(0, 1) and block.k_norm is None


def prompt_keys(block: Block, prompts: Tensor) -> Prefix:
    """Keys and values of prompts (1 or B, P, D) that enter the block."""
    inner = block.num_heads * block.head_dim
    bias = None if block.qkv.bias is None else block.qkv.bias[inner:]
    k, v = heads(block, linear(normed(block, prompts), block.qkv.weight[inner:], bias), 2)
    return _norm(block.k_norm, k), v


def run_block(block: Block, x: Tensor, prefix: Prefix | None = None, joining: Tensor | None = None,
              rows: slice | None = None) -> Tensor:
    """One encoder block over x (B, T, D) → its `rows` (None: all), and behind them those of `joining`.

    Args:
        prefix: keys and values of prompts that are only read.
        joining: prompts (1 or B, P, D) that are read and become rows.
    """
    if rows is not None and rows.indices(x.shape[1]) == (0, x.shape[1], 1):
        rows = None
    h = attention(block, normed(block, x), prefix, None if joining is None else normed(block, joining), rows)
    x = x if rows is None else x[:, rows]
    return add_branches(block, x if joining is None else _append(x, joining, dim=1), h)


def attention(block: Block, x: Tensor, prefix: Prefix | None, joining: Tensor | None, rows: slice | None) -> Tensor:
    """Attention of [x[:, rows], joining] over [prefix or joining, x] → (B, rows + P, D), projected.

    x and `joining` are what the block's projections read: normed, in a pre-norm block.
    """
    inner, weight, bias = block.num_heads * block.head_dim, block.qkv.weight, block.qkv.bias
    if rows is None:
        q, k, v = heads(block, linear(x, weight, bias), 3)  # (B, heads, T, d)
    else:
        split = (None, None) if bias is None else (bias[:inner], bias[inner:])
        q, = heads(block, linear(x[:, rows], weight[:inner], split[0]), 1)
        k, v = heads(block, linear(x, weight[inner:], split[1]), 2)
    if joining is not None:
        prompt_q, prompt_k, prompt_v = heads(block, linear(joining, weight, bias), 3)
        q, prefix = _append(q, prompt_q, dim=2), (_norm(block.k_norm, prompt_k), prompt_v)
    prefix_k, prefix_v = (None, None) if prefix is None else prefix
    out = prefix_attention(_norm(block.q_norm, q), _norm(block.k_norm, k), v, prefix_k, prefix_v, scale=block.scale)
    return block.proj(_norm(block.attn_norm, out.transpose(1, 2).flatten(2)))


def one_query_block(block: Block, x: Tensor, prompts: Tensor | None) -> Tensor:
    """The block's first row (B, 1, D), reading x (B, T, D) and `prompts` (1 or B, P, D).

    q kᵀ = (q W_k) xᵀ and a v = (a x) W_vᵀ for each head, so no token needs a key or a value; b_k cancels in the
    softmax.
    """
    inner, (b, _, d) = block.num_heads * block.head_dim, x.shape
    rows, prompts = normed(block, x), None if prompts is None else normed(block, prompts)
    w_q, w_k, w_v = block.qkv.weight.split(inner)
    b_q, _, b_v = (None, None, None) if block.qkv.bias is None else block.qkv.bias.split(inner)
    q, = heads(block, linear(rows[:, :1], w_q, b_q), 1)
    q = (_norm(block.q_norm, q) * block.scale).squeeze(2).transpose(0, 1)  # (heads, B, d)
    q = (q @ w_k.view(block.num_heads, -1, d)).transpose(0, 1)  # (B, heads, D)
    scores = q @ rows.transpose(1, 2)  # (B, heads, T)
    if prompts is not None:
        scores = torch.cat([scores, q @ prompts.transpose(1, 2)], dim=2)
    weights = scores.softmax(dim=2)
    read = weights[:, :, :x.shape[1]] @ rows  # (B, heads, D)
    if prompts is not None:
        read = read + weights[:, :, x.shape[1]:] @ prompts
    out = read.transpose(0, 1) @ w_v.view(block.num_heads, -1, d).transpose(1, 2)  # (heads, B, d)
    out = out.transpose(0, 1).reshape(b, 1, inner)
    out = out if b_v is None else out + b_v
    return add_branches(block, x[:, :1], block.proj(_norm(block.attn_norm, out)))


def add_branches(block: Block, x: Tensor, h: Tensor) -> Tensor:
    """The block's output from its input rows x and their projected attention h, both (B, R, D)."""
    if block.post_norm:
        x = x + block.norm1(h)
        return x + block.norm2(reference.mlp(block.mlp, x))
    x = x + (h if block.ls1 is None else h * block.ls1)
    h = reference.mlp(block.mlp, block.norm2(x))
    return x + (h if block.ls2 is None else h * block.ls2)


def normed(block: Block, x: Tensor) -> Tensor:
    """What the block's first Linear reads of its input rows."""
    return x if block.post_norm else block.norm1(x)


def heads(block: Block, x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """(B, T, parts · heads · d) → `parts` tensors (B, heads, T, d)."""
    return x.unflatten(-1, (parts, block.num_heads, block.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


def _norm(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _append(x: Tensor, rows: Tensor, dim: int) -> Tensor:
    """x with `rows` (1 or B, ...) of every image behind it."""
    return torch.cat([x, rows.expand(x.shape[0], *rows.shape[1:])], dim=dim)
