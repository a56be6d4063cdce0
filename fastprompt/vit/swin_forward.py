"""The optimised forward of a prompted Swin transformer: the same numbers as `swin_reference.py` without wasted work.

* Every window attends to the same prompts, so their keys and values are computed once per image, or once for all
  images if prompts are static, and never copied into windows.
* Prompts that the next block replaces have no query, output or MLP and are not merged.
* Prompts that stay in the sequence are queries once per image: the mean over windows is taken before the projection.
* Patches stay in the order of the block's windows, shifted or not. One permutation between blocks leads to the next
  order, including through patch merging. If windows need padding, patches stay in the order of the image.

All of these are exact in real arithmetic, for outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Sequence as Groups
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fastprompt.vit import recomputed, swin_reference
from fastprompt.vit.backbone import Backbone
from fastprompt.vit.prompts import Embedding, Group, Prefix, Prompts
from fastprompt.vit.reference import Sequence, mlp
from fastprompt.vit.swin import Layout, SwinBlock, layouts
from fastprompt.vit.weights import Folded


def embed(vit: Backbone, raw: Tensor, images: Tensor, parts: Folded | None) -> Sequence:
    """Embed normalised `images` (B, 3, H, W) as patches; the `raw` pixels are unused, as nothing is folded."""
    return swin_reference.embed(vit, images.to(vit.dtype))


def folded(vit: Backbone) -> Folded | None:
    """Return None: a Swin pads rows with zeros after its norms, so the norms must stay in place."""
    return None


def static_prefixes(vit: Backbone, generator: Prompts, readout: str, parts: Folded | None) -> dict[int, Prefix]:
    """Return an empty mapping: nothing is cached between batches."""
    return {}


def features(
    vit: Backbone,
    embedded: Embedding,
    groups: Groups[Group],
    parts: Folded | None,
    recompute: bool = False,
    bits: int | None = None,
) -> list[Tensor]:
    """Compute the features that the head reads, (B, D) for each group.

    The arguments are those of `forward.features`. The groups run one by one.
    """
    sizes = [len(embedded.tokens) if group.size is None else group.size for group in groups]
    tokens_of = [embedded.tokens] if len(groups) == 1 else embedded.tokens.split(sizes)
    return [
        group_features(vit, Sequence(tokens, embedded.num_prefix, grid=embedded.grid), group, recompute, bits)
        for tokens, group in zip(tokens_of, groups, strict=True)
    ]


def group_features(
    vit: Backbone, embedded: Sequence, group: Group, recompute: bool = False, bits: int | None = None
) -> Tensor:
    """Compute (B, D), the head's input for one group; without prompts this runs the plain graph."""
    generator, context, draws, readout = group.generator, group.context, group.draws, group.readout
    if generator is None:
        return swin_reference.read_out(vit, swin_reference.encode(vit, embedded.tokens, embedded=embedded), readout)
    x, prompts, last = embedded.patches, None, len(vit.blocks) - 1
    orders = layouts(vit.blocks, vit.merges, embedded.grid)
    for i, (module, merge, layout) in enumerate(zip(vit.blocks, vit.merges, orders, strict=True)):
        block = cast(SwinBlock, module)
        x = reorder(x, layout)
        if merge is not None:
            x = merge(x.unflatten(1, (-1, 4)).flatten(2))
            prompts = None if prompts is None else merge(prompts.repeat(1, 1, 4))
        if i in generator.layers:
            prompts = generator.prompts(i, context, None, draws).to(x.dtype)
        read = "prompts" in readout if i == last else i + 1 not in generator.layers
        if recompute and torch.is_grad_enabled():
            x, prompts = checkpoint(
                run_block, block, layout, x, prompts, read, bits, use_reentrant=False, preserve_rng_state=False
            )
        else:
            x, prompts = run_block(block, layout, x, prompts, read, bits)
    if vit.norm is not None:
        x, prompts = vit.norm(x), None if prompts is None else vit.norm(prompts)
    if readout == "patches" or prompts is None:
        return x.mean(dim=1)
    if readout == "prompts":
        return prompts.mean(dim=1)
    return (x.sum(dim=1) + prompts.sum(dim=1)) / (x.shape[1] + prompts.shape[1])


