"""Reader for timm's `Eva`: EVA, EVA-02, DINOv3, Perception Encoder, RoPE ViTs, Sapiens2."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from timm import layers as tl
from timm.layers import pos_embed_sincos as rope
from timm.models import eva
from torch import Tensor

from fastprompt.vit.readers import timm_layers as layers
from fastprompt.vit.readers.parts import halves, loaded_as, refuse
from fastprompt.vit.weights import Block, Dense, Rotary


def read(model: Any) -> dict[str, Any]:
    """Read the canonical parts of a timm `Eva`; see `FrozenViT`.

    Grouped keys and values are written out, one copy for each head that reads them.

    Raises:
        ValueError: a part that cannot be represented (gated attention, ...). The error names it.
    """
    parts = layers.common(model, [block(module, model.rope is not None) for module in model.blocks])
    # attention pooling reads all tokens
    parts["spec"] = dataclasses.replace(parts["spec"], pool_prefix=model.attn_pool is not None)
    if model.rope is None:
        return parts
    return with_rotation(parts, model.rope, tuple(model.patch_embed.grid_size), model.blocks[0].attn)


def with_rotation(parts: dict[str, Any], module: Any, grid: tuple[int, ...], attn: Any) -> dict[str, Any]:
    """Add a rotary embedding for this grid to the parts. `attn`: the attention of one of the blocks that rotate."""
    embedding = rotary(module, grid, half=bool(attn.rotate_half))
    return {**parts, "rotary": embedding, "loaded": parts["loaded"] | _loaded(module, embedding, grid)}


def _loaded(module: Any, read: Rotary, grid: tuple[int, ...]) -> dict[str, str | None]:
    """What a fingerprint hashes for a rotation: learned frequencies, or the rule of computed ones."""
    learned = [module.freqs] if isinstance(module, rope.RotaryEmbeddingMixed) else []
    table = loaded_as(*learned, grid=grid, rule=read.rule)
    frequencies: dict[str, str | None] = {} if learned else {"rotary.frequencies": None}
    return {"rotary.sin": table, "rotary.cos": table, **frequencies}


def rotary(module: Any, grid: tuple[int, ...], half: bool) -> Rotary:
    """Convert one of timm's rotary embeddings. `half`: it pairs channels i and i + d / 2, not neighbours."""
    kind: Any = type(module)
    mixed = kind is rope.RotaryEmbeddingMixed
    fixed = not mixed and getattr(module, "feat_shape", None) is not None
    with torch.no_grad():
        table = module.get_embed() if fixed else module.get_embed(shape=list(grid))  # ([L, H,] N, [sin, cos] of d)
    sin, cos = table.unflatten(-1, (2, -1)).unbind(-2)
    channels = slice(0, sin.shape[-1] // 2) if half else slice(0, None, 2)  # each angle stands twice
    sin, cos = sin[..., channels], cos[..., channels]
    if mixed:
        frequencies = module.freqs.detach()[[1, 0] if module.grid_indexing == "xy" else [0, 1]]
        return Rotary(frequencies, sin, cos)
    if kind is rope.RotaryEmbeddingMRope:
        axes = torch.stack([module.axis == 1, module.axis == 2])  # the temporal axis stays at 0
        return Rotary((axes * module.inv_freq)[:, None, None], sin[None, None], cos[None, None])
    rule: dict[str, Any]
    if kind is rope.RotaryEmbeddingDinoV3:
        frequencies, rule = 1 / module.periods, {"centred": True, "size": module.normalize_coords}
    elif kind is rope.RotaryEmbeddingCat and module.grid_type == "index":
        frequencies, rule = module.bands, {"reference": module.ref_feat_shape and tuple(module.ref_feat_shape)}
    else:
        refuse("rotary embedding", kind.__name__, "those of timm's rope_type 'cat', 'dinov3', 'mixed', 'mrope'")
    apart = torch.block_diag(*frequencies.repeat(2, 1)[:, None].unbind())  # (2, d / 2): first and second axis
    return Rotary(
        apart.flip(0)[:, None, None] if module.grid_indexing == "xy" else apart[:, None, None],
        sin[None, None],
        cos[None, None],
        offset=float(module.grid_offset),
        **rule,
    )


def block(module: Any, rotates: bool) -> Block:
    """Convert a block of Eva; `rotates`: the model rotates its queries and keys."""
    if type(module) not in (eva.EvaBlock, eva.EvaBlockPostNorm):
        refuse("block", type(module).__name__, "EvaBlock, EvaBlockPostNorm")
    attn = module.attn
    if type(attn) not in (eva.EvaAttention, tl.AttentionRope):
        refuse("attention layer", type(attn).__name__, "EvaAttention, AttentionRope")
    if attn.gate is not None:
        refuse("attention layer", f"gated {type(attn).__name__}", "attention without gate")
    qkv, q_norm, k_norm = _qkv(attn), layers.norm(attn.q_norm), layers.norm(attn.k_norm)
    if rotates and not attn.rotate_half:
        qkv, q_norm, k_norm = halves(qkv, attn.num_heads, q_norm, k_norm)
    return Block(
        norm1=layers.block_norm(module.norm1),
        qkv=qkv,
        proj=layers.dense(attn.proj),
        norm2=layers.block_norm(module.norm2),
        mlp=layers.mlp(module.mlp),
        num_heads=attn.num_heads,
        q_norm=q_norm,
        k_norm=k_norm,
        attn_norm=layers.norm(attn.norm),
        ls1=getattr(module, "gamma_1", None),
        ls2=getattr(module, "gamma_2", None),
        post_norm=type(module) is eva.EvaBlockPostNorm,
        rotary=rotates,
    )


def _qkv(attn: Any) -> Dense:
    """The stacked projection, with zeros for the biases that are missing and each head's own keys and values."""
    if attn.qkv is not None:
        if getattr(attn, "q_bias", None) is None:
            return layers.dense(attn.qkv)
        return Dense(attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]))
    groups = getattr(attn, "num_kv_groups", 1)
    weights, biases = [], []
    for i, module in enumerate((attn.q_proj, attn.k_proj, attn.v_proj)):
        part = layers.dense(module)
        bias: Tensor = part.weight.new_zeros(part.weight.shape[0]) if part.bias is None else part.bias
        repeats = groups if i else 1
        weights.append(part.weight.unflatten(0, (-1, attn.head_dim)).repeat_interleave(repeats, 0).flatten(0, 1))
        biases.append(bias.unflatten(0, (-1, attn.head_dim)).repeat_interleave(repeats, 0).flatten(0, 1))
    has_bias = any(module.bias is not None for module in (attn.q_proj, attn.k_proj, attn.v_proj))
    return Dense(torch.cat(weights), torch.cat(biases) if has_bias else None)
