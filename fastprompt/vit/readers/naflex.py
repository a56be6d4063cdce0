"""Reader for timm's `NaFlexVit`, whose images have any shape there and one size here."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from torch import Tensor

from fastprompt.vit.readers import eva, timm_layers as layers
from fastprompt.vit.readers.parts import refuse
from fastprompt.vit.weights import Block, ViTSpec


def read(model: Any, blocks: list[Block]) -> dict[str, Any]:
    """Read the canonical parts of a timm `NaFlexVit`, whose blocks are read; see `FrozenViT`.

    Images have the size that the model was built for, else that of its published weights, else that of its position
    embedding.

    Raises:
        ValueError: a part that cannot be represented. The error names it.
    """
    embeds, cfg = model.embeds, getattr(model, "pretrained_cfg", None) or {}
    pool, patch = layers.pool_of(model), embeds.patch_size
    if patch[0] != patch[1]:
        refuse("patch_size", str(tuple(patch)), "square patches")
    if embeds.norm_input is not None:
        refuse("embeds.norm_input", type(embeds.norm_input).__name__, "pixels without a norm of their own")
    if embeds.pos_embed_grid_size is None:
        refuse("img_size", "None", "a model built with an image size or a grid of positions")
    if not blocks:
        refuse("depth", "0", "at least one block")
    grid = tuple(embeds.pos_embed_grid_size)
    native = (grid[0] * patch[0], grid[1] * patch[1])
    position, rule = _position(embeds)
    spec = ViTSpec(
        name=cfg.get("architecture") or type(model).__name__,
        image_size=native,
        grid=grid,
        patch_size=patch[0],
        num_heads=blocks[0].num_heads,
        has_cls=embeds.cls_token is not None,
        num_registers=embeds.num_reg_tokens,
        pool=pool,
        pos_on_prefix=False,
        pool_prefix=bool(model.pool_include_prefix),
        mean=tuple(cfg.get("mean") or IMAGENET_INCEPTION_MEAN),
        std=tuple(cfg.get("std") or IMAGENET_INCEPTION_STD),
    )
    parts = {
        "spec": spec,
        "own_size": native if embeds.default_img_size else tuple((cfg.get("input_size") or (3, *native))[1:]),
        "resampling": rule,
        "loaded": {},
        "patch_weight": _patch_weight(embeds),
        "patch_bias": embeds.proj.bias,
        "patch_norm": layers.norm(embeds.norm),
        "cls_token": embeds.cls_token,
        "registers": embeds.reg_token,
        "pos_embed": position,
        "norm_pre": layers.norm(model.norm_pre),
        "blocks": blocks,
        "norm": layers.norm(model.norm),
        "map_pool": layers.map_pool(model.attn_pool),
        "fc_norm": layers.norm(model.fc_norm),
        "head": None if isinstance(model.head, nn.Identity) else layers.dense(model.head),
    }
    return parts if model.rope is None else eva.with_rotation(parts, model.rope, grid, model.blocks[0].attn)


def _patch_weight(embeds: Any) -> Tensor:
    """The projection (D, C, p, p) of patches: convolved, or flattened with channels last or first."""
    if not embeds.is_linear:
        return embeds.proj.weight
    weight, sides = layers.dense(embeds.proj).weight, tuple(embeds.patch_size)
    if getattr(embeds, "channels_last", True):
        return weight.unflatten(1, (*sides, -1)).permute(0, 3, 1, 2)
    return weight.unflatten(1, (-1, *sides))


def _position(embeds: Any) -> tuple[Tensor | None, dict[str, Any]]:
    """The position embedding (1, N, D), and how it is resampled: apart for rows and columns if it is factorized."""
    square = {"square": True} if embeds.pos_embed_ar_preserving else {}
    if embeds.pos_embed_y is not None:
        if square and embeds.pos_embed_y.shape != embeds.pos_embed_x.shape:  # resampled even for its own grid
            refuse("pos_embed_grid_size", str(embeds.pos_embed_grid_size), "a square for factorized positions")
        apart = embeds.pos_embed_y.unsqueeze(2) + embeds.pos_embed_x.unsqueeze(1)  # (1, rows, columns, D)
        return apart.flatten(1, 2), {"mode": "bilinear", "antialias": False, "align_corners": False, **square}
    rule = {
        "mode": embeds.pos_embed_interp_mode,
        "antialias": getattr(embeds, "pos_embed_antialias", True),
        "align_corners": getattr(embeds, "pos_embed_align_corners", False),
        **square,
    }
    return None if embeds.pos_embed is None else embeds.pos_embed.flatten(1, 2), rule
