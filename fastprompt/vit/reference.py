"""The papers' forward of a prompted ViT, written plainly: the reference and baseline of every faster one.

Prompt tokens are rows of the sequence. A generator defines which blocks get new prompts (`layers`), whether their rows
follow or precede the patches (`prompts_last`), and their values (`plain_prompts`). Here the rows are concatenated, run
through every block, and dropped when the next block replaces them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.kernels.prefix_attention.reference import attend
from fastprompt.vit import compressed
from fastprompt.vit.backbone import Backbone
from fastprompt.vit.prompts import NO_DRAWS, Draws, Prompts
from fastprompt.vit.weights import ACTIVATIONS, Block, Dense, MapPool, Mlp, Norm, Turns

NO_ROWS = slice(0, 0)


@dataclasses.dataclass
class Sequence:
    """Tokens (B, T, D), divided into prefix (class token, registers), prompts and patches.

    `grid`: (rows, columns) of the patches. `answers`: what tokens that only query became, (B, P, D) for each block.
    """

    tokens: Tensor
    num_prefix: int
    num_prompts: int = 0
    prompts_last: bool = False
    grid: tuple[int, int] = (0, 0)
    answers: tuple[Tensor, ...] = ()

    @property
    def prefix(self) -> Tensor:
        return self.tokens[:, : self.num_prefix]

    @property
    def prompts(self) -> Tensor:
        if self.prompts_last:
            return self.tokens[:, self.tokens.shape[1] - self.num_prompts :]
        return self.tokens[:, self.num_prefix : self.num_prefix + self.num_prompts]

    @property
    def patches(self) -> Tensor:
        if self.prompts_last:
            return self.tokens[:, self.num_prefix : self.tokens.shape[1] - self.num_prompts]
        return self.tokens[:, self.num_prefix + self.num_prompts :]

    @property
    def prompt_rows(self) -> slice:
        """The rows of the prompts."""
        start = self.tokens.shape[1] - self.num_prompts if self.prompts_last else self.num_prefix
        return slice(start, start + self.num_prompts)

    @property
    def first_patch(self) -> int:
        """The row of the first patch."""
        return self.num_prefix if self.prompts_last else self.num_prefix + self.num_prompts

    @property
    def apart(self) -> None:
        """None: all rows are already in `tokens`."""

    def without_prompts(self) -> Sequence:
        """Return prefix and patches alone."""
        if self.num_prompts == 0:
            return self
        return dataclasses.replace(self, tokens=torch.cat([self.prefix, self.patches], dim=1), num_prompts=0)

    def with_prompts(self, prompts: Tensor, prompts_last: bool) -> Sequence:
        """Return the same prefix and patches with `prompts` (1 or B, P, D) in place of the previous prompt rows."""
        rows = prompts.to(self.tokens.dtype).expand(self.tokens.shape[0], -1, -1)
        parts = [self.prefix, self.patches, rows] if prompts_last else [self.prefix, rows, self.patches]
        tokens = torch.cat(parts, dim=1)
        return dataclasses.replace(self, tokens=tokens, num_prompts=prompts.shape[1], prompts_last=prompts_last)


def embed(vit: Backbone, images: Tensor, patches: Dense | None = None) -> Sequence:
    """Embed images (B, 3, H, W) as [class token, registers, patches] with position embedding.

    `patches`: the patch embedding for images that are not normalised; None: the backbone's own.
    """
    x, grid = embed_patches(vit, images, patches)
    prefix = [t.expand(x.shape[0], -1, -1) for t in (vit.cls_token, vit.registers) if t is not None]
    pos = position_embedding(vit, grid)
    if pos is not None and not vit.spec.pos_on_prefix:
        x = x + pos
    x = torch.cat([*prefix, x], dim=1)
    if pos is not None and vit.spec.pos_on_prefix:
        x = x + pos
    return Sequence(x, vit.num_prefix, grid=grid)


def embed_patches(vit: Backbone, images: Tensor, patches: Dense | None = None) -> tuple[Tensor, tuple[int, int]]:
    """Embed images (B, 3, H, W) as patches (B, N, D) without position embedding; return them and (rows, columns).

    The arguments are those of `embed`.
    """
    weight, bias = (vit.patch_weight, vit.patch_bias) if patches is None else (patches.weight, patches.bias)
    if vit.spec.dynamic_pad:
        pad = [-images.shape[i] % vit.patch_size for i in (2, 3)]
        images = F.pad(images, (0, pad[1], 0, pad[0]))
    images = images if vit.stem is None else vit.stem(images)
    x = F.conv2d(images, weight, bias, stride=weight.shape[2:])  # (B, D, gh, gw)
    grid = (x.shape[2], x.shape[3])
    x = x.flatten(2).transpose(1, 2)  # (B, N, D)
    return (x if vit.patch_norm is None else vit.patch_norm(x)), grid


def position_embedding(vit: Backbone, grid: tuple[int, int]) -> Tensor | None:
    """Return the position embedding for a grid of patches: the backbone's own, or resampled by the library's rule.

    Resampling is bicubic. torchvision's models take only one size, so theirs follows the rule of transformers.
    """
    if vit.pos_embed is None or grid == vit.spec.grid:
        return vit.pos_embed
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(
        vit.pos_embed,
        new_size=list(grid),
        old_size=list(vit.spec.grid),
        num_prefix_tokens=vit.num_prefix if vit.spec.pos_on_prefix else 0,
        antialias=vit.spec.antialias,
    )


def rotated(x: Tensor, turns: Turns) -> Tensor:
    """Rotate the patches of x (B, heads, T, d), its queries or keys."""
    sin, cos, first = turns
    before, patches, behind = x.tensor_split((first, first + sin.shape[-2]), dim=2)
    a, b = patches.chunk(2, dim=-1)
    return torch.cat([before, torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1), behind], dim=2)


def between_prompts(bias: Tensor, prompts: slice) -> Tensor:
    """Insert zeros into a bias (1, heads, T, T) for the queries and keys of prompts, which will be these rows."""
    for dim in (2, 3):
        before, behind = bias.tensor_split((prompts.start,), dim=dim)
        shape = list(bias.shape)
        shape[dim] = prompts.stop - prompts.start
        bias = torch.cat([before, bias.new_zeros(shape), behind], dim=dim)
    return bias


def attention(block: Block, x: Tensor, turns: Turns | None = None, prompts: slice = NO_ROWS) -> Tensor:
    """Compute softmax(q kᵀ / √d) v over all tokens of x (B, T, D), with heads joined and projected."""
    q, k, v = split(block, block.qkv(x))
    bias = None if block.bias is None else between_prompts(block.bias(), prompts)
    return joined(block, scored(block.q_norm, q, turns), scored(block.k_norm, k, turns), v, bias)


def heads(block: Block, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Compute x Wᵀ + b with some rows of the projections, and `split` it."""
    return split(block, F.linear(x, weight, bias))


