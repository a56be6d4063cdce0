"""Reader for timm's vision transformers; `eva.py`, `beit.py`, `naflex.py` read some of them, `swin.py` its Swin."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn as nn
from timm import layers as tl
from timm.models import (
    beit as timm_beit,
    deit,
    eva as timm_eva,
    naflexvit,
    vision_transformer as vt,
    vision_transformer_relpos as relpos,
)

from fastprompt.vit.readers import beit, eva, naflex
from fastprompt.vit.readers.parts import refuse
from fastprompt.vit.readers.timm_layers import block_norm, common, dense, layer_scale, mlp, norm
from fastprompt.vit.weights import Block

_POOLS_TOKENS = (
    ", whose blocks pool their tokens and attend within windows: one number of tokens for all blocks is needed"
)
_WHY_NOT = {"Hiera": _POOLS_TOKENS, "HieraDet": _POOLS_TOKENS}


def read(model: Any) -> dict[str, Any]:
    """Read the canonical parts of a timm `VisionTransformer`, `Eva`, `Beit` or one like them; see `FrozenViT`.

    Raises:
        ValueError: another timm class, or a part that cannot be represented (parallel or differential blocks,
            hybrid patch embeddings, pooling other than CLS, average or map, ...). The error names it.
    """
    if type(model) is timm_eva.Eva:
        return eva.read(model)
    if type(model) in (timm_beit.Beit, relpos.VisionTransformerRelPos):
        return beit.read(model)
    if type(model) is naflexvit.NaFlexVit:
        return naflex.read(model, [_naflex_block(block, model.rope is not None) for block in model.blocks])
    if type(model) not in (vt.VisionTransformer, deit.VisionTransformerDistilled):
        refuse(
            "model",
            f"{type(model).__name__} of {type(model).__module__}{_WHY_NOT.get(type(model).__name__, '')}",
            "timm's VisionTransformer, VisionTransformerDistilled, VisionTransformerRelPos, Beit, Eva, NaFlexVit, "
            "SwinTransformer and SwinTransformerV2",
        )
    parts = common(model, [_block(block) for block in model.blocks])
    parts["spec"] = dataclasses.replace(parts["spec"], pool_prefix=bool(model.pool_include_prefix))
    return _distilled(model, parts) if type(model) is deit.VisionTransformerDistilled else parts


def _distilled(model: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """Add the distillation token and its classifier."""
    parts["spec"] = dataclasses.replace(parts["spec"], pool="cls+dist")
    head = None if isinstance(model.head_dist, nn.Identity) else dense(model.head_dist)
    return {**parts, "registers": model.dist_token, "head_dist": head}


def _naflex_block(module: Any, rotates: bool) -> Block:
    return (
        eva.block(module, rotates)
        if isinstance(module, (timm_eva.EvaBlock, timm_eva.EvaBlockPostNorm))
        else _block(module)
    )


def _block(module: Any) -> Block:
    if type(module) not in (vt.Block, vt.ResPostBlock):
        refuse("block", type(module).__name__, "Block, ResPostBlock")
    attn = module.attn
    if type(attn) is not tl.Attention:
        refuse("attention layer", type(attn).__name__, "Attention")
    if getattr(attn, "gate", None) is not None:  # no attribute of earlier versions
        refuse("attention layer", "gated Attention", "Attention without gate")
    post_norm = type(module) is vt.ResPostBlock
    ls1, ls2 = (None, None) if post_norm else (layer_scale(module.ls1), layer_scale(module.ls2))
    return Block(
        norm1=block_norm(module.norm1),
        qkv=dense(attn.qkv),
        proj=dense(attn.proj),
        norm2=block_norm(module.norm2),
        mlp=mlp(module.mlp),
        num_heads=attn.num_heads,
        q_norm=norm(attn.q_norm),
        k_norm=norm(attn.k_norm),
        attn_norm=norm(attn.norm),
        ls1=ls1,
        ls2=ls2,
        post_norm=post_norm,
    )
