"""Exact folding: the same block with fewer constants, valid as long as its weights do not change.

Nothing here is an approximation: in real arithmetic a folded block computes what the original does, even while prompts
train. Each rewrite states the conditions under which its constant can move.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.kept import SeenObjects, arithmetic, tensors_of
from fastprompt.vit.backbone import Backbone
from fastprompt.vit.linear import FrozenLinear, pack
from fastprompt.vit.rotary import COMPLEX
from fastprompt.vit.weights import Block, Dense, Folded, Mlp, Norm

QUICK_GELU_SLOPE = 1.702


def folded(vit: Backbone) -> Folded | None:
    """Return the backbone with its constants folded, computed once and again when they change.

    Returns None while the weights train, and if they were created in inference mode, because PyTorch does not track
    their changes there. Inside `torch.compile`, and for a private backbone, it returns the last result.
    """
    if torch.compiler.is_compiling() or (vit.private and vit.kept_fold.value is not None):
        return vit.kept_fold.value
    tensors = tensors_of(vit)
    facts = (vit.spec.mean, vit.spec.std, vit.copies, *arithmetic(vit.device))
    if vit.device.type == "meta" or any(tensor.requires_grad or tensor.is_inference() for tensor in tensors):
        vit.kept_fold.clear()
        return None
    if torch._C._are_functorch_transforms_active():  # functorch wraps the tensors; do not cache the wrappers
        return vit.kept_fold.current(tensors, facts)
    return vit.kept_fold.get(SeenObjects, tensors, facts, lambda: fold_backbone(vit))


def fold_backbone(vit: Backbone) -> Folded:
    """Fold everything in a backbone that folds, in full precision even under autocast.

    The result shares memory with the backbone only for tensors that folding leaves unchanged. What happens to the
    weights of the blocks depends on `vit.copies`.
    """
    with torch.autocast(vit.device.type, enabled=False):
        blocks = tuple(shared(block) if vit.copies == "none" else fold(block) for block in vit.blocks)
        if vit.copies == "packed":
            for block in blocks:
                pack(block, trains=True)
        patches = Dense(vit.patch_weight, vit.patch_bias)
        return Folded(blocks, fold_pixels(patches, vit.mean, vit.std) if vit.stem is None else None)


def fold(block: Block) -> Block:
    """Return the block with its constants moved into its Linears; unchanged tensors are shared.

    * γ, β of a norm move into the next Linear: norm1 into qkv, norm2 into fc1, the inner norms into proj and fc2. In a
      post-norm block norm1 and norm2 stay, since they feed the residual.
    * LayerScale moves into proj and fc2. A relative position bias is written out for all pairs of rows.
    * 1/√d moves into W_q, or into the q-norm's affine; a rotation behind them is linear.
    * The channels of queries and keys that a rotation pairs become neighbours, where PyTorch multiplies complex numbers
      (float32 and float64 on a CPU): the rotation is then one product. Scores do not depend on the channels' order.
    * The key bias is dropped: it is added to every key, prompts included, so it cancels in the softmax (not with a
      k-norm, and not with a rotary embedding, which rotates it with the key).
    * W_o b_v moves into b_o, since attention weights sum to 1 (not with a norm between them).
    * Quick-GELU x σ(1.702 x) = silu(1.702 x) / 1.702 becomes SiLU between two scaled Linears (not if a norm follows,
      since the scale would change the effect of its epsilon).
    """
    qkv, proj, norm1 = _Affine(block.qkv), _Affine(block.proj), block.norm1
    inner = block.num_heads * block.head_dim
    if not block.post_norm:
        qkv.absorb_norm(norm1)
        norm1 = without_affine(norm1)
    q_norm, attn_norm = block.q_norm, block.attn_norm
    if q_norm is None:
        qkv.scale_rows(slice(0, inner), block.scale)
    else:
        q_norm = _scaled(q_norm, block.scale, block.qkv.weight)
    if block.k_norm is None and not block.rotary:
        qkv.bias[inner : 2 * inner] = 0
    if attn_norm is None:
        proj.bias = proj.bias + proj.weight @ qkv.bias[2 * inner :]
        qkv.bias[2 * inner :] = 0
    else:
        proj.absorb_norm(attn_norm)
        attn_norm = without_affine(attn_norm)
    k_norm, like = block.k_norm, block.qkv.weight
    interleaved = block.rotary and like.device.type == "cpu" and like.dtype in COMPLEX
    if interleaved:
        qkv.interleave(block.num_heads)
        q_norm, k_norm = _interleaved(q_norm), _interleaved(k_norm)
    if block.ls1 is not None and not block.post_norm:
        proj.scale_rows(slice(None), block.ls1)
    norm2 = block.norm2 if block.post_norm else without_affine(block.norm2)
    folded = Block(
        norm1=norm1,
        qkv=qkv.dense(),
        proj=proj.dense(),
        norm2=norm2,
        mlp=_fold_mlp(block),
        num_heads=block.num_heads,
        q_norm=q_norm,
        k_norm=k_norm,
        attn_norm=attn_norm,
        post_norm=block.post_norm,
        scale=1.0,
        rotary=block.rotary,
        interleaved=interleaved,
        bias=None if block.bias is None else block.bias.folded(),
    )
    return folded.eval()


def shared(block: Block) -> Block:
    """Return the block with its own tensors and constants, and with Linears that know that they are frozen."""
    mlp = block.mlp
    found = Block(
        norm1=block.norm1,
        qkv=FrozenLinear.sharing(block.qkv),
        proj=FrozenLinear.sharing(block.proj),
        norm2=block.norm2,
        mlp=Mlp(FrozenLinear.sharing(mlp.fc1), FrozenLinear.sharing(mlp.fc2), mlp.act, mlp.norm, mlp.glu),
        num_heads=block.num_heads,
        q_norm=block.q_norm,
        k_norm=block.k_norm,
        attn_norm=block.attn_norm,
        ls1=block.ls1,
        ls2=block.ls2,
        post_norm=block.post_norm,
        scale=block.scale,
        rotary=block.rotary,
        interleaved=block.interleaved,
        bias=None if block.bias is None else block.bias.folded(),
    )
    return found.eval()


def _fold_mlp(block: Block) -> Mlp:
    mlp, norm, act = block.mlp, block.mlp.norm, block.mlp.act
    fc1, fc2 = _Affine(mlp.fc1), _Affine(mlp.fc2)
    if not block.post_norm:
        fc1.absorb_norm(block.norm2)
    if act == "quick_gelu" and norm is None:
        hidden = fc1.weight.shape[0]
        gate = {"none": slice(None), "first": slice(0, hidden // 2), "last": slice(hidden // 2, None)}[mlp.glu]
        fc1.scale_rows(gate, QUICK_GELU_SLOPE)
        fc2.weight = fc2.weight / QUICK_GELU_SLOPE
        act = "silu"
    if norm is not None:
        fc2.absorb_norm(norm)
        norm = without_affine(norm)
    if block.ls2 is not None and not block.post_norm:
        fc2.scale_rows(slice(None), block.ls2)
    return Mlp(fc1.dense(), fc2.dense(), act, norm, mlp.glu)


class _Affine:
    """A Linear's weight (out, in) and bias (out,) in float32 or wider, into which constants are moved."""

    def __init__(self, source: Dense) -> None:
        self.source = source
        self.wide = torch.promote_types(source.weight.dtype, torch.float32)
        self.weight = source.weight.detach().to(self.wide)
        bias = source.bias
        self.bias = self.weight.new_zeros(self.weight.shape[0]) if bias is None else bias.detach().to(self.wide).clone()

    def absorb_norm(self, norm: Norm) -> None:
        """Fold the norm's affine: W (x̂ γ + β) + b = (W γ) x̂ + (b + W β)."""
        if norm.bias is not None:
            self.bias = self.bias + self.weight @ norm.bias.to(self.wide)
        if norm.weight is not None:
            self.weight = self.weight * norm.weight.to(self.wide)

    def scale_rows(self, rows: slice, factor: Tensor | float) -> None:
        """Multiply these outputs by a scalar or a vector."""
        column = factor.detach().to(self.wide) if isinstance(factor, Tensor) else self.weight.new_tensor(factor)
        self.weight, self.bias = self.weight.clone(), self.bias.clone()
        self.weight[rows] *= column[..., None]
        self.bias[rows] *= column

    def interleave(self, num_heads: int) -> None:
        """Reorder the channels of each head's queries and keys from i, i + d / 2 to neighbours."""
        self.weight, self.bias = (
            torch.cat([x.unflatten(0, (3, num_heads, 2, -1))[:2].transpose(2, 3).flatten(0, 3), x[len(x) // 3 * 2 :]])
            for x in (self.weight, self.bias)
        )

    def dense(self) -> Dense:
        """Return a frozen Linear in the source's dtype: the source itself if nothing moved, without a zero bias."""
        weight, bias = self.weight.to(self.source.weight.dtype), self.bias.to(self.source.weight.dtype)
        dense = FrozenLinear(weight, bias if bias.any() else None)
        if torch.equal(weight, self.source.weight):
            dense.weight = self.source.weight
        return dense


def without_affine(norm: Norm) -> Norm:
    """Return the norm without its affine: x̂ alone."""
    return Norm(norm.kind, norm.size, norm.eps, None, None, norm.upcast)


def _interleaved(norm: Norm | None) -> Norm | None:
    """Reorder a norm of queries or keys like `_Affine.interleave`."""
    if norm is None:
        return None
    weight, bias = (None if x is None else x.unflatten(0, (2, -1)).t().flatten() for x in (norm.weight, norm.bias))
    return Norm(norm.kind, norm.size, norm.eps, weight, bias, norm.upcast)


def _scaled(norm: Norm, factor: float, like: Tensor) -> Norm:
    """Return the norm scaled: factor · (x̂ γ + β)."""
    weight = like.new_ones(norm.size) if norm.weight is None else norm.weight
    return Norm(
        norm.kind, norm.size, norm.eps, weight * factor, None if norm.bias is None else norm.bias * factor, norm.upcast
    )


def fold_pixels(patches: Dense, mean: tuple[float, ...], std: tuple[float, ...]) -> Dense:
    """Fold normalisation into the patch embedding of raw pixels 0 … 255.

    W ((x / 255 − mean) / std) + b = (W / (255 std)) x + b'. This does not hold if normalised images are zero-padded,
    because a padded zero is not a raw zero.
    """
    weight, bias = patches.weight, patches.bias
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.tensor(std, dtype=wide, device=weight.device).view(-1, 1, 1)
    shift = torch.tensor(mean, dtype=wide, device=weight.device).view(-1, 1, 1)
    folded = weight.to(wide) / scale
    moved = -(folded * shift).sum(dim=(1, 2, 3))
    if bias is not None:
        moved = moved + bias.to(wide)
    return Dense((folded / 255).to(weight.dtype), moved.to(weight.dtype))