def run_block(
    block: SwinBlock, layout: Layout, x: Tensor, prompts: Tensor | None, read: bool, bits: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Run patches x (B, T, C) and prompts (1 or B, P, C) through one block; return prompts only if they are `read`."""
    if block.post_norm:
        h, p = attention(block, layout, x, prompts, read)
        x = x + block.norm1(h)
        x = x + block.norm2(normed_mlp(block, x, bits))
        if p is None or prompts is None:
            return x, None
        prompts = prompts + block.norm1(p)
        return x, prompts + block.norm2(normed_mlp(block, prompts, bits))
    h, p = attention(block, layout, block.norm1(x), None if prompts is None else block.norm1(prompts), read)
    x = x + h
    x = x + normed_mlp(block, x, bits)
    if p is None or prompts is None:
        return x, None
    prompts = prompts + p
    return x, prompts + normed_mlp(block, prompts, bits)


def normed_mlp(block: SwinBlock, x: Tensor, bits: int | None) -> Tensor:
    """Compute mlp(norm2(x)), or mlp(x) in a post-norm block, keeping what `Keep.bits` says."""
    norm = None if block.post_norm else block.norm2
    if bits == 0:
        return recomputed.mlp(norm, block.mlp, x)
    return mlp(block.mlp, x if norm is None else norm(x), bits)


def attention(
    block: SwinBlock, layout: Layout, x: Tensor, prompts: Tensor | None, read: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute window attention of patches x (B, T, C), and of prompts if `read`, with heads joined and projected."""
    heads, inner = block.num_heads, block.num_heads * block.head_dim
    weight, bias = block.qkv.weight, block.qkv.bias
    qkv = block.qkv(x)  # (B, T, 3 · inner)
    if layout.windows is not None:
        row = x.new_zeros(3 * inner) if bias is None else bias  # the projection of a row of zeros
        qkv = torch.cat([qkv, row.expand(x.shape[0], 1, -1)], dim=1).index_select(1, layout.windows)
    qkv = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).contiguous()  # (3, B, heads, R, d)
    read = read and prompts is not None
    if prompts is None:
        prompts = x.new_zeros(1, 0, x.shape[2])
    start = 0 if read else inner
    rows = F.linear(prompts, weight[start:], None if bias is None else bias[start:])
    parts = rows.unflatten(-1, (-1, heads, block.head_dim)).permute(2, 0, 3, 1, 4)  # (3 or 2, 1 or B, heads, P, d)
    scale = block.head_dim**-0.5
    if block.logit_scale is not None:
        scale, qkv, parts = 1.0, cosine(qkv, block.logit_scale), cosine(parts, block.logit_scale)
    windows_bias = block.attention_bias(layout.grid).transpose(0, 1)  # (heads, windows or 1, N, N)
    h: Tensor = WindowAttention.apply(qkv, parts[-2], parts[-1], windows_bias, scale)
    h = h.transpose(1, 2).flatten(2)
    if layout.places is not None:
        h = h.index_select(1, layout.places)
    h = block.proj(h)
    if not read:
        return h, None
    p = prompt_rows(parts[0] * scale, parts[1], parts[2], qkv[1], qkv[2], windows_bias.shape[-1])
    return h, block.proj(p.transpose(1, 2).flatten(2))


def cosine(parts: Tensor, logit_scale: Tensor) -> Tensor:
    """Map [q,] k, v to [q / |q| · scale,] k / |k|, v, stacked on the first axis: the operands of cosine attention."""
    q, k, v = parts[:-2], parts[-2], parts[-1]
    return torch.cat([F.normalize(q, dim=-1) * logit_scale, torch.stack([F.normalize(k, dim=-1), v])])


