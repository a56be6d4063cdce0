"""What the readers of timm's vision transformers share: embedding, norms, MLPs and pooling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from timm import layers as tl
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from fastprompt.vit.readers.parts import activation, refuse
from fastprompt.vit.weights import Block, Dense, MapPool, Mlp, Norm, Stem, ViTSpec

_ACTIVATIONS: dict[type[nn.Module], str] = {
    tl.GELU: "gelu",
    tl.GELUTanh: "gelu_tanh",
    tl.QuickGELU: "quick_gelu",
    tl.Tanh: "tanh",
    tl.Sigmoid: "sigmoid",
}
"""timm's own, beside torch's."""
_POOLS = {"token": "cls", "avg": "patches", "map": "map"}


def common(model: Any, blocks: list[Block]) -> dict[str, Any]:
    """Return the parts of one of timm's vision transformers, whose blocks are read."""
    pool = pool_of(model)
    embed, hybrid = model.patch_embed, isinstance(model.patch_embed, tl.HybridEmbed)
    if type(embed) not in (tl.PatchEmbed, tl.PatchEmbedWithSize, tl.HybridEmbed, tl.HybridEmbedWithSize):
        refuse("patch_embed", type(embed).__name__, "PatchEmbed, HybridEmbed")
    stem_alone = hybrid and isinstance(embed.proj, nn.Identity)
    if not stem_alone and not isinstance(embed.proj, nn.Conv2d):
        refuse("patch_embed.proj", type(embed.proj).__name__, "Conv2d")
    kernel = tuple(embed.patch_size)
    if embed.img_size is None:
        refuse("img_size", "None", "a model built with an image size")
    if min(embed.grid_size) < 1:
        refuse("img_size", f"{tuple(embed.img_size)}", f"at least one patch of {kernel[0]} pixels")
    sides = embed.feat_ratio(as_scalar=False) if hybrid else kernel  # of a patch, in pixels
    if sides[0] != sides[1] or kernel[0] != kernel[1]:
        refuse("patch_size", str(sides), "square patches")
    if stem_alone and kernel != (1, 1):
        refuse("patch_size", str(kernel), "(1, 1) without a projection")
    if not stem_alone and (embed.proj.kernel_size, embed.proj.stride, embed.proj.padding) != (kernel, kernel, (0, 0)):
        refuse("patch_embed.proj", str(embed.proj), "patches side by side")
    if not blocks:
        refuse("depth", "0", "at least one block")
    if hybrid and embed.in_chans != 3:
        refuse("in_chans", str(embed.in_chans), "3 for a convolutional stem")

    cfg = getattr(model, "pretrained_cfg", None) or {}
    has_cls, position = model.cls_token is not None, getattr(model, "pos_embed", None)
    spec = ViTSpec(
        name=cfg.get("architecture") or type(model).__name__,
        image_size=tuple(embed.img_size),
        grid=tuple(embed.grid_size),
        patch_size=sides[0],
        num_heads=blocks[0].num_heads,
        has_cls=has_cls,
        num_registers=model.num_prefix_tokens - has_cls,
        pool=pool,
        pos_on_prefix=not getattr(model, "no_embed_class", False),
        dynamic_size=bool(getattr(model, "dynamic_img_size", False)),
        dynamic_pad=bool(embed.dynamic_img_pad),
        mean=tuple(cfg.get("mean") or IMAGENET_DEFAULT_MEAN),
        std=tuple(cfg.get("std") or IMAGENET_DEFAULT_STD),
    )
    return {
        "spec": spec,
        "loaded": {"pos_embed": None} if resampled(model) and position is not None else {},
        "patch_weight": _identity(blocks[0].qkv.weight) if stem_alone else embed.proj.weight,
        "patch_bias": None if stem_alone else embed.proj.bias,
        "patch_norm": norm(getattr(embed, "norm", None)),
        "stem": Stem(embed.backbone) if hybrid else None,
        "cls_token": model.cls_token,
        "registers": getattr(model, "reg_token", None),
        "pos_embed": position,
        "norm_pre": norm(getattr(model, "norm_pre", None)),
        "blocks": blocks,
        "norm": norm(model.norm),
        "map_pool": map_pool(getattr(model, "attn_pool", None)),
        "fc_norm": norm(model.fc_norm),
        "head": None if isinstance(model.head, nn.Identity) else dense(model.head),
    }


