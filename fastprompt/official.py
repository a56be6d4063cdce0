"""Read the checkpoints that the authors of PGN, VPT and VAPT published or their code writes."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastprompt.generators import (
    PGN,
    VAPT,
    VPT,
    FreePrompts,
    FreePromptsConfig,
    Geometry,
    PGNConfig,
    PromptConfig,
    PromptGenerator,
    VAPTConfig,
    VPTConfig,
)
from fastprompt.model import PromptedViT
from fastprompt.vit import FrozenViT

State = dict[str, Tensor]

_ARRAYS: list[Any] = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float16", "float32", "float64")),
    (np.zeros(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
    (np.zeros(0).__reduce__()[0], "numpy._core.multiarray._reconstruct"),
]
"""What a file of NumPy arrays names, as VPT saves its prompts; none of it runs code of the file's."""


def load_official(
    source: str | os.PathLike[str] | Mapping[str, Any],
    backbone: FrozenViT | None = None,
    *,
    readout: str | None = None,
    **overrides: Any,
) -> PromptGenerator | PromptedViT:
    """A published PGN, VPT or VAPT checkpoint as a generator, or with a backbone as a `PromptedViT`; eval mode.

    PGN's input-independent baseline (`pgn_vectors`) is a `FreePrompts`, and VPT's prompts alone (`prompt_ep*.pth` with
    `shallow_prompt` and `deep_prompt`, as NumPy arrays) are a `VPT`.

    The method and its sizes are read from tensor names and shapes. What a state dict does not say takes the
    authors' default and can be overridden by name (`activation=`, `stem_pool=`, `channel_dropout=`, ...).

    Args:
        source: a state dict, or a file of one (`.pt`, `.pth`, read with `weights_only=True`, or `.safetensors`).
            Wrappers ({"state_dict": ...}, {"model": ...}), prefixes and the tensors of a full model around the
            prompts are accepted.
        backbone: the backbone the prompts were trained for; None: only the generator is returned. A linear head
            in the checkpoint (`head.last_layer.*`) comes along.
        readout: what the head sees, as for `PromptedViT`; None: as in the authors' code, that is the backbone's own,
            and the mean of patches and prompts for VPT and VAPT on a backbone that averages patches (MAE).
        overrides: options of the method's configuration, and `grid=(rows, columns)`, `patch_size=` or
            `image_size=` for a generator without backbone.

    Raises:
        FileNotFoundError: no such file.
        TypeError: `source` is neither a path nor a state dict of tensors.
        ValueError: the file or dict is no such checkpoint, a tensor is missing, unknown or misshapen, or the
            checkpoint does not fit `backbone`.
    """
    state = _read(source)
    if backbone is not None and not isinstance(backbone, FrozenViT):
        raise TypeError(f"backbone must be a FrozenViT or None, got {type(backbone).__name__}")
    if readout is not None and backbone is None:
        raise ValueError(f"readout={readout!r} needs a backbone: a generator alone has no readout")
    if "grid" in overrides:
        overrides["grid"] = Geometry(grid=overrides["grid"]).grid
    for marker, reader in (
        ("tl_vectors", _pgn),
        ("pgn_vectors", _free),
        ("prompt_embeddings", _visual_prompts),
        ("shallow_prompt", _saved_prompts),
    ):
        prefix = _prefix(state, marker)
        if prefix is not None:
            inner = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
            generator = reader(inner, backbone, dict(overrides)).eval()
            break
    else:
        raise ValueError(
            "source is no published PGN, VPT or VAPT checkpoint: it has none of 'tl_vectors', 'pgn_vectors', "
            f"'prompt_embeddings' and 'shallow_prompt'; its keys start with {sorted(state)[:3]}"
        )
    if backbone is None:
        return generator
    _compare_backbone(inner, backbone)
    outer = re.sub(r"enc\.(transformer\.)?$", "", prefix) + "head."
    weight, bias = state.get(outer + "last_layer.weight"), state.get(outer + "last_layer.bias")
    if weight is not None:
        if any(k.startswith(outer + "projection.") for k in state):
            raise ValueError(
                f"source has a head of several layers ({outer}projection.*); only a linear one can be "
                "read. Without backbone its prompts can"
            )
        if weight.ndim != 2 or weight.shape[1] != backbone.feature_width:
            raise ValueError(
                f"source has a head of shape {tuple(weight.shape)}, backbone takes (C, {backbone.feature_width})"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"source has a head of shape {tuple(weight.shape)} with a bias of shape {tuple(bias.shape)}"
            )
    if readout is None and marker in ("prompt_embeddings", "shallow_prompt") and backbone.spec.pool == "patches":
        readout = "patches+prompts"
    model = PromptedViT(backbone, generator.config, None if weight is None else weight.shape[0], readout=readout)
    assert model.generator is not None
    model.generator.load_state_dict(generator.state_dict())
    if weight is not None and model.head is not None:
        model.head.load_state_dict({"weight": weight, "bias": torch.zeros(len(weight)) if bias is None else bias})
    return model.eval()


