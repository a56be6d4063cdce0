"""Reader for timm's `SwinTransformer` and `SwinTransformerV2`."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn as nn
from timm import layers as tl
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import swin_transformer as v1, swin_transformer_v2 as v2
from torch import Tensor

from fastprompt.arguments import ArgumentError
from fastprompt.vit.readers import timm_layers as layers
from fastprompt.vit.readers.parts import loaded_as, refuse
from fastprompt.vit.readers.timm_layers import block_norm, dense, mlp, norm
from fastprompt.vit.swin import Merge, SwinBlock
from fastprompt.vit.weights import Dense, ViTSpec

MODELS = (v1.SwinTransformer, v2.SwinTransformerV2)
_MAX_LOGIT_SCALE = 100.0


def read(model: Any, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Read the canonical parts of a timm Swin transformer; see `FrozenSwin`.

    Args:
        image_size: (height, width) in pixels. Windows and bias tables change as with timm's `set_input_size`, which
            keeps the number of windows (`FrozenViT.from_timm(name, image_size=...)` keeps their size).

    Raises:
        ValueError: another timm class (`swinv2_cr_*`), or a part that cannot be represented. The error names it.
    """
    if type(model) not in MODELS:
        refuse("model", f"{type(model).__name__} of {type(model).__module__}", "SwinTransformer, SwinTransformerV2")
    before, embed = model, model.patch_embed
    if type(embed) is not tl.PatchEmbed:
        refuse("patch_embed", type(embed).__name__, "PatchEmbed")
    patch = tuple(embed.patch_size)
    if patch[0] != patch[1]:
        refuse("patch_size", str(patch), "square patches")
    if image_size is not None and tuple(embed.img_size) != image_size:
        if any(side % patch[0] for side in image_size):
            raise ArgumentError(
                "image_size",
                f"must have sides that are multiples of the patch size {patch[0]}, "
                f"got {image_size[0]} x {image_size[1]}",
            )
        before, model = model, copy.deepcopy(model)
        model.set_input_size(img_size=image_size)
        embed = model.patch_embed
    if min(embed.grid_size) < 1:
        refuse("img_size", f"{tuple(embed.img_size)}", f"at least one patch of {patch[0]} pixels")
    if (embed.proj.kernel_size, embed.proj.stride, embed.proj.padding) != (patch, patch, (0, 0)):
        refuse("patch_embed.proj", str(embed.proj), "patches side by side")
    if embed.proj.in_channels != 3:
        refuse("in_chans", str(embed.proj.in_channels), "3")
    pool = model.head.global_pool.pool_type
    if pool != "avg":
        refuse("global_pool", repr(pool), "'avg'")
    if any(not len(stage.blocks) for stage in model.layers):
        refuse("depths", str(tuple(len(stage.blocks) for stage in model.layers)), "at least one block in each stage")

    blocks: list[SwinBlock] = []
    merges: list[Merge | None] = []
    for stage in model.layers:
        merges += [_merge(stage.downsample), *[None] * (len(stage.blocks) - 1)]
        blocks += [_block(block) for block in stage.blocks]
    cfg = getattr(model, "pretrained_cfg", None) or {}
    spec = ViTSpec(
        name=cfg.get("architecture") or type(model).__name__,
        image_size=tuple(embed.img_size),
        grid=tuple(embed.grid_size),
        patch_size=patch[0],
        num_heads=blocks[0].num_heads,
        has_cls=False,
        num_registers=0,
        pool="patches",
        dynamic_size=not embed.strict_img_size,
        mean=tuple(cfg.get("mean") or IMAGENET_DEFAULT_MEAN),
        std=tuple(cfg.get("std") or IMAGENET_DEFAULT_STD),
    )
    head = model.head.fc
    return {
        "spec": spec,
        "loaded": _loaded(before, model),
        "patch_weight": embed.proj.weight,
        "patch_bias": embed.proj.bias,
        "patch_norm": norm(embed.norm),
        "cls_token": None,
        "registers": None,
        "pos_embed": None,
        "blocks": blocks,
        "merges": merges,
        "norm": norm(model.norm),
        "head": None if isinstance(head, nn.Identity) else dense(head),
    }


def _loaded(before: Any, model: Any) -> dict[str, str | None]:
    """Return what the fingerprint hashes for the computed tensors; None for those that timm had already resampled."""
    loaded: dict[str, str | None] = {}
    attentions = [[block.attn for stage in each.layers for block in stage.blocks] for each in (before, model)]
    for i, (old, new) in enumerate(zip(*attentions, strict=True)):
        window = {"window": _pair(old.window_size), "to": _pair(new.window_size)}
        if type(model) is v2.SwinTransformerV2:
            window["pretrained"] = _pair(new.pretrained_window_size)
            loaded[f"blocks.{i}.bias_table"] = loaded_as(*old.cpb_mlp.parameters(), **window)
            loaded[f"blocks.{i}.logit_scale"] = loaded_as(old.logit_scale)
        elif layers.resampled(before):
            loaded[f"blocks.{i}.bias_table"] = None
        elif window["window"] != window["to"]:
            loaded[f"blocks.{i}.bias_table"] = loaded_as(old.relative_position_bias_table, **window)
    return loaded


def _merge(module: Any) -> Merge | None:
    if isinstance(module, nn.Identity):
        return None
    if type(module) not in (v1.PatchMerging, v2.PatchMerging):
        refuse("downsample", type(module).__name__, "PatchMerging")
    return Merge(norm(module.norm), dense(module.reduction), norm_first=type(module) is v1.PatchMerging)


def _block(block: Any) -> SwinBlock:
    if type(block) not in (v1.SwinTransformerBlock, v2.SwinTransformerV2Block):
        refuse("block", type(block).__name__, "SwinTransformerBlock, SwinTransformerV2Block")
    attn = block.attn
    if type(attn) not in (v1.WindowAttention, v2.WindowAttention):
        refuse("attention layer", type(attn).__name__, "WindowAttention")
    second = type(block) is v2.SwinTransformerV2Block
    bias: Tensor | None = attn.qkv.bias
    if second and attn.q_bias is not None:
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    dense(attn.qkv)
    return SwinBlock(
        norm1=block_norm(block.norm1),
        qkv=Dense(attn.qkv.weight, bias),
        proj=dense(attn.proj),
        norm2=block_norm(block.norm2),
        mlp=mlp(block.mlp),
        num_heads=attn.num_heads,
        grid=_pair(block.input_resolution),
        window=_pair(block.window_size),
        shift=_pair(block.shift_size),
        bias_table=_continuous_bias(attn) if second else attn.relative_position_bias_table,
        logit_scale=attn.logit_scale.exp().clamp(max=_MAX_LOGIT_SCALE) if second else None,
        post_norm=second,
    )


@torch.no_grad()
def _continuous_bias(attn: Any) -> Tensor:
    """Compute ((2h − 1)(2w − 1), heads): swinv2's bias for each offset, 16 · sigmoid of its MLP on log coordinates."""
    return 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).flatten(0, -2))


def _pair(sides: Any) -> tuple[int, int]:
    return int(sides[0]), int(sides[1])
