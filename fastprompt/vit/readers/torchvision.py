"""Reader for torchvision's `VisionTransformer` (vit_b_16, vit_l_16, vit_h_14, ...)."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torchvision import models
from torchvision.models import vision_transformer as vt

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.vit.readers.parts import (
    IMAGENET,
    activation,
    attention,
    classifier,
    dense,
    patch_size,
    refuse,
    torch_norm,
)
from fastprompt.vit.weights import Block, Dense, Mlp, ViTSpec


def build(name: str, pretrained: bool | str = False, **kwargs: Any) -> nn.Module:
    """Build a torchvision model by name.

    Args:
        pretrained: load the default published weights, or those with this name ("IMAGENET1K_SWAG_E2E_V1").
        kwargs: passed to `torchvision.models.get_model`.

    Raises:
        TypeError, ValueError: torchvision does not know `name` or `pretrained`.
    """
    if not isinstance(name, str):
        raise ArgumentTypeError(
            "name",
            f"must be a torchvision model name, got {type(name).__name__}; "
            "a torchvision module goes to FrozenViT(module)",
        )
    if name not in models.list_models():
        known = [n for n in models.list_models() if n.startswith("vit_")]
        raise ArgumentError("name", f"must be a torchvision model name ({', '.join(known)}), got {name!r}")
    if not isinstance(pretrained, (bool, str)):
        raise ArgumentTypeError("pretrained", f"must be a bool or the name of weights, got {type(pretrained).__name__}")
    if isinstance(pretrained, str):
        weights = {w.name for w in models.get_model_weights(name)} | {"DEFAULT"}
        if pretrained not in weights:
            raise ArgumentError("pretrained", f"must be one of {sorted(weights)} for {name!r}, got {pretrained!r}")
        return models.get_model(name, weights=pretrained, **kwargs)
    return models.get_model(name, weights="DEFAULT" if pretrained else None, **kwargs)


def read(model: Any) -> dict[str, Any]:
    """Read the canonical parts of a torchvision `VisionTransformer`; see `FrozenViT`.

    `backbone(images)` equals `model(images)`: the logits, or the class token if `model.heads` is an Identity.
    Another `image_size` resamples as torchvision's `interpolate_embeddings` does (bicubic, corners aligned).

    Raises:
        ValueError: another class, or a part that cannot be represented (convolutional stems, heads with a hidden
            layer, ...). The error names it.
    """
    if type(model) is not vt.VisionTransformer:
        refuse("model", f"{type(model).__name__} of {type(model).__module__}", "torchvision's VisionTransformer")
    patch = patch_size(model.conv_proj)
    blocks = [_block(block) for block in model.encoder.layers]
    side = model.image_size
    spec = ViTSpec(
        name=type(model).__name__,
        image_size=(side, side),
        grid=(side // patch, side // patch),
        patch_size=patch,
        num_heads=blocks[0].num_heads,
        has_cls=True,
        num_registers=0,
        pool="cls",
        **IMAGENET,
    )
    return {
        "spec": spec,
        "resampling": {"antialias": False, "align_corners": True},
        "patch_weight": model.conv_proj.weight,
        "patch_bias": model.conv_proj.bias,
        "cls_token": model.class_token,
        "registers": None,
        "pos_embed": model.encoder.pos_embedding,
        "blocks": blocks,
        "norm": torch_norm(model.encoder.ln),
        "head": _head(model.heads),
    }


def _block(block: Any) -> Block:
    if type(block) is not vt.EncoderBlock:
        refuse("block", type(block).__name__, "EncoderBlock")
    layers = [layer for layer in block.mlp if not isinstance(layer, nn.Dropout)]
    if len(layers) != 3:
        refuse("mlp layer", f"{len(layers)} layers", "Linear, activation, Linear")
    mlp = Mlp(dense(layers[0]), dense(layers[2]), activation(layers[1]))
    return Block(norm1=torch_norm(block.ln_1), norm2=torch_norm(block.ln_2), mlp=mlp, **attention(block.self_attention))


def _head(heads: Any) -> Dense | None:
    if not isinstance(heads, nn.Sequential):
        return classifier(heads)
    layers = [layer for layer in heads if not isinstance(layer, (nn.Dropout, nn.Identity))]
    if len(layers) > 1:
        refuse("head", " → ".join(type(layer).__name__ for layer in layers), "one Linear")
    return dense(layers[0]) if layers else None
