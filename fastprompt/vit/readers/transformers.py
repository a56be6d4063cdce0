"""Reader for transformers' ViT, DeiT, ViT-MAE, BEiT, CLIP, SigLIP, SigLIP 2, DINOv2 and DINOv3 vision models.

A model instance is recognised by its class names, so reading it does not import transformers.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.vit.readers.parts import (
    CLIP,
    HALF,
    IMAGENET,
    activation,
    attention,
    classifier,
    dense,
    loaded_as,
    patch_size,
    refuse,
    relative_bias,
    stacked,
    torch_norm,
)
from fastprompt.vit.weights import Block, Dense, MapPool, Mlp, Rotary, ViTSpec

_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
    "MishActivation": "mish",
    "LinearActivation": "identity",
}
# For a model with text: its image tower. For a checkpoint: the class that returns the head's output.
_TOWERS = {
    "CLIPModel": "CLIPVisionModelWithProjection",
    "SiglipModel": "SiglipVisionModel",
    "Siglip2Model": "Siglip2VisionModel",
}
_OF_TYPE = {
    "vit": "ViTModel",
    "clip": "CLIPVisionModelWithProjection",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2": "Siglip2VisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
    "deit": "DeiTModel",
    "vit_mae": "ViTMAEModel",
    "beit": "BeitModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}


_FAMILIES = (
    "ViT",
    "DeiT",
    "ViTMAE",
    "Beit",
    "CLIP",
    "Siglip",
    "Siglip2",
    "Dinov2",
    "Dinov2WithRegisters",
)  # prefixes of the class names of layers


def build(model: Any, pretrained: bool = True, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Build a transformers vision model; return it and the mean and std that come with its weights.

    Args:
        model: a hub name, a folder of `save_pretrained`, or a config.
        pretrained: load the weights of the hub or folder; False: random ones, as for a config.
        kwargs: passed to `from_pretrained` (revision, cache_dir, local_files_only, ...); a config takes none.

    Raises:
        TypeError, ValueError: `model` is none of these or an unsupported type of model, or `pretrained` does not fit.
    """
    import transformers

    if not isinstance(pretrained, bool):
        raise ArgumentTypeError("pretrained", f"must be a bool, got {pretrained!r}")
    if isinstance(model, transformers.PretrainedConfig):
        if kwargs:
            raise ValueError(f"a config takes no options of from_pretrained, got {sorted(kwargs)}")
        config, name = copy.deepcopy(model), None
    elif isinstance(model, (str, os.PathLike)):
        name = os.fspath(model)
        config = transformers.AutoConfig.from_pretrained(name, **kwargs)
    else:
        raise ArgumentTypeError(
            "model", f"must be a transformers model, its config, a hub name or a folder, got {type(model).__name__}"
        )
    if config.model_type not in _OF_TYPE:
        raise ArgumentError("model", f"must be of type {', '.join(_OF_TYPE)}, got {config.model_type!r}")
    architecture = (getattr(config, "architectures", None) or [_OF_TYPE[config.model_type]])[0]
    architecture = _TOWERS.get(architecture, architecture)
    if architecture not in _READERS:
        architecture = _OF_TYPE[config.model_type]
    kind = getattr(transformers, architecture)
    if name is not None and pretrained:
        kwargs.setdefault("dtype", torch.float32)
        return kind.from_pretrained(name, **kwargs), _statistics(name, kwargs)
    statistics = {} if name is None else _statistics(name, kwargs)
    if hasattr(config, "vision_config") and kind.config_class is not type(config):
        projection = getattr(config, "projection_dim", None)
        config = config.vision_config
        if projection is not None:
            config.projection_dim = projection
    return kind._from_config(config), statistics