def _read(source: str | os.PathLike[str] | Mapping[str, Any]) -> State:
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"source {path} does not exist")
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                content: Any = load_file(path)
            else:
                with torch.serialization.safe_globals(_ARRAYS):
                    content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler fails in as many ways as a file can be broken
            how = "a whole safetensors file" if path.suffix == ".safetensors" else "plain tensors (weights_only=True)"
            raise ValueError(f"source {path} cannot be read as {how}: {error}") from error
    else:
        content = source
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(k, str) for k in content):
        raise TypeError(f"source must be a path or a state dict of named tensors, got {type(content).__name__}")
    state = {
        k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) and v.dtype.kind == "f" else v
        for k, v in content.items()
    }
    state = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    if not state:
        raise TypeError("source must be a state dict of tensors, it holds none")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"source: {name} contains NaN or infinite values")
    return state


def _prefix(state: State, marker: str) -> str | None:
    """What stands before `marker` in the one key that ends with it; None if there is no such key."""
    found = [k[: -len(marker)] for k in state if k == marker or k.endswith("." + marker)]
    if len(found) > 1:
        raise ValueError(f"source has more than one {marker!r}: {sorted(p + marker for p in found)}")
    return found[0] if found else None


def _take(state: State, name: str, ndim: int | None = None) -> Tensor:
    if name not in state:
        raise ValueError(f"source lacks {name!r}")
    if ndim is not None and state[name].ndim != ndim:
        raise ValueError(f"source: {name} must have {ndim} dimensions, got shape {tuple(state[name].shape)}")
    return state[name]


def _settings(config: type[PromptConfig], found: dict[str, Any], overrides: dict[str, Any]) -> PromptConfig:
    """`config` from what the tensors say and the overrides, which may not contradict them."""
    for name, value in found.items():
        if name in overrides and overrides[name] != value:
            raise ValueError(f"{name}={overrides[name]!r} contradicts the checkpoint, whose tensors say {value!r}")
    return config.from_dict({**found, **overrides})


def _geometry(backbone: FrozenViT | None, width: int, overrides: dict[str, Any], **found: Any) -> Geometry:
    """The backbone's sizes, or else those the checkpoint and the overrides give."""
    sizes: dict[str, Any] = {k: overrides.pop(k) for k in ("grid", "patch_size", "image_size") if k in overrides}
    if backbone is None:
        return dataclasses.replace(Geometry(), **{"width": width, **found, **sizes})
    geometry = Geometry.of(backbone)
    for name, value in {"width": width, **found, **sizes}.items():
        if getattr(geometry, name) != value:
            raise ValueError(f"source was trained for {name} {value}, backbone has {getattr(geometry, name)}")
    return geometry


