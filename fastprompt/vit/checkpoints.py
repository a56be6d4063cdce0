"""Read checkpoints as their authors publish them: timm models with the tensors of MAE, MoCo-v3, DINO and others.

Wrappers, prefixes and heads differ between authors. The tensors of the network itself have timm's names in all of them,
except JAX's, CLIP's and DINOv2's, which timm's own code renames.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fastprompt.arguments import ArgumentError
from fastprompt.vit.tensor_files import named_tensors, read_file

logger = logging.getLogger(__name__)
_WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "teacher"),
    *("state_dict", "model_state_dict", "model", "student"),
)
"""Keys under which published files keep a network's tensors, in order of preference. Like timm, this prefers averaged
weights; like DINO's evaluation, it prefers the teacher."""
_CHOSEN = {"base_encoder", "teacher"}
"""Networks to prefer if a state dict holds several; MoCo-v3 evaluates its base encoder."""
_PATCHES = "patch_embed.proj.weight"
_OTHER_PARTS = re.compile(
    r"(head\d*|heads|head_dist|projection_head|projector|predictor|decoder\w*|mask_token|masked_embed|pre_logits)(\..+)?"
    r"|(.+\.)?(relative_position_index|relative_coords_table|attn_mask)"
)
"""Tensors of published files that a frozen backbone does not have: non-linear heads, decoders, mask tokens from
pre-training, and tables computed from sizes."""
_JAX_PATCHES = "embedding/kernel"
_JAX = re.compile(
    r"Transformer/(encoderblock(_\d+)?/(LayerNorm|MlpBlock|MultiHeadDotProductAttention)_\d/.+"
    r"|encoder_norm/(scale|bias)|posembed_input/pos_embedding)"
    r"|embedding/(kernel|bias)|cls|pos_embedding|(head|pre_logits)/(kernel|bias)|MAPHead_0/.+"
)


def build(
    path: str | os.PathLike[str],
    arch: str,
    image_size: tuple[int, int] | None,
    checkpoint_key: str | None,
    options: Mapping[str, Any],
) -> tuple[nn.Module, tuple[int, int]]:
    """Build timm's model `arch` with the tensors of a published file; return it and the requested (height, width).

    A ViT keeps the file's position embedding at the file's size. A Swin transformer is built at the requested size.

    Raises:
        FileNotFoundError: no such file.
        TypeError, ValueError: the file cannot be read or does not hold such a model. The error names tensors that are
            missing, have a different shape, or have no counterpart.
    """
    if not isinstance(arch, str) or not timm.is_model(arch):
        raise ArgumentError("arch", f"must be a timm model name, got {arch!r}; timm.list_models() lists them")
    with torch.device("meta"):
        sketch = _create(arch, {**options, "num_classes": 0}, image_size)
    if not isinstance(sketch, (VisionTransformer, SwinTransformer, SwinTransformerV2)):
        raise ArgumentError(
            "arch",
            f"must be a VisionTransformer or a Swin transformer of timm's, got {arch!r}, {type(sketch).__name__}",
        )
    content = read_file(path, "path")
    where = os.fspath(path)
    if isinstance(content, Mapping) and any(isinstance(k, str) and k.endswith(_JAX_PATCHES) for k in content):
        return _of_jax(path, named_tensors(content, "path"), sketch, arch, options)
    content, key = _unwrapped(content, checkpoint_key)
    state, left = _backbone_tensors(named_tensors(content, "path"), key, where)
    given = {**options, "num_classes": _classes(state, sketch.num_features, options, where)}
    dropped = [name for name in state if _OTHER_PARTS.fullmatch(name) and name not in _CLASSIFIER]
    left += dropped
    state = {name: tensor for name, tensor in state.items() if name not in dropped}
    if "fc_norm.weight" in state and "norm.weight" not in state:
        given.setdefault("global_pool", "avg")
    wanted = _sides(sketch)
    size = _file_size(state, sketch, where) if isinstance(sketch, VisionTransformer) else wanted
    module = _create(arch, given, size)
    filtered = importlib.import_module(type(module).__module__).checkpoint_filter_fn(
        state, module, **({"adapt_layer_scale": True} if any("gamma_" in name for name in state) else {})
    )
    own = module.state_dict()
    for name in _CLASSIFIER:
        if name not in own:
            filtered.pop(name, None)
        elif name.endswith("bias"):
            filtered.setdefault(name, torch.zeros_like(own[name]))
    if "fc_norm.weight" in own and "norm.weight" not in own and "fc_norm.weight" not in filtered:
        for name in ("weight", "bias"):  # as in the code of MAE, VPT and VAPT: a new norm after the mean
            filtered[f"fc_norm.{name}"] = own[f"fc_norm.{name}"]
            if filtered.pop(f"norm.{name}", None) is not None:
                left.append(f"norm.{name}")
    _compare(filtered, own, where, arch)
    module.load_state_dict(filtered)
    if left:
        logger.info("%s: left out %s", where, ", ".join(sorted(left)))
    return module.eval(), wanted