def _statistics(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return mean and std of the checkpoint's image processor; {} if it has none."""
    from transformers.image_processing_base import ImageProcessingMixin

    keys = ("revision", "cache_dir", "local_files_only", "token", "subfolder", "force_download", "proxies")
    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(name, **{k: options[k] for k in keys if k in options})
    except OSError:
        return {}
    if config.get("do_normalize", True) is False:
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return {key: config[f"image_{key}"] for key in ("mean", "std") if config.get(f"image_{key}")}


def read(model: Any) -> dict[str, Any]:
    """Read the canonical parts of a transformers vision model; see `FrozenViT`.

    `backbone(images)` equals the output listed here, and `backbone.head` is the head that produces it:

    * `ViTForImageClassification`: `logits`. `ViTModel`: the class token of `last_hidden_state`, which
      `ViTForImageClassification` classifies; the pooler (a tanh layer, untrained in most checkpoints) is left out.
    * `CLIPVisionModelWithProjection`: `image_embeds`. `CLIPModel`: the same, `get_image_features`.
      `CLIPVisionModel`: `pooler_output`. `CLIPForImageClassification`: `logits`.
    * `SiglipVisionModel`, and the one in a `SiglipModel`: `pooler_output` of attention pooling, or, without that
      head, the mean of `last_hidden_state`. `SiglipForImageClassification`: `logits` (of that mean).
    * `Siglip2VisionModel`, and the one in a `Siglip2Model`: the same, for images of the size that the position
      embedding is for, cut into patches here. `Siglip2ForImageClassification`: `logits`.
    * `DeiTModel`: the class token. `DeiTForImageClassification`, `DeiTForImageClassificationWithTeacher`: `logits`.
    * `ViTMAEModel`: the class token, of all patches instead of a random part.
    * `BeitModel`: `pooler_output`. `BeitForImageClassification`: `logits`.
    * `Dinov2Model`, `Dinov2WithRegistersModel`, `DINOv3ViTModel`: `pooler_output`, the class token.

    mean and std are CLIP's for CLIP, ImageNet's for DINOv2, DINOv3, DeiT and ViT-MAE and 0.5 for ViT, BEiT and SigLIP.
    Another `image_size` resamples as transformers does with `interpolate_pos_encoding=True` (bicubic; antialiased only
    for DINOv2 with registers; SigLIP 2: bilinear and antialiased).

    Raises:
        ValueError: another class, or a part that cannot be represented. The error names it.
    """
    name = type(model).__name__
    if not type(model).__module__.startswith("transformers.models.") or name not in _READERS:
        hint = (
            "; its classifier reads the class token and the patches' average: give its Dinov2Model"
            if name.startswith("Dinov2") and name.endswith("ForImageClassification")
            else ""
        )
        refuse("model", f"{name} of {type(model).__module__}", ", ".join(_READERS) + hint)
    try:
        parts = _READERS[name](model)
    except AttributeError as error:
        import transformers

        raise ValueError(
            f"this model cannot be frozen: {name} of transformers {transformers.__version__} is laid out "
            f"in another way than the reader knows, that of 5.23 ({error})"
        ) from error
    path = getattr(model.config, "name_or_path", "") or name
    parts["spec"] = ViTSpec(
        name=Path(path).name if os.path.isdir(path) else path, num_heads=parts["blocks"][0].num_heads, **parts["spec"]
    )
    return parts


def _embeddings(embeddings: Any, conv: Any, statistics: dict[str, Any], size: Any = None) -> dict[str, Any]:
    """Return the parts before the first block, and the known fields of the spec. `size`: of images, if it is known."""
    patch, size = patch_size(conv), getattr(embeddings, "image_size", None) if size is None else size
    if size is None:
        size = embeddings.patch_embeddings.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    if hasattr(embeddings, "position_embedding"):
        pos = embeddings.position_embedding.weight.unsqueeze(0)
    else:
        pos = getattr(embeddings, "position_embeddings", None)
    cls_token = getattr(embeddings, "cls_token", None)
    if hasattr(embeddings, "class_embedding"):
        cls_token = embeddings.class_embedding.view(1, 1, -1)
    return {
        "spec": {
            "image_size": (height, width),
            "grid": (height // patch, width // patch),
            "patch_size": patch,
            "has_cls": cls_token is not None,
            "num_registers": 0,
            "pool": "cls",
            **statistics,
        },
        "patch_weight": conv.weight,
        "patch_bias": conv.bias,
        "cls_token": cls_token,
        "registers": None,
        "pos_embed": pos,
        "resampling": {"antialias": False, "align_corners": False},
    }


def _check(module: Any, *takes: str) -> None:
    if type(module).__name__ not in takes:
        refuse("layer", type(module).__name__, ", ".join(takes))


def _head(model: Any) -> Dense | None:
    return classifier(model.classifier) if hasattr(model, "classifier") else None


def _act(module: Any) -> str:
    if type(module).__module__ == "transformers.activations" and type(module).__name__ in _ACTIVATIONS:
        return _ACTIVATIONS[type(module).__name__]
    return activation(module)


def _mlp(module: Any) -> Mlp:
    name = type(module).__name__
    if name in ("Dinov2SwiGLUFFN", "Dinov2WithRegistersSwiGLUFFN", "DINOv3ViTGatedMLP"):
        return Mlp(stacked(module.gate_proj, module.up_proj), dense(module.down_proj), _act(module.act_fn), glu="first")
    if name == "DINOv3ViTMLP":
        return Mlp(dense(module.up_proj), dense(module.down_proj), _act(module.act_fn))
    _check(module, *(f"{family}MLP" for family in _FAMILIES))
    return Mlp(dense(module.fc1), dense(module.fc2), _act(module.activation_fn))


def _qkv(attn: Any) -> dict[str, Any]:
    _check(attn, *(f"{family}Attention" for family in _FAMILIES), "DINOv3ViTAttention")
    heads = next(getattr(attn, name) for name in ("num_heads", "num_attention_heads") if hasattr(attn, name))
    return {
        "qkv": stacked(attn.q_proj, attn.k_proj, attn.v_proj),
        "proj": dense(attn.out_proj if hasattr(attn, "out_proj") else attn.o_proj),
        "num_heads": heads,
    }


def _block(layer: Any, **parts: Any) -> Block:
    layers = (f"{family}{kind}" for family in _FAMILIES for kind in ("Layer", "EncoderLayer"))
    _check(layer, *layers, "DINOv3ViTLayer")
    mlp = _mlp(layer.mlp)
    if hasattr(layer, "layernorm_before"):
        return Block(
            norm1=torch_norm(layer.layernorm_before),
            norm2=torch_norm(layer.layernorm_after),
            mlp=mlp,
            **_qkv(layer.attention),
            **parts,
        )
    if hasattr(layer, "layer_scale1"):
        scales = ("Dinov2LayerScale", "Dinov2WithRegistersLayerScale", "DINOv3ViTLayerScale")
        _check(layer.layer_scale1, *scales)
        _check(layer.layer_scale2, *scales)
        return Block(
            norm1=torch_norm(layer.norm1),
            norm2=torch_norm(layer.norm2),
            mlp=mlp,
            ls1=layer.layer_scale1.lambda1,
            ls2=layer.layer_scale2.lambda1,
            **_qkv(layer.attention),
            **parts,
        )
    return Block(
        norm1=torch_norm(layer.layer_norm1), norm2=torch_norm(layer.layer_norm2), mlp=mlp, **_qkv(layer.self_attn)
    )


def _map_pool(head: Any) -> MapPool:
    _check(head, "SiglipMultiheadAttentionPoolingHead", "Siglip2MultiheadAttentionPoolingHead")
    parts = attention(head.attention)
    q, kv = _split(parts["qkv"], head.probe.shape[-1])
    return MapPool(
        latent=head.probe,
        q=q,
        kv=kv,
        proj=parts["proj"],
        norm=torch_norm(head.layernorm),
        mlp=_mlp(head.mlp),
        num_heads=parts["num_heads"],
    )


def _split(qkv: Dense, width: int) -> tuple[Dense, Dense]:
    bias = (None, None) if qkv.bias is None else (qkv.bias[:width], qkv.bias[width:])
    return Dense(qkv.weight[:width], bias[0]), Dense(qkv.weight[width:], bias[1])


def _vit(model: Any) -> dict[str, Any]:
    tower = model.vit if hasattr(model, "vit") else model
    return {
        **_embeddings(tower.embeddings, tower.embeddings.patch_embeddings.projection, HALF),
        "blocks": [_block(layer) for layer in tower.layers],
        "norm": torch_norm(tower.layernorm),
        "head": _head(model),
    }


def _deit(model: Any) -> dict[str, Any]:
    tower = model.deit if hasattr(model, "deit") else model
    parts = _embeddings(tower.embeddings, tower.embeddings.patch_embeddings.projection, IMAGENET)
    parts["spec"]["num_registers"] = 1
    parts.update(
        registers=tower.embeddings.distillation_token,
        blocks=[_block(layer) for layer in tower.layers],
        norm=torch_norm(tower.layernorm),
        head=_head(model),
    )
    if hasattr(model, "distillation_classifier"):
        parts["spec"]["pool"] = "cls+dist"
        parts.update(head=classifier(model.cls_classifier), head_dist=classifier(model.distillation_classifier))
    return parts


def _mae(model: Any) -> dict[str, Any]:
    return {
        **_embeddings(model.embeddings, model.embeddings.patch_embeddings.projection, IMAGENET),
        "blocks": [_block(layer) for layer in model.layers],
        "norm": torch_norm(model.layernorm),
        "head": None,
    }


def _beit(model: Any) -> dict[str, Any]:
    tower = model.beit if hasattr(model, "beit") else model
    parts = _embeddings(tower.embeddings, tower.embeddings.patch_embeddings.projection, HALF)
    grid, shared = parts["spec"]["grid"], tower.shared_position_bias
    biases = [[bias for bias in (layer.relative_position_bias, shared) if bias is not None] for layer in tower.layers]
    if grid[0] != grid[1] and any(biases):
        refuse("image_size", f"{parts['spec']['image_size']}", "a square, for a relative position bias")

    def block(layer: Any, biases: list[Any]) -> Block:
        ls1, ls2 = (x if isinstance(x, torch.Tensor) else None for x in (layer.lambda_1, layer.lambda_2))
        tables = [bias.relative_position_bias_table for bias in biases]
        return _block(layer, ls1=ls1, ls2=ls2, bias=relative_bias(*tables, grid=grid) if tables else None)

    parts["blocks"] = [block(layer, of_layer) for layer, of_layer in zip(tower.layers, biases, strict=True)]
    pooled = tower.config.use_mean_pooling
    parts["spec"]["pool"] = "patches" if pooled else "cls"
    if pooled:
        norm = None if tower.pooler is None else torch_norm(tower.pooler.layernorm)
        return {**parts, "norm": None, "fc_norm": norm, "head": _head(model)}
    return {**parts, "norm": torch_norm(tower.layernorm), "head": _head(model)}


def _siglip2(model: Any) -> dict[str, Any]:
    tower = model.vision_model if hasattr(model, "vision_model") else model
    embeddings, linear = tower.embeddings, dense(tower.embeddings.patch_embedding)
    patch, side = embeddings.patch_size, embeddings.position_embedding_size
    if side * side != embeddings.num_patches:
        refuse("num_patches", str(embeddings.num_patches), "a square number")
    classifies = type(model).__name__ == "Siglip2ForImageClassification"
    pooled = tower.use_head and not classifies
    return {
        "spec": {
            "image_size": (side * patch, side * patch),
            "grid": (side, side),
            "patch_size": patch,
            "has_cls": False,
            "num_registers": 0,
            "pool": "map" if pooled else "patches",
            **HALF,
        },
        "patch_weight": linear.weight.unflatten(1, (patch, patch, -1)).permute(0, 3, 1, 2),  # of (row, column, channel)
        "patch_bias": linear.bias,
        "cls_token": None,
        "registers": None,
        "pos_embed": embeddings.position_embedding.weight.unsqueeze(0),
        "resampling": {"mode": "bilinear", "antialias": True, "align_corners": False},
        "blocks": [_block(layer) for layer in tower.encoder.layers],
        "norm": torch_norm(tower.post_layernorm),
        "map_pool": _map_pool(tower.head) if pooled else None,
        "head": _head(model),
    }


def _dinov3(model: Any) -> dict[str, Any]:
    embeddings, angles = model.embeddings, model.rope_embeddings
    parts = _embeddings(embeddings, embeddings.patch_embeddings, IMAGENET, model.config.image_size)
    (height, width), grid, registers = parts["spec"]["image_size"], parts["spec"]["grid"], embeddings.register_tokens
    parts["spec"]["num_registers"] = registers.shape[1]
    with torch.no_grad():
        cos, sin = angles(parts["patch_weight"].new_empty(1, 1, height, width))  # (N, d), each angle twice
    half, none = sin.shape[-1] // 2, torch.zeros_like(angles.inv_freq)
    frequencies = torch.stack([torch.cat([angles.inv_freq, none]), torch.cat([none, angles.inv_freq])])
    table = loaded_as(grid=grid, rule="DINOv3")
    return {
        **parts,
        "registers": registers if registers.shape[1] else None,
        "rotary": Rotary(
            frequencies[:, None, None], sin[None, None, :, :half], cos[None, None, :, :half], centred=True
        ),
        "loaded": {"rotary.frequencies": None, "rotary.sin": table, "rotary.cos": table},
        "blocks": [_block(layer, rotary=True) for layer in model.model.layer],
        "norm": torch_norm(model.norm),
        "head": None,
    }


def _dinov2(model: Any) -> dict[str, Any]:
    embeddings = model.embeddings
    parts = _embeddings(embeddings, embeddings.patch_embeddings.projection, IMAGENET)
    spec = parts["spec"]
    if spec["grid"][0] != spec["grid"][1]:
        refuse("image_size", f"{spec['image_size']} in its config", "a square, of which transformers resamples others")
    registers = getattr(embeddings, "register_tokens", None)
    if registers is not None:
        # registers follow the class token and have no position embedding; the class token's is added to it once
        pos = parts["pos_embed"]
        parts.update(cls_token=parts["cls_token"] + pos[:, :1], pos_embed=pos[:, 1:], registers=registers)
        spec.update(num_registers=registers.shape[1], pos_on_prefix=False)
        parts["resampling"] = {"antialias": True, "align_corners": False}
        if registers.shape[1] == 0:
            parts["registers"] = None
    blocks = [_block(layer) for layer in model.encoder.layer]
    return {**parts, "blocks": blocks, "norm": torch_norm(model.layernorm), "head": None}


def _clip(model: Any) -> dict[str, Any]:
    tower = model.vision_model if hasattr(model, "vision_model") else model
    parts = _embeddings(tower.embeddings, tower.embeddings.patch_embedding, CLIP)
    parts.update(blocks=[_block(layer) for layer in tower.encoder.layers], norm_pre=torch_norm(tower.pre_layrnorm))
    if type(model).__name__ == "CLIPForImageClassification":
        # the mean of the last block's patches, without the norm that is applied to the class token
        parts["spec"]["pool"] = "patches"
        return {**parts, "norm": None, "head": _head(model)}
    head = dense(model.visual_projection) if tower is not model else None
    return {**parts, "norm": torch_norm(tower.post_layernorm), "head": head}


def _siglip(model: Any) -> dict[str, Any]:
    tower = model.vision_model if hasattr(model, "vision_model") else model
    parts = _embeddings(tower.embeddings, tower.embeddings.patch_embedding, HALF)
    parts.update(blocks=[_block(layer) for layer in tower.encoder.layers], norm=torch_norm(tower.post_layernorm))
    parts["head"] = _head(model)
    classifies = type(model).__name__ == "SiglipForImageClassification"
    if tower.use_head and not classifies:
        parts["spec"]["pool"], parts["map_pool"] = "map", _map_pool(tower.head)
    else:
        parts["spec"]["pool"] = "patches"
    return parts


_READERS = {
    "ViTModel": _vit,
    "ViTForImageClassification": _vit,
    "CLIPModel": _clip,
    "CLIPVisionModel": _clip,
    "CLIPVisionModelWithProjection": _clip,
    "CLIPForImageClassification": _clip,
    "DeiTModel": _deit,
    "DeiTForImageClassification": _deit,
    "DeiTForImageClassificationWithTeacher": _deit,
    "ViTMAEModel": _mae,
    "BeitModel": _beit,
    "BeitForImageClassification": _beit,
    "Siglip2Model": _siglip2,
    "Siglip2VisionModel": _siglip2,
    "Siglip2ForImageClassification": _siglip2,
    "SiglipModel": _siglip,
    "SiglipVisionModel": _siglip,
    "SiglipForImageClassification": _siglip,
    "Dinov2Model": _dinov2,
    "Dinov2WithRegistersModel": _dinov2,
    "DINOv3ViTModel": _dinov3,
}
