"""Reader for open_clip's image towers: its own `VisionTransformer`, and timm's inside a `TimmModel`."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import open_clip
import torch
import torch.nn as nn
from open_clip import transformer as oc
from open_clip.coca_model import CoCa
from open_clip.model import CLIP as CLIPModel, CustomTextCLIP
from open_clip.timm_model import TimmModel

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.vit.readers import timm
from fastprompt.vit.readers.parts import CLIP, activation, attention, dense, layer_norm, patch_size, refuse
from fastprompt.vit.weights import Block, Dense, Mlp, Norm, ViTSpec

# The image tower does not depend on the text tower, which is not read. Without pretrained weights, build a small one.
_SMALL_TEXT = {"width": 64, "heads": 1, "layers": 1, "vocab_size": 8, "context_length": 8}


def build(name: str, pretrained: str | None = None, **kwargs: Any) -> nn.Module:
    """Build an open_clip model by name.

    Args:
        name: one of `open_clip.list_models()`, or "hf-hub:..." or "local-dir:...".
        pretrained: a tag of published weights ("openai", "laion2b_s34b_b88k") or a file; None: random weights.
        kwargs: passed to `open_clip.create_model`.

    Raises:
        TypeError, ValueError: open_clip does not know `name` or `pretrained`.
    """
    if not isinstance(name, str):
        raise ArgumentTypeError("model", f"must be an open_clip model name or a module, got {type(name).__name__}")
    if pretrained is not None and not isinstance(pretrained, str):
        raise ArgumentTypeError("pretrained", f"must be a tag of published weights, a file or None, got {pretrained!r}")
    if ":" not in name:
        if name.replace("/", "-") not in open_clip.list_models():
            raise ArgumentError(
                "model", f"must be an open_clip model name, got {name!r}; open_clip.list_models() lists them"
            )
        if pretrained and not os.path.isfile(pretrained):
            tags = open_clip.list_pretrained_tags_by_model(name.replace("/", "-"))
            if not open_clip.is_pretrained_cfg(name.replace("/", "-"), pretrained):
                raise ArgumentError("pretrained", f"must be a file or one of {tags} for {name!r}, got {pretrained!r}")
        if not pretrained:
            kwargs.setdefault("text_cfg", _SMALL_TEXT)
    return open_clip.create_model(name, pretrained=pretrained, **kwargs)


def read(model: Any) -> dict[str, Any]:
    """Read the canonical parts of an open_clip image tower, or of the one in a `CLIP` or `CustomTextCLIP`.

    `backbone(images)` equals `model.encode_image(images)`: pooled and projected, not L2-normalised. If the tower also
    returns its tokens (`output_tokens`), it equals the first of the two outputs. The projection is `backbone.head`.
    mean and std are those of `visual.preprocess_cfg`, which open_clip sets, or else CLIP's. Another `image_size`
    resamples as open_clip's `resize_pos_embed` does (bicubic, antialiased). See `FrozenViT`.

    Raises:
        ValueError: another class, or a part that cannot be represented (attentional pooling, no pooling, ResNets,
            cosine attention, a norm after the attention, ...). The error names it.
    """
    if type(model) in (CLIPModel, CustomTextCLIP, CoCa):
        model = model.visual
    if type(model) is TimmModel:
        parts = _timm_model(model)
    elif type(model) is oc.VisionTransformer:
        parts = _vision_transformer(model)
    else:
        refuse(
            "image tower",
            f"{type(model).__name__} of {type(model).__module__}",
            "open_clip's VisionTransformer, or timm's in a TimmModel",
        )
    preprocess = getattr(model, "preprocess_cfg", None) or {}
    for key in ("mean", "std"):
        if preprocess.get(key):
            change: dict[str, Any] = {key: tuple(preprocess[key])}
            parts["spec"] = dataclasses.replace(parts["spec"], **change)
    return parts


def _vision_transformer(model: Any) -> dict[str, Any]:
    if model.attn_pool is not None:
        refuse("pooling", "an AttentionalPooler", "the class token ('tok') or the average ('avg')")
    if model.pool_type not in ("tok", "avg"):
        refuse("pool_type", repr(model.pool_type), "'tok' or 'avg'")
    patch = patch_size(model.conv1)
    blocks = [_block(block) for block in model.transformer.resblocks]
    height, width = model.image_size
    norm = _norm(model.ln_post)
    # before or after pooling makes no difference for one token
    after_pool = model.final_ln_after_pool and model.pool_type == "avg"
    return {
        "spec": ViTSpec(
            name=type(model).__name__,
            image_size=(height, width),
            grid=(height // patch, width // patch),
            patch_size=patch,
            num_heads=blocks[0].num_heads,
            has_cls=True,
            num_registers=0,
            pool="cls" if model.pool_type == "tok" else "patches",
            **CLIP,
        ),
        "patch_weight": model.conv1.weight,
        "patch_bias": model.conv1.bias,
        "cls_token": model.class_embedding.view(1, 1, -1),
        "registers": None,
        "pos_embed": model.positional_embedding.unsqueeze(0),
        "norm_pre": _norm(model.ln_pre),
        "blocks": blocks,
        "norm": None if after_pool else norm,
        "fc_norm": norm if after_pool else None,
        "head": None if model.proj is None else Dense(model.proj.t().contiguous(), None),
    }


def _timm_model(model: Any) -> dict[str, Any]:
    parts = timm.read(model.trunk)
    for layer in model.head:
        if isinstance(layer, nn.Dropout):
            continue
        if parts["head"] is not None:
            refuse("head", f"{type(layer).__name__} behind a Linear", "one Linear")
        parts["head"] = dense(layer)
    return parts


def _norm(module: Any) -> Norm | None:
    if isinstance(module, nn.Identity):
        return None
    if type(module) not in (oc.LayerNorm, oc.LayerNormFp32, nn.LayerNorm):
        refuse("norm layer", type(module).__name__, "LayerNorm, LayerNormFp32")
    return layer_norm(module, upcast=type(module) is oc.LayerNormFp32)


def _block_norm(module: Any) -> Norm:
    norm = _norm(module)
    if norm is None:
        refuse("a block's norm layer", "Identity", "LayerNorm, LayerNormFp32")
    return norm


def _scale(module: Any) -> torch.Tensor | None:
    if isinstance(module, nn.Identity):
        return None
    if type(module) is not oc.LayerScale:
        refuse("layer scale", type(module).__name__, "LayerScale")
    return module.gamma


def _block(block: Any) -> Block:
    if type(block) is oc.ResidualAttentionBlock:
        if hasattr(block, "ln_1_kv"):
            refuse("block", "a ResidualAttentionBlock with cross-attention", "self-attention")
        attn = attention(block.attn)
    elif type(block) is oc.CustomResidualAttentionBlock:
        if not isinstance(block.ln_attn, nn.Identity):
            refuse(
                "block", "a CustomResidualAttentionBlock with a norm behind the attention (scale_attn)", "none there"
            )
        attn = _attention(block.attn)
    else:
        refuse("block", type(block).__name__, "ResidualAttentionBlock, CustomResidualAttentionBlock")
    layers = dict(block.mlp.named_children())
    if list(layers) not in (["c_fc", "gelu", "c_proj"], ["c_fc", "gelu", "ln", "c_proj"]):
        refuse("mlp layer", ", ".join(layers), "c_fc, gelu, ln, c_proj")
    act = "quick_gelu" if type(layers["gelu"]) is oc.QuickGELU else activation(layers["gelu"])
    mlp = Mlp(dense(layers["c_fc"]), dense(layers["c_proj"]), act, _norm(layers.get("ln", nn.Identity())))
    return Block(
        norm1=_block_norm(block.ln_1),
        norm2=_block_norm(block.ln_2),
        mlp=mlp,
        ls1=_scale(block.ls_1),
        ls2=_scale(block.ls_2),
        **attn,
    )


def _attention(attn: Any) -> dict[str, Any]:
    if type(attn) is not oc.Attention:
        refuse("attention layer", type(attn).__name__, "Attention")
    if attn.logit_scale is not None:
        refuse("attention layer", "Attention with scaled cosines (scaled_cosine_attn)", "scaled dot products")
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    if attn.head_scale is not None:
        # scaling a head's output is the same as scaling its values
        factor = torch.ones_like(weight[:, 0]).view(3, attn.num_heads, -1)
        factor[2] *= attn.head_scale.view(-1, 1)
        weight, bias = weight * factor.view(-1, 1), None if bias is None else bias * factor.view(-1)
    return {
        "qkv": Dense(weight, bias),
        "proj": dense(attn.out_proj),
        "num_heads": attn.num_heads,
        "q_norm": _norm(attn.ln_q),
        "k_norm": _norm(attn.ln_k),
        "attn_norm": _norm(attn.ln_inner),
    }
