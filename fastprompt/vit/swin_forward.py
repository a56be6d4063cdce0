"""The forward of a prompted Swin transformer without repeated and dead work; the same numbers as `swin_reference.py`.

* Every window attends to the same prompts, so their keys and values are computed once per image, or once for all
  images where prompts are static, and never copied into windows.
* Prompts that the next block replaces have no query, no output, no MLP and are not merged.
* Prompts that flow on are queries once per image: the mean over windows is taken before the projection.
* Patches stay in the order of the block's windows, shifted or not; between blocks one permutation leads to the next
  order, through patch merging too. With windows that need padding they stay in the order of the image.

All hold in exact arithmetic, for outputs and gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprompt.vit import swin_reference
from fastprompt.vit.reference import mlp
from fastprompt.vit.swin import FrozenSwin, Pair, SwinBlock, padded, partition
from fastprompt.vit.swin_reference import FeatureMap

if TYPE_CHECKING:
    from fastprompt.generators.base import Draws, PromptGenerator


class Layout(NamedTuple):
    """The order of patches in one block.

    Attributes:
        grid: of the block's feature map.
        rows: where the block's patches stand in the order of the block before; four in turn for each patch behind a
            merging; None: the same order. back: the inverse of `rows`; None where `rows` also reads the row of zeros
            that stands for patches outside the map, at index T.
        windows: (windows · N) the patch on each place of the windows, T where the place is padding; None: the patches
            are in that order. places: its inverse, the place of each patch.
    """

    grid: Pair
    rows: Tensor | None
    back: Tensor | None
    windows: Tensor | None
    places: Tensor | None


def features(vit: FrozenSwin, embedded: FeatureMap, generator: PromptGenerator | None, context: Any,
             draws: Draws | None, readout: str) -> Tensor:
    """(B, D): what the head sees. Arguments as for `forward.features`; without prompts the plain graph runs."""
    if generator is None:
        return swin_reference.read_out(vit, swin_reference.encode(vit, embedded.tokens, embedded=embedded), readout)
    x, prompts, last = embedded.patches, None, len(vit.blocks) - 1
    for i, (module, merge, layout) in enumerate(zip(vit.blocks, vit.merges, layouts(vit, embedded.grid, x.device),
                                                    strict=True)):
        block = cast(SwinBlock, module)
        x = reorder(x, layout)
        if merge is not None:
            x = merge(x.unflatten(1, (-1, 4)).flatten(2))
            prompts = None if prompts is None else merge(prompts.repeat(1, 1, 4))
        if i in generator.layers:
            prompts = generator.prompts(i, context, None, draws).to(x.dtype)
        read = "prompts" in readout if i == last else i + 1 not in generator.layers
        x, prompts = run_block(block, layout, x, prompts, read)
    if vit.norm is not None:
        x, prompts = vit.norm(x), None if prompts is None else vit.norm(prompts)
    if readout == "patches" or prompts is None:
        return x.mean(dim=1)
    if readout == "prompts":
        return prompts.mean(dim=1)
    return (x.sum(dim=1) + prompts.sum(dim=1)) / (x.shape[1] + prompts.shape[1])


def run_block(block: SwinBlock, layout: Layout, x: Tensor, prompts: Tensor | None, read: bool
              ) -> tuple[Tensor, Tensor | None]:
    """Patches x (B, T, C) and prompts (1 or B, P, C) through one block; prompts come out only where they are `read`."""
    if block.post_norm:
        h, p = attention(block, layout, x, prompts, read)
        x = x + block.norm1(h)
        x = x + block.norm2(mlp(block.mlp, x))
        if p is None or prompts is None:
            return x, None
        prompts = prompts + block.norm1(p)
        return x, prompts + block.norm2(mlp(block.mlp, prompts))
    h, p = attention(block, layout, block.norm1(x), None if prompts is None else block.norm1(prompts), read)
    x = x + h
    x = x + mlp(block.mlp, block.norm2(x))
    if p is None or prompts is None:
        return x, None
    prompts = prompts + p
    return x, prompts + mlp(block.mlp, block.norm2(prompts))


def attention(block: SwinBlock, layout: Layout, x: Tensor, prompts: Tensor | None, read: bool
              ) -> tuple[Tensor, Tensor | None]:
    """Window attention of patches x (B, T, C) and of the prompts where they are `read`, heads joined and projected."""
    heads, inner = block.num_heads, block.num_heads * block.head_dim
    weight, bias = block.qkv.weight, block.qkv.bias
    qkv = block.qkv(x)  # (B, T, 3 · inner)
    if layout.windows is not None:
        row = x.new_zeros(3 * inner) if bias is None else bias  # what a row of zeros gives
        qkv = torch.cat([qkv, row.expand(x.shape[0], 1, -1)], dim=1).index_select(1, layout.windows)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).contiguous().unbind(0)  # (B, heads, R, d)
    read = read and prompts is not None
    if prompts is None:
        prompts = x.new_zeros(1, 0, x.shape[2])
    start = 0 if read else inner
    rows = F.linear(prompts, weight[start:], None if bias is None else bias[start:])
    parts = rows.unflatten(-1, (-1, heads, block.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)  # (1 or B, heads, P, d)
    prompt_k, prompt_v = parts[-2:]
    scale = block.head_dim ** -0.5
    if block.logit_scale is not None:
        scale = 1.0
        q, k = F.normalize(q, dim=-1) * block.logit_scale, F.normalize(k, dim=-1)
        prompt_k = F.normalize(prompt_k, dim=-1)
    windows_bias = block.attention_bias(layout.grid).transpose(0, 1)  # (heads, windows or 1, N, N)
    h: Tensor = WindowAttention.apply(q, k, v, prompt_k, prompt_v, windows_bias, scale)
    h = h.transpose(1, 2).flatten(2)
    if layout.places is not None:
        h = h.index_select(1, layout.places)
    h = block.proj(h)
    if not read:
        return h, None
    prompt_q = parts[0]
    if block.logit_scale is not None:
        prompt_q = F.normalize(prompt_q, dim=-1) * block.logit_scale
    p = prompt_rows(prompt_q * scale, prompt_k, prompt_v, k, v, windows_bias.shape[-1])
    return h, block.proj(p.transpose(1, 2).flatten(2))


def prompt_rows(q: Tensor, prompt_k: Tensor, prompt_v: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """The mean over windows of what prompts attend to, (B, heads, P, d).

    In window w prompt p attends to all prompts and to the window's N patches. With Z the sum of exponentials over
    the prompts, and Z_w over the patches of w: mean_w [(Z softmax(s) V + Z_w softmax(s_w) V_w) / (Z + Z_w)], where s
    is the same for every window.

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
    """softmax(scale · q [prompt_k, k]ᵀ + [0, bias]) [prompt_v, v] inside windows.

    q, k, v: (B, heads, windows · N, d). prompt_k, prompt_v: (1 or B, heads, P, d), the same for all windows. bias:
    (heads, windows or 1, N, N), a constant. The product with the prompts is one for all windows of an image.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, bias: Tensor,
                scale: float) -> Tensor:
        b, heads, rows, d = q.shape
        n, p = bias.shape[-1], prompt_k.shape[2]
        q = q if scale == 1 else q * scale
        inside = (b * heads * (rows // n), n)
        to_prompts = q @ prompt_k.transpose(-1, -2)  # (B, heads, R, P)
        to_window = torch.bmm(q.view(*inside, d), k.view(*inside, d).transpose(1, 2)).view(b, heads, -1, n, n)
        if torch.compiler.is_compiling():
            scores = torch.cat([to_prompts, (to_window + bias).view(b, heads, rows, n)], dim=-1)
        else:
            scores = q.new_empty(b, heads, rows, p + n)
            scores[..., :p] = to_prompts
            torch.add(to_window, bias, out=scores.view(b, heads, -1, n, p + n)[..., p:])
        weights = scores.softmax(dim=-1)  # (B, heads, R, P + N)
        out = weights[..., :p] @ prompt_v
        out.view(*inside, d).baddbmm_(weights.view(*inside, p + n)[..., p:], v.view(*inside, d))
        ctx.save_for_backward(q, k, v, prompt_k, prompt_v, weights)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, prompt_k, prompt_v, weights = ctx.saved_tensors
        b, heads, rows, d = q.shape
        p = prompt_k.shape[2]
        n = weights.shape[3] - p
        inside = (b * heads * (rows // n), n)
        grad = grad.contiguous()
        to_prompts = grad @ prompt_v.transpose(-1, -2)
        to_window = torch.bmm(grad.view(*inside, d), v.view(*inside, d).transpose(1, 2))
        scores = torch.cat([to_prompts, to_window.view(b, heads, rows, n)], dim=-1)
        scores = torch._softmax_backward_data(scores, weights, -1, weights.dtype)  # (B, heads, R, P + N)
        inner_scores, inner_weights = (t.view(*inside, p + n)[..., p:] for t in (scores, weights))
        grads: list[Tensor | None] = [None] * 7
        if ctx.needs_input_grad[0]:
            dq = scores[..., :p] @ prompt_k
            dq.view(*inside, d).baddbmm_(inner_scores, k.view(*inside, d))
            grads[0] = dq if ctx.scale == 1 else dq.mul_(ctx.scale)
        if ctx.needs_input_grad[1]:
            grads[1] = torch.bmm(inner_scores.transpose(1, 2), q.view(*inside, d)).view_as(k)
        if ctx.needs_input_grad[2]:
            grads[2] = torch.bmm(inner_weights.transpose(1, 2), grad.view(*inside, d)).view_as(v)
        if ctx.needs_input_grad[3]:
            grads[3] = (scores[..., :p].transpose(-1, -2) @ q).sum_to_size(prompt_k.shape)
        if ctx.needs_input_grad[4]:
            grads[4] = (weights[..., :p].transpose(-1, -2) @ grad).sum_to_size(prompt_v.shape)
        return tuple(grads)


class Permute(torch.autograd.Function):
    """Rows of x (B, T, C) in another order; the gradient comes back by the inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(rows, back)
        return select_rows(x, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, back = ctx.saved_tensors
        return Permute.apply(grad, back, rows), None, None


def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[:, rows] for x (B, T, C), by copying whole rows."""
    b, t, c = x.shape
    flat = (torch.arange(b, device=x.device)[:, None] * t + rows).flatten()
    return x.reshape(b * t, c).index_select(0, flat).view(b, -1, c)


def reorder(x: Tensor, layout: Layout) -> Tensor:
    """x (B, T, C) in the order of the block before → the block's own; behind a merging (B, 4T', C)."""
    if layout.rows is None:
        return x
    if layout.back is None:
        return torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], dim=1).index_select(1, layout.rows)
    return Permute.apply(x, layout.rows, layout.back)


def layouts(vit: FrozenSwin, grid: Pair, device: torch.device) -> list[Layout]:
    """The layout of each block for images of `grid` patches; computed once for each size and device."""
    known = vit.layouts.get((grid, device))
    if known is None:
        known = vit.layouts[grid, device] = compute_layouts(vit, grid, device)
    return known


def compute_layouts(vit: FrozenSwin, grid: Pair, device: torch.device) -> list[Layout]:
    """See `layouts`."""
    result, order = [], torch.arange(grid[0] * grid[1])  # the image's patch on each place of the order before
    for module, merge in zip(vit.blocks, vit.merges, strict=True):
        block = cast(SwinBlock, module)
        position = order.argsort()  # the place of each patch in the order before
        if merge is not None:
            size, (height, width) = len(order), grid
            grid = ((height + 1) // 2, (width + 1) // 2)
            position = F.pad(position.view(height, width), (0, width % 2, 0, height % 2), value=size)
            position = position.view(grid[0], 2, grid[1], 2).permute(0, 2, 3, 1).reshape(-1, 4)  # (patches, 4)
        places = window_places(grid, block.window, block.shift)
        whole = bool((places < grid[0] * grid[1]).all())
        order = places if whole else torch.arange(grid[0] * grid[1])
        rows = position[order].flatten()
        exact = len(rows) == len(rows.unique()) and (merge is None or bool((rows < size).all()))
        same = merge is None and torch.equal(rows, torch.arange(len(rows)))
        result.append(Layout(grid, None if same else rows.to(device), rows.argsort().to(device) if exact else None,
                             None if whole else places.to(device),
                             None if whole else places.argsort()[:len(order)].to(device)))
    return result


def window_places(grid: Pair, window: Pair, shift: Pair) -> Tensor:
    """(windows · N): the patch of the image on each place of the (shifted) windows; H · W where there is none."""
    height, width = grid
    index = torch.arange(height * width).view(height, width).roll((-shift[0], -shift[1]), (0, 1))
    whole = padded(grid, window)
    index = F.pad(index, (0, whole[1] - width, 0, whole[0] - height), value=height * width)
    return partition(index[None, :, :, None], window).flatten()