def _load(generator: PromptGenerator, state: State) -> PromptGenerator:
    """Strict load with the shapes named where they differ; BatchNorm's batch counters may be missing."""
    own = generator.state_dict()
    state = {**{k: v for k, v in own.items() if k.endswith("num_batches_tracked")}, **state}
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or unknown:
        raise ValueError(
            f"source does not fit {type(generator).__name__}: missing {missing[:5]}, unknown {unknown[:5]}"
        )
    for name, tensor in state.items():
        if own[name].shape != tensor.shape:
            raise ValueError(f"source: {name} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
    if any(t.dtype == torch.float64 for t in state.values()):
        generator.double()
    generator.load_state_dict(state)
    return generator


def _pgn(state: State, backbone: FrozenViT | None, overrides: dict[str, Any]) -> PromptGenerator:
    """`tl_vectors` and `model.*`: the authors' ResNet10, or torchvision's ResNet-18."""
    library = _take(state, "tl_vectors", 2)
    own: State = {"library": library}
    if "model.input_net.0.weight" in state:
        renamed = {"input_net.": "stem.", "output_net.2.": "fc."}
        widths, i = [], 0
        while f"model.blocks.{i}.net.0.weight" in state:
            widths.append(state[f"model.blocks.{i}.net.0.weight"].shape[0])
            i += 1
        found: dict[str, Any] = {"trunk": "resnet10", "widths": tuple(widths)}
        outputs = _take(state, "model.output_net.2.weight", 2).shape[0]
    elif "model.conv1.weight" in state:
        renamed, found = {}, {"trunk": "resnet18"}
        outputs = _take(state, "model.fc.weight", 2).shape[0]
    else:
        raise ValueError(
            "source has 'tl_vectors' but no known network: neither 'model.input_net.*' (ResNet10) nor "
            "'model.conv1.*' (ResNet-18)"
        )
    for name, tensor in state.items():
        if name.startswith("model."):
            name = name[len("model.") :]
            for old, new in renamed.items():
                if name.startswith(old):
                    name = new + name[len(old) :]
            own[
                "trunk." + name.replace(".net.", ".body.").replace(".downsample.", ".skip.")
                if found["trunk"] == "resnet10"
                else "trunk." + name
            ] = tensor
    if not len(library) or outputs % len(library):
        raise ValueError(f"source: {outputs} outputs are no multiple of the library's {library.shape[0]} tokens")
    found |= {"library_size": library.shape[0], "num_prompts": outputs // library.shape[0]}
    geometry = _geometry(backbone, library.shape[1], overrides)
    config = _settings(PGNConfig, found, overrides)
    assert isinstance(config, PGNConfig)
    return _load(PGN(config, geometry), own)


def _free(state: State, backbone: FrozenViT | None, overrides: dict[str, Any]) -> PromptGenerator:
    """`pgn_vectors`: PGN's input-independent baseline (their `iip.py`)."""
    vectors = _take(state, "pgn_vectors", 2)
    strange = sorted(name for name in state if name.startswith("model."))
    if strange:
        raise ValueError(
            f"source has 'pgn_vectors' and a network beside it, which that method does not have: {strange[:5]}"
        )
    geometry = _geometry(backbone, vectors.shape[1], overrides)
    config = _settings(FreePromptsConfig, {"num_prompts": vectors.shape[0]}, overrides)
    assert isinstance(config, FreePromptsConfig)
    return _load(FreePrompts(config, geometry), {"tokens": vectors[None]})


def _saved_prompts(state: State, backbone: FrozenViT | None, overrides: dict[str, Any]) -> PromptGenerator:
    """VPT's `prompt_ep*.pth`: `shallow_prompt` (1, P, D), and for VPT-deep `deep_prompt` (L − 1, P, D)."""
    strange = sorted(set(state) - {"shallow_prompt", "deep_prompt"})
    if strange:
        raise ValueError(f"source has 'shallow_prompt' and unknown tensors beside it: {strange[:5]}")
    renamed = {"shallow_prompt": "prompt_embeddings", "deep_prompt": "deep_prompt_embeddings"}
    return _visual_prompts({renamed[name]: tensor for name, tensor in state.items()}, backbone, overrides)


def _visual_prompts(state: State, backbone: FrozenViT | None, overrides: dict[str, Any]) -> PromptGenerator:
    """`prompt_embeddings`, `deep_prompt_embeddings`, `prompt_proj`, and VAPT's `deep_prompt_*`."""
    if any(re.fullmatch(r"deep_prompt_embeddings_\d+", name) for name in state):
        return _swin_prompts(state, backbone, overrides)
    first = _take(state, "prompt_embeddings", 3)
    deep = state.get("deep_prompt_embeddings")
    if first.shape[0] != 1 or (deep is not None and (deep.ndim != 3 or deep.shape[1:] != first.shape[1:])):
        raise ValueError(
            f"source: prompt_embeddings {tuple(first.shape)} and deep_prompt_embeddings "
            f"{None if deep is None else tuple(deep.shape)} do not fit (1, P, k) and (L - 1, P, k)"
        )
    embeddings = first if deep is None else torch.cat([first, deep])
    own: State = {"static.embeddings": embeddings}
    width = first.shape[2]
    found: dict[str, Any] = {"num_prompts": first.shape[1]}
    if "prompt_proj.weight" in state:
        own |= {f"static.projection.{k}": _take(state, f"prompt_proj.{k}") for k in ("weight", "bias")}
        found["project"], width = first.shape[2], state["prompt_proj.weight"].shape[0]
    # every tensor that belongs to the prompts must be used; those of a full model around them are not ours
    known = {"prompt_embeddings", "deep_prompt_embeddings", "prompt_proj.weight", "prompt_proj.bias"}
    if any(k.startswith("deep_prompt_downsample.") for k in state):
        generator, used = _vapt(state, backbone, overrides, own, found, width, embeddings.shape[0])
        known |= used
    else:
        depth = {} if deep is None else {"depth": embeddings.shape[0]}
        geometry = _geometry(backbone, width, overrides, **depth)
        config = _settings(VPTConfig, {**found, "deep": deep is not None}, overrides)
        assert isinstance(config, VPTConfig)
        generator = _load(VPT(config, geometry), own)
    leftover = sorted(k for k in state if "prompt" in k and k not in known)
    if leftover:
        raise ValueError(f"source has prompt tensors that this method does not have: {leftover[:5]}")
    return generator


def _swin_prompts(state: State, backbone: FrozenViT | None, overrides: dict[str, Any]) -> PromptGenerator:
    """VPT-deep on Swin: `prompt_embeddings` of block 0, `deep_prompt_embeddings_s` of the other blocks of stage s."""
    first = _take(state, "prompt_embeddings", 3)
    names = [f"deep_prompt_embeddings_{s}" for s in range(sum("deep_prompt_embeddings_" in name for name in state))]
    stages = [_take(state, name, 3) for name in names]
    leftover = sorted(name for name in state if "prompt" in name and name not in ("prompt_embeddings", *names))
    if leftover:
        raise ValueError(f"source has prompt tensors that this method does not have: {leftover[:5]}")
    if len(first) != 1 or stages[0].shape[1:] != first.shape[1:] or any(t.shape[1] != first.shape[1] for t in stages):
        raise ValueError(
            f"source: prompt_embeddings {tuple(first.shape)} and deep_prompt_embeddings_0, ... "
            f"{[tuple(t.shape) for t in stages]} do not fit (1, P, D) and (blocks, P, width of the stage)"
        )
    stages[0] = torch.cat([first, stages[0]])
    sizes = tuple((t.shape[2], t.shape[0]) for t in stages)
    depth = sum(blocks for _, blocks in sizes)
    geometry = _geometry(backbone, first.shape[2], overrides, depth=depth, stages=sizes)
    config = _settings(VPTConfig, {"num_prompts": first.shape[1], "deep": True}, overrides)
    assert isinstance(config, VPTConfig)
    own = {f"static.embeddings.{s}": t for s, t in enumerate(stages)}
    return _load(VPT(config, geometry), own if len(own) > 1 else {"static.embeddings": stages[0]})


def _vapt(
    state: State,
    backbone: FrozenViT | None,
    overrides: dict[str, Any],
    own: State,
    found: dict[str, Any],
    width: int,
    static_layers: int,
) -> tuple[PromptGenerator, set[str]]:
    named = {k: k.split(".")[1] for k in state if k.startswith("deep_prompt_downsample.")}
    strange = sorted(k for k, layer in named.items() if not layer.isdecimal())
    if strange:
        raise ValueError(f"source has prompt tensors that this method does not have: {strange[:5]}")
    layers = 1 + max(map(int, named.values()))
    used, names = (
        set(),
        {
            "deep_prompt_norm.{j}.weight": "norm.weight",
            "deep_prompt_norm.{j}.bias": "norm.bias",
            "deep_prompt_downsample.{j}.conv.kernel": "kernel",
            "deep_prompt_downsample.{j}.linear.weight": "projector.weight",
            "deep_prompt_downsample.{j}.linear.bias": "projector.bias",
        },
    )
    conv = "deep_prompt_downsample.0.weight" not in state
    if not conv:  # the layer is the Linear itself
        names = {theirs.replace(".linear.", "."): ours for theirs, ours in names.items() if ours != "kernel"}
    if backbone is not None and len(backbone.blocks) < static_layers + layers:
        static_layers = max(0, len(backbone.blocks) - layers)
    elif backbone is None and static_layers == layers + 2:
        static_layers = 2
    # VAPT on MAE keeps embeddings for blocks that have adaptive prompts: nothing reads them
    if "static.embeddings" in own:
        own["static.embeddings"] = own["static.embeddings"][:static_layers]
    for j in range(layers):
        for theirs, ours in names.items():
            own[f"adaptive.{j}.{ours}"] = _take(state, theirs.format(j=j))
            used.add(theirs.format(j=j))
    first = "deep_prompt_downsample.0.linear.weight" if conv else "deep_prompt_downsample.0.weight"
    positions = _take(state, first, 2).shape[1]
    found |= {"static_layers": static_layers, "conv": conv}
    shared = "deep_prompt_embeddings_mlp.block.0.weight" in state
    each = "deep_prompt_embeddings_mlp.0.block.0.weight" in state
    found["feature_projector"] = shared or each
    if found["feature_projector"]:
        found["share_projector"] = shared
        stems = ["deep_prompt_embeddings_mlp"] if shared else [f"deep_prompt_embeddings_mlp.{j}" for j in range(layers)]
        found["learnable_scale"] = f"{stems[0]}.scale" in state
        for i, stem in enumerate(stems):
            for theirs, ours in (("block.0.weight", "w1"), ("block.2.weight", "w2"), ("scale", "scale")):
                if ours != "scale" or found["learnable_scale"]:
                    tensor = _take(state, f"{stem}.{theirs}")
                    own[f"feature_projectors.{i}.{ours}"] = tensor.squeeze() if ours == "scale" else tensor
                    used.add(f"{stem}.{theirs}")
        found["hidden"] = _take(state, f"{stems[0]}.block.0.weight", 2).shape[0]
    grow = 0
    if conv:
        kernel = _take(state, "deep_prompt_downsample.0.conv.kernel", 4)
        found |= {"kernel": kernel.shape[-1], "channelwise": kernel.shape[0] == 1}
        grow = 1 - kernel.shape[-1]
    grid = overrides.get("grid") or (backbone.spec.grid if backbone is not None else None)
    VAPTConfig(padding=overrides.get("padding", 0))  # refuses what is none
    padding, grid = _padding(positions, grow, grid, conv, overrides.get("padding"))
    if conv:
        found["padding"] = padding
    overrides.pop("grid", None)
    geometry = _geometry(backbone, width, overrides, depth=static_layers + layers, grid=grid)
    config = _settings(VAPTConfig, found, overrides)
    assert isinstance(config, VAPTConfig)
    return _load(VAPT(config, geometry), own), used


def _padding(positions: int, grow: int, grid: Any, conv: bool, given: Any) -> tuple[int, tuple[int, int]]:
    """Padding from the projector's width (H + 2p − k + 1)(W + 2p − k + 1), on the given grid or a 14 or 16 square."""
    grids = [tuple(grid)] if grid is not None else [(14, 14), (16, 16)]
    paddings = ([0] if not conv else range(9)) if given is None else [given]
    for rows, columns in grids:
        for padding in paddings:
            if (rows + 2 * padding + grow) * (columns + 2 * padding + grow) == positions:
                return padding, (rows, columns)
    side = math.isqrt(positions)
    if grid is None and conv and side * side == positions:
        return given or 0, (side - 2 * (given or 0) - grow,) * 2
    if grid is None and side * side == positions:
        return 0, (side, side)
    raise ValueError(
        f"source: the token projector reads {positions} positions, which no padding gives on a grid of "
        f"{' or '.join(map(str, grids))} patches; give grid=(rows, columns) and padding="
    )


def _compare_backbone(state: State, backbone: FrozenViT) -> None:
    """Warn when the checkpoint carries another backbone than the given one."""
    theirs = state.get("embeddings.patch_embeddings.weight", state.get("patch_embed.proj.weight"))
    if theirs is None:
        return
    ours = backbone.patch_weight.detach().cpu()
    if theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours.float(), rtol=1e-2, atol=1e-3):
        warnings.warn(
            "the checkpoint carries the weights of another backbone than the given one (its patch embedding "
            "differs); predictions will not be those of its authors",
            stacklevel=3,
        )