_CLASSIFIER = ("head.weight", "head.bias", "head.fc.weight", "head.fc.bias")


def _create(arch: str, options: Mapping[str, Any], image_size: tuple[int, int] | None) -> Any:
    sized = dict(options) if image_size is None else {**options, "img_size": image_size}
    try:
        return timm.create_model(arch, pretrained=False, **sized)
    except TypeError as error:
        raise ValueError(f"timm does not build {arch!r} with {sized}: {error}") from error


def _sides(module: Any) -> tuple[int, int]:
    height, width = module.patch_embed.img_size
    return height, width


def _unwrapped(content: Any, key: str | None) -> tuple[Any, str | None]:
    """Unwrap a file's state dict; return it, and `key` if no wrapper has that name."""
    while isinstance(content, Mapping):
        if key is not None and isinstance(content.get(key), Mapping):
            content, key = content[key], None
            continue
        names = [name for name in _WRAPPERS if isinstance(content.get(name), Mapping)]
        if not names and not any(isinstance(value, Tensor) for value in content.values()):
            names = [name for name, value in content.items() if _has_tensors(value)]
            if len(names) > 1:
                raise ArgumentError("checkpoint_key", f"must say which state dict to read: the file has {names}")
        if not names:
            break
        content = content[names[0]]
    return content, key


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(tensor, Tensor) for tensor in value.values())