def _identity(like: torch.Tensor) -> torch.Tensor:
    """The projection (D, D, 1, 1) that changes nothing, for rows as wide as those that `like` (out, D) reads."""
    return torch.eye(like.shape[1]).to(like)[:, :, None, None]


def pool_of(model: Any) -> str:
    """Return the readout of the model's own head."""
    if model.global_pool not in _POOLS:
        refuse("global_pool", repr(model.global_pool), "'token', 'avg' or 'map'")
    return _POOLS[model.global_pool]


def resampled(model: Any) -> bool:
    """Whether the model is built for another image size than its published weights.

    If so, timm has resampled all loaded tensors that depend on the size.
    """
    cfg, built = getattr(model, "pretrained_cfg", None) or {}, tuple(model.patch_embed.img_size)
    return bool(cfg.get("resampled")) or tuple(cfg.get("input_size") or (3, *built))[1:] != built


def norm(module: Any) -> Norm | None:
    """Convert a norm layer, or return None for an Identity."""
    if module is None or isinstance(module, nn.Identity):
        return None
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if type(module) in (tl.LayerNorm, tl.LayerNormFp32, nn.LayerNorm):
        kind = "layernorm"
    elif type(module) in (tl.RmsNorm, tl.RmsNormFp32, nn.RMSNorm):
        kind = "rmsnorm"
    else:
        refuse("norm layer", type(module).__name__, "LayerNorm, RmsNorm")
    eps = module.eps if module.eps is not None else torch.finfo(torch.float32).eps
    return Norm(
        kind, module.normalized_shape[0], eps, weight, bias, upcast=type(module) in (tl.LayerNormFp32, tl.RmsNormFp32)
    )


def block_norm(module: nn.Module) -> Norm:
    """Convert a norm layer that must not be an Identity."""
    layer = norm(module)
    if layer is None:
        refuse("a block's norm layer", "Identity", "LayerNorm, RmsNorm")
    return layer


def dense(module: nn.Module) -> Dense:
    """Convert a Linear."""
    if type(module) is not nn.Linear:
        refuse("linear layer", type(module).__name__, "nn.Linear")
    return Dense(module.weight, module.bias)


def mlp(module: nn.Module) -> Mlp:
    """Convert timm's Mlp, GluMlp or SwiGLU."""
    if type(module) is tl.SwiGLU:
        # two separate products, stacked as [gate, value]
        weight = torch.cat([module.fc1_g.weight, module.fc1_x.weight])
        bias = None if module.fc1_g.bias is None else torch.cat([module.fc1_g.bias, module.fc1_x.bias])
        fc1, glu = Dense(weight, bias), "first"
    elif type(module) is tl.GluMlp:
        fc1, glu = dense(module.fc1), "last" if module.gate_last else "first"
    elif type(module) is tl.Mlp:
        fc1, glu = dense(module.fc1), "none"
    else:
        refuse("mlp layer", type(module).__name__, "Mlp, GluMlp, SwiGLU")
    return Mlp(fc1, dense(module.fc2), activation(module.act, _ACTIVATIONS), norm(module.norm), glu)


def layer_scale(module: Any) -> torch.Tensor | None:
    """Return LayerScale's factors, or None for an Identity."""
    return None if isinstance(module, nn.Identity) else module.gamma


def map_pool(module: Any) -> MapPool | None:
    """Convert attention pooling with one latent, if there is any."""
    if module is None:
        return None
    if (
        type(module) is not tl.AttentionPoolLatent
        or module.pos_embed is not None
        or module.latent_len != 1
        or module.mlp is None
    ):
        refuse("attention pool", type(module).__name__, "AttentionPoolLatent with one latent")
    return MapPool(
        latent=module.latent,
        q=None if isinstance(module.q, nn.Identity) else dense(module.q),
        kv=dense(module.kv),
        proj=dense(module.proj),
        norm=norm(module.norm),
        mlp=mlp(module.mlp),
        num_heads=module.num_heads,
        q_norm=norm(module.q_norm),
        k_norm=norm(module.k_norm),
    )
