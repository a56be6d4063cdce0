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
* Groups of images with different prompts, prompt counts and readouts share every product with the frozen weights.

All of it holds in exact arithmetic, for outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastprompt.kernels.add_norm import add_norm
from fastprompt.kernels.prefix_attention import prefix_attention
from fastprompt.kernels.prefix_attention.reference import unpacked
from fastprompt.vit import reference
from fastprompt.vit.backbone import Backbone
from fastprompt.vit.folding import folded
from fastprompt.vit.linear import linear
from fastprompt.vit.prompts import Group, Prefix, Prompts
from fastprompt.vit.reference import Sequence as TokenSequence
from fastprompt.vit.weights import Block, Norm

Projected = tuple[Tensor, Tensor | None, Tensor | None]
"""Queries, keys and values of tokens as `prefix_attention` takes them, packed or not."""


class Rows(NamedTuple):
    """Token rows of one group of images (B, T, D), or of several, packed (Σ B T, D) with the (B, T) of each.

    What acts on single rows runs over `data`, once for all groups; what does not runs over `parts`. `normed`: what the
    next block's projections read of `data`, where that is known already.
    """

    data: Tensor
    shapes: tuple[tuple[int, int], ...] = ()
    normed: Tensor | None = None

    @classmethod
    def pack(cls, parts: Sequence[Tensor]) -> Rows:
        """The rows of each group's (B, T, D)."""
        if len(parts) == 1:
            return cls(parts[0])
        return cls(torch.cat([part.flatten(0, 1) for part in parts]), tuple((p.shape[0], p.shape[1]) for p in parts))

    def parts(self) -> list[Tensor]:
        """(B, T, D) of each group, without a copy."""
        if not self.shapes:
            return [self.data]
        rows = self.data.split([images * length for images, length in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(rows, self.shapes, strict=True)]


class Reads(NamedTuple):
    """What a block reads for one group of images besides their rows, and which rows leave it.

    Attributes:
        rows: of those that enter; None: all.
        prefix: keys and values of prompts that are only read.
        joining: prompts (1 or B, P, D) that are read and become rows, behind the others.
        one_query: `rows` is the first row alone, and is computed without keys and values.
        prompts: prompts (1 or B, P, D) that this one query reads.
    """

    rows: slice | None = None
    prefix: Prefix | None = None
    joining: Tensor | None = None
    one_query: bool = False
    prompts: Tensor | None = None


def features(vit: Backbone, embedded: TokenSequence, groups: Sequence[Group], recompute: bool = False) -> list[Tensor]:
    """What the head sees, (B, D) of each group.

    Args:
        embedded: class token, registers and patches of `embed`, the groups one after the other.
        groups: Linears and MLPs run over the rows of all, prompts and attention for each of them.
        recompute: keep only what enters a block for the backward and compute the block again there (one group only).
    """
    blocks, x = read_blocks(vit), embedded.tokens
    own, last = x.shape[1], len(blocks) - 1  # the rows that are no prompts come first
    sizes = [x.shape[0] if group.size is None else group.size for group in groups]
    firsts = [
        _first_prompts(vit, group, patches)
        for group, patches in zip(groups, _split(embedded.patches, sizes), strict=True)
    ]
    x = x if vit.norm_pre is None else vit.norm_pre(x)

    def reads(i: int, group: Group, first: Tensor | None, x: Tensor) -> Reads:
        """Block i for one group; prompt rows that stay stand last."""
        generator = group.generator
        layers = () if generator is None else generator.layers
        kept = slice(0, own) if i + 1 in layers else slice(0, None)  # the next block replaces all prompt rows
        if i == last:
            kept = rows_read(vit, group.readout, own)
        rows = None if kept.indices(x.shape[1]) == (0, x.shape[1], 1) else kept
        prompts = None
        if generator is not None and i in layers:
            if group.prefixes is not None and i in group.prefixes:
                return Reads(rows, prefix=group.prefixes[i])
            prompts = first
            if i > 0 or prompts is None:
                patches = x[:, vit.num_prefix : own]
                prompts = generator.prompts(i, group.context, patches, group.draws).to(x.dtype)
            if prompts_stay(generator, i, last, group.readout):
                return Reads(rows, joining=prompts)
        if one_query(blocks[i], kept):
            return Reads(kept, one_query=True, prompts=prompts)
        return Reads(rows, prefix=None if prompts is None else prompt_keys(blocks[i], prompts))

    def step(i: int, x: Rows, following: Block | None = None) -> Rows:
        read = [reads(i, *of_group) for of_group in zip(groups, firsts, x.parts(), strict=True)]
        return run_block(blocks[i], x, read, following)

    rows = Rows(x) if len(groups) == 1 else Rows(x.flatten(0, 1), tuple((size, own) for size in sizes))
    for i in range(len(blocks)):
        if recompute and torch.is_grad_enabled():
            rows = Rows(
                checkpoint(
                    lambda i, data: step(i, Rows(data)).data,
                    i,
                    rows.data,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            )
        else:
            rows = step(i, rows, None if i == last else blocks[i + 1])
    rows = rows if vit.norm is None else rows._replace(data=vit.norm(rows.data))
    return [
        reference.read_out(vit, rows_left(vit, group.readout, x, own), group.readout)
        for group, x in zip(groups, rows.parts(), strict=True)
    ]


def _split(x: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    return [x] if len(sizes) == 1 else x.split(sizes)


def _first_prompts(vit: Backbone, group: Group, patches: Tensor) -> Tensor | None:
    """Block 0's prompts where they pass the backbone's pre-norm; None: they do not."""
    generator = group.generator
    if generator is None or not generator.before_pre_norm:
        return None
    return generator.first_prompts(group.context, patches, group.draws, vit.norm_pre)


def embed(vit: Backbone, raw: Tensor, images: Tensor) -> TokenSequence:
    """`reference.embed` of `images`, from the `raw` uint8 pixels they were made of where that is possible."""
    parts = folded(vit)
    if raw.dtype != torch.uint8 or parts is None or vit.spec.dynamic_pad:
        return reference.embed(vit, images.to(vit.dtype))
    return reference.embed(vit, raw.to(vit.dtype), parts.pixels)


def read_blocks(vit: Backbone) -> Sequence[Block]:
    """The blocks that the forward reads: folded, where the weights do not train."""
    parts = folded(vit)
    return vit.blocks if parts is None else parts.blocks


def static_prefixes(vit: Backbone, generator: Prompts, readout: str) -> dict[int, Prefix]:
    """Block → keys and values of prompts that depend on parameters only, for all blocks that only read theirs."""
    blocks = read_blocks(vit)
    last = len(blocks) - 1
    return {
        i: prompt_keys(blocks[i], generator.prompts(i, None).to(vit.dtype))
        for i in generator.layers
        if not prompts_stay(generator, i, last, readout)
        and not (i == 0 and generator.before_pre_norm)
        and not (i == last and one_query(blocks[i], rows_read(vit, readout, 0)))
    }


def prompts_stay(generator: Prompts, i: int, last: int, readout: str) -> bool:
    """Whether prompts that enter block i are rows of what leaves it."""
    return "prompts" in readout if i == last else i + 1 not in generator.layers


def rows_read(vit: Backbone, readout: str, own: int) -> slice:
    """The rows of the last block's output that `reference.read_out` reads; `own`: class token, registers, patches."""
    if readout == "cls":
        return slice(0, 1)
    if readout == "prompts":
        return slice(own, None)
    if readout == "patches+prompts":
        return slice(vit.num_prefix, None)
    return slice(0 if vit.spec.pool_prefix else vit.num_prefix, own)


def rows_left(vit: Backbone, readout: str, x: Tensor, own: int) -> TokenSequence:
    """The rows that `rows_read` kept, as a sequence."""
    num_patches = own - vit.num_prefix
    if readout in ("cls", "prompts"):
        return TokenSequence(x, 0, x.shape[1], prompts_last=True)
    if readout == "patches+prompts":
        return TokenSequence(x, 0, x.shape[1] - num_patches, prompts_last=True)
    return TokenSequence(x, x.shape[1] - num_patches)


def one_query(block: Block, rows: slice) -> bool:
    """Whether `one_query_block` computes what leaves the block: one row, and keys that no norm changes."""
    return rows == slice(0, 1) and block.k_norm is None


def prompt_keys(block: Block, prompts: Tensor) -> Prefix:
    """Keys and values of prompts (1 or B, P, D) that enter the block."""
    inner = block.num_heads * block.head_dim
    bias = None if block.qkv.bias is None else block.qkv.bias[inner:]
    k, v = heads(block, linear(normed(block, prompts), block.qkv.weight[inner:], bias), 2)
    return _norm(block.k_norm, k), v


def run_block(block: Block, x: Rows, reads: Sequence[Reads], following: Block | None = None) -> Rows:
    """One encoder block over the rows of all groups → the rows that leave it, each group by its `Reads`, and what the
    `following` block's projections read of them.
    """
    h = attention(block, x._replace(data=normed(block, x.data) if x.normed is None else x.normed), reads)
    if any(read.rows is not None or read.joining is not None for read in reads):
        x = Rows.pack([_leaving(part, read) for part, read in zip(x.parts(), reads, strict=True)])
    data, of_data = add_branches(block, x.data, h, following)
    return x._replace(data=data, normed=of_data)


def _leaving(x: Tensor, read: Reads) -> Tensor:
    x = x if read.rows is None else x[:, read.rows]
    return x if read.joining is None else _append(x, read.joining, dim=1)


def attention(block: Block, x: Rows, reads: Sequence[Reads]) -> Tensor:
    """Attention of [x[:, rows], joining] over [prefix or joining, x] of each group, projected: the data of `Rows`.

    x is what the block's projections read: normed, in a pre-norm block.
    """
    inner, weight, bias = block.num_heads * block.head_dim, block.qkv.weight, block.qkv.bias
    b_q, b_kv = (None, None) if bias is None else (bias[:inner], bias[inner:])
    parts = x.parts()
    if all(read.rows is None for read in reads):
        qkv = x._replace(data=block.qkv(x.data))
        projected: list[Projected] = [(packed(block, part, 3), None, None) for part in qkv.parts()]
    else:
        q = Rows.pack([part if r.rows is None else part[:, r.rows] for part, r in zip(parts, reads, strict=True)])
        queries = q._replace(data=linear(q.data, weight[:inner], b_q)).parts()
        projected = [(packed(block, part, 1).squeeze(2).transpose(1, 2), None, None) for part in queries]
        keyed = [i for i, read in enumerate(reads) if not read.one_query]
        if keyed:
            kv = Rows.pack([parts[i] for i in keyed])
            for i, part in zip(keyed, kv._replace(data=linear(kv.data, weight[inner:], b_kv)).parts(), strict=True):
                projected[i] = (projected[i][0], packed(block, part, 2), None)
    outs = []
    for part, own, read in zip(parts, projected, reads, strict=True):
        if read.one_query:
            outs.append(one_query_attention(block, own[0], part, read.prompts))
            continue
        prefix = read.prefix
        if read.joining is not None or block.q_norm is not None or block.k_norm is not None:
            query, k, v = unpacked(*own)
            if read.joining is not None:
                prompt_q, prompt_k, prompt_v = heads(block, linear(normed(block, read.joining), weight, bias), 3)
                query, prefix = _append(query, prompt_q, dim=2), (_norm(block.k_norm, prompt_k), prompt_v)
            own = _norm(block.q_norm, query), _norm(block.k_norm, k), v
        prefix_k, prefix_v = (None, None) if prefix is None else prefix
        out = prefix_attention(*own, prefix_k, prefix_v, scale=block.scale)
        outs.append(out.transpose(1, 2).flatten(2))
    return block.proj(_norm(block.attn_norm, Rows.pack(outs).data))


def one_query_attention(block: Block, q: Tensor, rows: Tensor, prompts: Tensor | None) -> Tensor:
    """Attention (B, 1, heads · d) of one query q (B, heads, 1, d) over normed `rows` (B, T, D) and prompts.

    q kᵀ = (q W_k) xᵀ and a v = (a x) W_vᵀ for each head, so no token needs a key or a value; b_k cancels in the
    softmax.
    """
    inner, (b, t, d) = block.num_heads * block.head_dim, rows.shape
    prompts = None if prompts is None else normed(block, prompts)
    _, w_k, w_v = block.qkv.weight.split(inner)
    q = (_norm(block.q_norm, q) * block.scale).squeeze(2).transpose(0, 1)  # (heads, B, d)
    q = (q @ w_k.view(block.num_heads, -1, d)).transpose(0, 1)  # (B, heads, D)
    scores = q @ rows.transpose(1, 2)  # (B, heads, T)
    if prompts is not None:
        scores = torch.cat([scores, q @ prompts.transpose(1, 2)], dim=2)
    weights = scores.softmax(dim=2)
    read = weights[:, :, :t] @ rows  # (B, heads, D)
    if prompts is not None:
        read = read + weights[:, :, t:] @ prompts
    out = read.transpose(0, 1) @ w_v.view(block.num_heads, -1, d).transpose(1, 2)  # (heads, B, d)
    out = out.transpose(0, 1).reshape(b, 1, inner)
    return out if block.qkv.bias is None else out + block.qkv.bias[2 * inner :]


def add_branches(block: Block, x: Tensor, h: Tensor, following: Block | None = None) -> tuple[Tensor, Tensor | None]:
    """The block's output from its input rows x and their projected attention h, both (B, R, D), and what the
    `following` block's projections read of it.
    """
    if block.post_norm:
        x = x + block.norm1(h)
        return x + block.norm2(reference.mlp(block.mlp, x)), None
    x, of_x = added(x, h if block.ls1 is None else h * block.ls1, block.norm2)
    h = reference.mlp(block.mlp, of_x)
    h = h if block.ls2 is None else h * block.ls2
    return (x + h, None) if following is None or following.post_norm else added(x, h, following.norm1)


def added(x: Tensor, h: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """x + h and its norm."""
    plain = norm.kind == "layernorm" and norm.weight is None and norm.bias is None and not norm.upcast
    if plain and x.dtype == h.dtype and x.shape[-2] > 1:  # one row of an image is not worth a kernel
        return add_norm(x, h, norm.eps)
    x = x + h
    return x, norm(x)


def normed(block: Block, x: Tensor) -> Tensor:
    """What the block's first Linear reads of its input rows."""
    return x if block.post_norm else block.norm1(x)


def packed(block: Block, x: Tensor, parts: int) -> Tensor:
    """(B, T, parts · heads · d) → (B, T, parts, heads, d)."""
    return x.unflatten(-1, (parts, block.num_heads, block.head_dim))


def heads(block: Block, x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """(B, T, parts · heads · d) → `parts` tensors (B, heads, T, d)."""
    return packed(block, x, parts).permute(2, 0, 3, 1, 4).unbind(0)


def _norm(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _append(x: Tensor, rows: Tensor, dim: int) -> Tensor:
    """x with `rows` (1 or B, ...) of every image behind it."""
    return torch.cat([x, rows.expand(x.shape[0], *rows.shape[1:])], dim=dim)