def prompt_rows(q: Tensor, prompt_k: Tensor, prompt_v: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """Compute the prompts' attention output averaged over windows, (B, heads, P, d).

    In window w, a prompt attends to all prompts and to the window's N patches. Let Z be the sum of exponentials over
    the prompts, and Z_w over the patches of w. The result is mean_w [(Z softmax(s) V + Z_w softmax(s_w) V_w) / (Z +
    Z_w)], where s is the same for every window.

    Args:
        q, prompt_k, prompt_v: (1 or B, heads, P, d), q scaled. k, v: (B, heads, windows · N, d). size: N.
    """
    inner = q @ prompt_k.transpose(-1, -2)  # (1 or B, heads, P, P)
    outer = (q @ k.transpose(-1, -2)).unflatten(-1, (-1, size))  # (B, heads, P, windows, N)
    z, z_windows = inner.logsumexp(dim=-1)[..., None], outer.logsumexp(dim=-1)  # (B, heads, P, windows)
    share = torch.sigmoid(z - z_windows)
    outer = outer.softmax(dim=-1) * ((1 - share) / share.shape[-1])[..., None]
    return (inner.softmax(dim=-1) * share.mean(dim=-1, keepdim=True)) @ prompt_v + outer.flatten(-2) @ v


class WindowAttention(torch.autograd.Function):
    """softmax(scale · q [prompt_k, k]ᵀ + [0, bias]) [prompt_v, v] inside windows, (B, heads, windows · N, d).

    qkv: (3, B, heads, windows · N, d). prompt_k, prompt_v: (1 or B, heads, P, d), the same for all windows. bias:
    (heads, windows or 1, N, N), a constant. One product with the prompts serves all windows of an image.

    Backward with weights A, gradient G and output O: dS = scale · A ∘ (G [prompt_v, v]ᵀ − rowsum(G ∘ O)).
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor, bias: Tensor, scale: float) -> Tensor:
        _, b, heads, rows, d = qkv.shape
        n, p = bias.shape[-1], prompt_k.shape[2]
        windows = b * heads * (rows // n)  # of all images and heads
        q, k, v = qkv.view(3, windows, n, d).unbind(0)
        to_prompts = qkv[0] @ prompt_k.transpose(-1, -2)  # (B, heads, R, P)
        to_window = torch.bmm(q, k.transpose(1, 2)).view(b, heads, rows // n, n, n)
        if torch.compiler.is_compiling():
            window_scores = torch.add(bias, to_window, alpha=scale).view(b, heads, rows, n)
            scores = torch.cat([to_prompts * scale, window_scores], dim=-1)
        else:
            scores = qkv.new_empty(b, heads, rows, p + n)
            torch.mul(to_prompts, scale, out=scores[..., :p])
            torch.add(bias, to_window, alpha=scale, out=scores.view(b, heads, rows // n, n, p + n)[..., p:])
        weights = scores.softmax(dim=-1)
        on_prompts, on_window = weights[..., :p], weights.view(windows, n, p + n)[..., p:]
        if any(ctx.needs_input_grad):
            on_prompts, on_window = on_prompts.contiguous(), on_window.contiguous()
        out = on_prompts @ prompt_v
        out.view_as(q).baddbmm_(on_window, v)
        ctx.save_for_backward(qkv, prompt_k, prompt_v, on_prompts, on_window, out)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, prompt_k, prompt_v, on_prompts, on_window, out = ctx.saved_tensors
        q, k, v = qkv.view(3, *on_window.shape[:2], qkv.shape[-1]).unbind(0)
        grad = grad.contiguous()
        scaled = grad * ctx.scale
        inner = (scaled * out).sum(dim=-1, keepdim=True)  # (B, heads, R, 1)
        to_prompts = (scaled @ prompt_v.transpose(-1, -2)).sub_(inner).mul_(on_prompts)
        d_qkv = d_prompt_k = d_prompt_v = None
        if ctx.needs_input_grad[0]:
            to_window = torch.bmm(scaled.view_as(q), v.transpose(1, 2))
            to_window.sub_(inner.view(*on_window.shape[:2], 1)).mul_(on_window)
            d_qkv = torch.empty_like(qkv)
            dq, dk, dv = d_qkv.view(3, *q.shape).unbind(0)
            torch.matmul(to_prompts, prompt_k, out=d_qkv[0])
            dq.baddbmm_(to_window, k)
            torch.bmm(to_window.transpose(1, 2), q, out=dk)
            torch.bmm(on_window.transpose(1, 2), grad.view_as(q), out=dv)
        if ctx.needs_input_grad[1]:
            d_prompt_k = (to_prompts.transpose(-1, -2) @ qkv[0]).sum_to_size(prompt_k.shape)
        if ctx.needs_input_grad[2]:
            d_prompt_v = (on_prompts.transpose(-1, -2) @ grad).sum_to_size(prompt_v.shape)
        return d_qkv, d_prompt_k, d_prompt_v, None, None


class Permute(torch.autograd.Function):
    """Permute the rows of x (B, T, C); the backward applies the inverse permutation to the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(rows, back)
        return select_rows(x, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, back = ctx.saved_tensors
        return Permute.apply(grad, back, rows), None, None


def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return x[:, rows] for x (B, T, C) by copying whole rows."""
    b, t, c = x.shape
    flat = (torch.arange(b, device=x.device)[:, None] * t + rows).flatten()
    return x.reshape(b * t, c).index_select(0, flat).view(b, len(rows), c)


def reorder(x: Tensor, layout: Layout) -> Tensor:
    """Permute x (B, T, C) from the previous block's order to this block's; to (B, 4T', C) if a merging precedes it."""
    if layout.rows is None:
        return x
    if layout.back is None:
        return torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], dim=1).index_select(1, layout.rows)
    return Permute.apply(x, layout.rows, layout.back)