def split(block: Block, projected: Tensor) -> tuple[Tensor, ...]:
    """Split projections (B, T, parts · heads · d) into `parts` tensors (B, heads, T, d)."""
    return projected.unflatten(-1, (-1, block.num_heads, block.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


def scored(norm: Norm | None, x: Tensor, turns: Turns | None = None) -> Tensor:
    """Return what scores are products of, from projected queries or keys x (B, heads, T, d): normed, then rotated."""
    x = x if norm is None else norm(x)
    return x if turns is None else rotated(x, turns)


def joined(block: Block, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute softmax(q kᵀ / √d + bias) v from `scored` q and k, with heads joined and projected."""
    x = attend(q, k, v, bias).transpose(1, 2).flatten(2)
    if block.attn_norm is not None:
        x = block.attn_norm(x)
    return block.proj(x)


def mlp(module: Mlp, x: Tensor, bits: int | None = None) -> Tensor:
    """Compute fc2(norm(act(fc1 x))), with the MLP's gate if it has one.

    `bits`: of what the activation keeps for the backward (`compressed.activation`), where there is no gate; None: all.
    """
    return module.fc2(hidden(module, x, bits))


def hidden(module: Mlp, x: Tensor, bits: int | None = None) -> Tensor:
    """Compute fc2's input; the arguments are those of `mlp`."""
    x, act = module.fc1(x), ACTIVATIONS[module.act]
    if module.glu == "none":
        x = act(x) if bits is None else compressed.activation(x, module.act, bits)
    else:
        first, second = x.chunk(2, dim=-1)
        x = act(first) * second if module.glu == "first" else first * act(second)
    return x if module.norm is None else module.norm(x)


def run_block(block: Block, x: Tensor, turns: Turns | None = None, prompts: slice = NO_ROWS) -> Tensor:
    """Run one encoder block over x (B, T, D).

    `turns`: the rotation of its queries and keys, if it has one. `prompts`: the rows of prompts, with start and stop.
    """
    return add_branches(block, x, attention(block, _normed(block, x), turns, prompts))


def run_asked_block(block: Block, x: Tensor, queries: Tensor, turns: Turns | None = None) -> tuple[Tensor, Tensor]:
    """Run one block over x (B, T, D), and over `queries` (B, P, D), which attend to x alone and are not seen by it.

    Queries have no place in the image: they are not rotated, and no relative position bias is added to their scores.
    """
    inner, weight, bias = block.num_heads * block.head_dim, block.qkv.weight, block.qkv.bias
    q, k, v = split(block, block.qkv(_normed(block, x)))
    (asking,) = heads(block, _normed(block, queries), weight[:inner], None if bias is None else bias[:inner])
    q, k, asking = scored(block.q_norm, q, turns), scored(block.k_norm, k, turns), scored(block.q_norm, asking)
    own = joined(block, q, k, v, None if block.bias is None else block.bias())
    return add_branches(block, x, own), add_branches(block, queries, joined(block, asking, k, v))


def run_cross_block(block: Block, x: Tensor, prompts: Tensor, turns: Turns | None = None) -> Tensor:
    """Run one block over x (B, T, D), whose tokens attend to `prompts` (B, P, D) after their self-attention.

    Between tokens and prompts there are no positions: neither is rotated, and no relative position bias is added.
    """
    inner, weight, bias = block.num_heads * block.head_dim, block.qkv.weight, block.qkv.bias
    x = add_attention(block, x, attention(block, _normed(block, x), turns))
    (q,) = heads(block, _normed(block, x), weight[:inner], None if bias is None else bias[:inner])
    k, v = heads(block, _normed(block, prompts), weight[inner:], None if bias is None else bias[inner:])
    h = joined(block, scored(block.q_norm, q), scored(block.k_norm, k), v)
    return add_mlp(block, add_attention(block, x, h))


def _normed(block: Block, x: Tensor) -> Tensor:
    return x if block.post_norm else block.norm1(x)


def add_branches(block: Block, x: Tensor, h: Tensor) -> Tensor:
    """Compute the block's output from its input rows x and their projected attention h, both (B, R, D)."""
    return add_mlp(block, add_attention(block, x, h))


def add_attention(block: Block, x: Tensor, h: Tensor) -> Tensor:
    """Add projected attention h to its rows x, both (B, R, D)."""
    if block.post_norm:
        return x + block.norm1(h)
    return x + (h if block.ls1 is None else h * block.ls1)


def add_mlp(block: Block, x: Tensor) -> Tensor:
    """Add the block's MLP to x (B, R, D)."""
    if block.post_norm:
        return x + block.norm2(mlp(block.mlp, x))
    h = mlp(block.mlp, block.norm2(x))
    return x + (h if block.ls2 is None else h * block.ls2)


Block.papers = run_block  # `encode` calls blocks as modules, so that forward hooks on them fire


def map_pool(pool: MapPool, x: Tensor) -> Tensor:
    """Pool x (B, N, D) to (B, D) by attention with the learned query."""
    b = x.shape[0]
    q = pool.latent if pool.q is None else pool.q(pool.latent)
    q = q.view(1, 1, pool.num_heads, -1).transpose(1, 2).expand(b, -1, -1, -1)  # (B, heads, 1, d)
    k, v = pool.kv(x).unflatten(-1, (2, pool.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if pool.q_norm is not None:
        q = pool.q_norm(q)
    if pool.k_norm is not None:
        k = pool.k_norm(k)
    x = pool.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    x = x + mlp(pool.mlp, x if pool.norm is None else pool.norm(x))
    return x[:, 0]


def encode(
    vit: Backbone,
    images: Tensor,
    generator: Prompts | None = None,
    context: Any = None,
    draws: Draws = NO_DRAWS,
    embedded: Sequence | None = None,
    watch: Callable[[int, Sequence], None] | None = None,
) -> Sequence:
    """Run normalised images (B, 3, H, W) through the blocks and the final norm; prompts are among the tokens.

    Args:
        generator: the prompts and the blocks they enter; None: no prompts.
        context: the result of `generator.context` for this batch.
        draws: the random tensors of a training step (`generator.draw`).
        embedded: the result of `embed`, if the caller already has it.
        watch: called before block i with i and what enters the block.
    """
    sequence = embed(vit, images) if embedded is None else embedded
    if generator is not None and generator.before_pre_norm:
        first = generator.plain_prompts(0, context, sequence.patches, draws)
        sequence = sequence.with_prompts(first, generator.prompts_last)
    if vit.norm_pre is not None:
        sequence = dataclasses.replace(sequence, tokens=vit.norm_pre(sequence.tokens))
    for i, (block, turns) in enumerate(zip(vit.blocks, vit.turns(sequence.grid, sequence.tokens.dtype), strict=True)):
        if generator is not None and i in generator.layers and not (i == 0 and generator.before_pre_norm):
            prompts = generator.plain_prompts(i, context, sequence.patches, draws)
            x = sequence.tokens
            if generator.role == "queries":
                x, asked = run_asked_block(block, x, prompts.to(x.dtype).expand(len(x), -1, -1), turns)
                sequence = dataclasses.replace(sequence, tokens=x, answers=(*sequence.answers, asked))
                continue
            if generator.role == "cross":
                x = run_cross_block(block, x, prompts.to(x.dtype).expand(len(x), -1, -1), turns)
                sequence = dataclasses.replace(sequence, tokens=x)
                continue
            sequence = sequence.with_prompts(prompts, generator.prompts_last)
        turns = None if turns is None else turns._replace(first=sequence.first_patch)
        if watch is not None:
            watch(i, sequence)
        sequence = dataclasses.replace(sequence, tokens=block(sequence.tokens, turns, sequence.prompt_rows))
    if vit.norm is not None:
        sequence = dataclasses.replace(sequence, tokens=vit.norm(sequence.tokens))
    return sequence


READOUTS = ("cls", "patches", "patches+prompts", "prompts", "map", "cls+dist")


def read_out(vit: Backbone, sequence: Sequence, readout: str) -> Tensor:
    """Compute (B, D): the head's input from a sequence after the final norm.

    `readout`: "cls" is the class token; "patches", "prompts", "patches+prompts" are the mean over those tokens; "map"
    is attention pooling of the patches; "cls+dist" is the mean of DeiT's class and distillation token. A norm that
    follows pooling (timm's `fc_norm`, MAE) is applied last.
    """
    if readout == "cls":
        rows = sequence.tokens
    elif readout == "cls+dist":
        rows = sequence.tokens[:, :2]
    elif readout == "prompts":
        rows = sequence.prompts
    elif readout == "patches+prompts":
        rows = torch.cat([sequence.prompts, sequence.patches], dim=1)
    elif vit.spec.pool_prefix:
        rows = torch.cat([sequence.prefix, sequence.patches], dim=1)
    else:
        rows = sequence.patches
    return pool(vit, rows, readout)


def pool(vit: Backbone, rows: Tensor, readout: str) -> Tensor:
    """Pool the rows (B, R, D) that `read_out` selects to (B, D); "cls" reads the first."""
    if readout == "cls":
        x = rows[:, 0]
    elif readout == "map":
        assert vit.map_pool is not None
        x = map_pool(vit.map_pool, rows)
    else:
        x = rows.mean(dim=1)
    return x if vit.fc_norm is None else vit.fc_norm(x)