def _backbone_tensors(state: Mapping[str, Tensor], key: str | None, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of one network, with the prefix stripped from their names, and the names of the others."""
    prefixes = [name.removesuffix(_PATCHES) for name in state if f".{name}".endswith(f".{_PATCHES}")]
    if key is not None:
        prefixes = [prefix for prefix in prefixes if key in prefix.split(".")]
        if not prefixes:
            raise ArgumentError(
                "checkpoint_key", f"must name a network of the file, got {key!r}; {where} has none so called"
            )
    if len(prefixes) > 1:
        prefixes = [prefix for prefix in prefixes if _CHOSEN & set(prefix.split("."))] or prefixes
    if len(prefixes) > 1:
        raise ArgumentError("checkpoint_key", f"must say which network to read: {where} has {sorted(prefixes)}")
    if not prefixes:
        if not any("visual." in name for name in state):
            raise ArgumentError(
                "path",
                f"{where} holds no vision transformer that is known: no name ends in {_PATCHES!r}; they start with "
                f"{sorted(state)[:3]}",
            )
        return dict(state), []  # CLIP's names, which timm knows
    own = {name.removeprefix(prefixes[0]): t for name, t in state.items() if name.startswith(prefixes[0])}
    parent = re.sub(r"[^.]+\.$", "", prefixes[0])
    for name in ("head.weight", "head.bias"):  # a classifier beside the backbone
        if prefixes[0] and name not in own and parent + name in state:
            own[name] = state[parent + name]
    names = {prefixes[0] + name for name in own} | {parent + name for name in own}
    return own, [name for name in state if name not in names]


def _classes(state: Mapping[str, Tensor], width: int, options: Mapping[str, Any], where: str) -> int:
    """Return the number of outputs of the file's linear classifier; 0 if it has none or the caller wants none."""
    shapes = {name: tuple(state[name].shape) for name in ("head.weight", "head.fc.weight") if name in state}
    if "visual.proj" in state:  # CLIP's projection, (in, out)
        shapes["visual.proj"] = tuple(reversed(state["visual.proj"].shape))
    classes = next((shape[0] for shape in shapes.values() if len(shape) == 2 and shape[1] == width), 0)
    return _wanted_classes(classes, options, where)


def _wanted_classes(classes: int, options: Mapping[str, Any], where: str) -> int:
    wanted = options.get("num_classes", classes)
    if wanted not in (0, classes):
        raise ArgumentError(
            "num_classes", f"must be 0 or the {classes} outputs of the file's classifier, got {wanted!r}: {where}"
        )
    return wanted


def _file_size(state: Mapping[str, Tensor], sketch: Any, where: str) -> tuple[int, int]:
    """Return (height, width) in pixels of the images that the file's position embedding is for."""
    patch, own = tuple(sketch.patch_embed.patch_size), tuple(sketch.patch_embed.grid_size)
    if _PATCHES in state and state[_PATCHES].ndim == 4 and tuple(state[_PATCHES].shape[2:]) != patch:
        found = " x ".join(map(str, state[_PATCHES].shape[2:]))
        raise ArgumentError(
            "arch", f"must have the patches of the file, {found} pixels, got {patch[0]} x {patch[1]}: {where}"
        )
    if "pos_embed" not in state or state["pos_embed"].ndim != 3:
        return _sides(sketch)
    prefix = 0 if sketch.no_embed_class else sketch.num_prefix_tokens
    prefix = 1 if "register_tokens" in state else prefix  # DINOv2: registers have no position embedding
    grid = _grid(state["pos_embed"].shape[1] - prefix, own, where)
    return grid[0] * patch[0], grid[1] * patch[1]


def _grid(positions: int, own: tuple[int, ...], where: str) -> tuple[int, int]:
    side = math.isqrt(max(positions, 0))
    if positions == own[0] * own[1]:
        return own[0], own[1]
    if side < 1 or side * side != positions:
        raise ArgumentError("path", f"{where} has a position embedding for {positions} patches, which are no square")
    return side, side


def _compare(state: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str, arch: str) -> None:
    missing, unplaced = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
        for name, tensor in state.items()
        if name in own and own[name].shape != tensor.shape
    ]
    for what, names in (("lacks", missing), ("has no place for", unplaced), ("has other shapes:", shapes)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ArgumentError("path", f"{where} does not fit arch {arch!r}: it {what} {', '.join(names[:5])}{more}")


def _of_jax(
    path: str | os.PathLike[str], arrays: Mapping[str, Tensor], sketch: Any, arch: str, options: Mapping[str, Any]
) -> tuple[nn.Module, tuple[int, int]]:
    """Read Google's JAX `.npz` with timm's own reader. It resamples nothing: the model is built at the file's size."""
    where = os.fspath(path)
    if not isinstance(sketch, VisionTransformer):
        raise ArgumentError("arch", f"must be a VisionTransformer for the weights of {where}, got {arch!r}")
    stem = next(name for name in arrays if name.endswith(_JAX_PATCHES)).removesuffix(_JAX_PATCHES)
    names = {name.removeprefix(stem) for name in arrays if name.startswith(stem)}
    unplaced = sorted(name for name in names if not _JAX.fullmatch(name))
    if unplaced:
        raise ArgumentError(
            "path", f"{where} does not fit arch {arch!r}: it has no place for {', '.join(unplaced[:5])}"
        )
    scale = arrays.get(f"{stem}Transformer/encoderblock/LayerNorm_0/scale")
    numbers = {name.split("/")[1] for name in names if name.startswith("Transformer/encoderblock_")}
    depth = len(numbers) if scale is None else len(scale)
    kernel = arrays[stem + _JAX_PATCHES]
    patch = tuple(sketch.patch_embed.patch_size)
    found = (depth, kernel.shape[-1], *kernel.shape[:2])
    if found != (len(sketch.blocks), sketch.embed_dim, *patch):
        raise ArgumentError(
            "arch",
            f"must have the file's {depth} blocks, width {kernel.shape[-1]} and patches of {kernel.shape[0]} "
            f"pixels, got {arch!r} with {len(sketch.blocks)}, {sketch.embed_dim} and {patch[0]}: {where}",
        )
    plain = "head/bias" in names and "pre_logits/kernel" not in names
    classes = _wanted_classes(arrays[f"{stem}head/bias"].shape[0] if plain else 0, options, where)
    position = next((n for n in ("Transformer/posembed_input/pos_embedding", "pos_embedding") if n in names), None)
    if position is None:
        raise ArgumentError("path", f"{where} lacks 'Transformer/posembed_input/pos_embedding'")
    positions = arrays[stem + position].shape[1] - (0 if sketch.no_embed_class else sketch.num_prefix_tokens)
    grid = _grid(positions, tuple(sketch.patch_embed.grid_size), where)
    module = _create(arch, {**options, "num_classes": classes}, (grid[0] * patch[0], grid[1] * patch[1]))
    try:
        module.load_pretrained(os.fspath(path))
    except KeyError as error:
        raise ArgumentError("path", f"{where} does not fit arch {arch!r}: {error.args[0]}") from error
    except RuntimeError as error:
        raise ArgumentError("path", f"{where} does not fit arch {arch!r}: {error}") from error
    if "pre_logits/kernel" in names:
        logger.info("%s: left out pre_logits, head, which reads it", where)
    return module.eval(), _sides(sketch)
