"""Read the checkpoints that the authors of PGN, VPT and VAPT published or that their code writes."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastprompt.arguments import ArgumentError
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
from fastprompt.heads import Head, LabelMapHead, LinearHead, PrototypeHead, dino_layers
from fastprompt.model import PromptedViT
from fastprompt.vit import FrozenViT
from fastprompt.vit.readers.parts import CLIP, IMAGENET
from fastprompt.vit.tensor_files import named_tensors, read_file

State = dict[str, Tensor]


def load_official(
    source: str | os.PathLike[str] | Mapping[str, Any],
    backbone: FrozenViT | None = None,
    *,
    head: str | Head | None = None,
    num_classes: int | None = None,
    class_embeddings: Any = None,
    dino: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    rows: str = "authors",
    seed: int = 0,
    readout: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **overrides: Any,
) -> PromptGenerator | PromptedViT:
    """Load a published PGN, VPT or VAPT checkpoint as a generator, or with a backbone as a `PromptedViT`; eval mode.

    PGN's input-independent baseline (`pgn_vectors`) becomes a `FreePrompts`. VPT's prompts alone (`prompt_ep*.pth` with
    `shallow_prompt` and `deep_prompt`, as NumPy arrays) become a `VPT`.

    The method and its sizes are read from tensor names and shapes. Options that a state dict does not show take the
    authors' default and can be overridden by name (`activation=`, `stem_pool=`, `channel_dropout=`, ...).

    Raw (uint8) pixels are normalised as in the authors' code: by CLIP's mean and std for PGN on every backbone,
    including the supervised ViT and DINO, and by ImageNet's for VPT and VAPT. If those differ from the backbone's,
    `model.backbone` is `backbone.normalising_by(mean, std)`, which shares its tensors, and a warning says so.

    `head` selects the authors' classifiers:

    * "text", with `class_embeddings`: PGN on CLIP.
    * "label_map": PGN on the supervised ViT, which reads output i of the pretrained classifier as label i. It uses all
      outputs unless `num_classes` limits them. The authors' code trains the classifier beside the prompts, but their
      published `.pt` files leave it out, which causes a warning. A file of the whole model includes it, and it is used.
    * "prototypes", with `dino` and `num_classes`: PGN on DINO; see `PrototypeHead.from_dino` for the defect that
      `rows="authors"` reproduces. The published files do not include the last layer, so predictions differ from the
      authors'.
    * None: the file's classifier, if it has one.

    Args:
        source: a state dict, or a file with one (`.pt`, `.pth`, read with `weights_only=True`, or `.safetensors`).
            Wrappers ({"state_dict": ...}, {"model": ...}), prefixes and the tensors of a full model around the
            prompts are accepted.
        backbone: the backbone that the prompts were trained for; None: return only the generator, in which case only
            `overrides` may follow.
        head: "linear", "text", "label_map", "prototypes", a head of `fastprompt.heads`, or None, as above.
        num_classes: C, if `head` does not determine it.
        class_embeddings: (C, E), for "text".
        dino: DINO's full checkpoint, or a state dict of its projection head, for "prototypes".
        rows: "authors" or "prototypes". seed: for both, and for the choice of prototypes (`random.sample`).
        readout: the head's input, as for `PromptedViT`; None: its default, which is that of the authors' code.
        mean, std: per channel, for normalising raw pixels; None: the authors'.
        overrides: options of the method's configuration. For a generator without a backbone, also
            `grid=(rows, columns)`, `patch_size=`, `image_size=` or, for VPT, `depth=` (blocks). VPT-deep with prompts
            for fewer blocks than the backbone has is VPT with partial depth (`VPTConfig.deep_layers`).

    Raises:
        FileNotFoundError: no such file.
        TypeError: `source` is neither a path nor a state dict of tensors.
        ValueError: the file or dict is not such a checkpoint, a tensor is missing, unknown or has the wrong shape, the
            checkpoint does not fit `backbone`, or an argument does not fit the others.
    """
    if backbone is not None and not isinstance(backbone, FrozenViT):
        raise TypeError(f"backbone must be a FrozenViT or None, got {type(backbone).__name__}")
    of_model = {"head": head, "num_classes": num_classes, "readout": readout, "mean": mean, "std": std}
    for name, value in of_model.items():
        if value is not None and backbone is None:
            raise ArgumentError(name, f"must be None without a backbone: a generator alone has none, got {value!r}")
    for name, missing, kind in (
        ("class_embeddings", class_embeddings is None, "text"),
        ("dino", dino is None, "prototypes"),
    ):
        if missing == (isinstance(head, str) and head == kind):
            raise ArgumentError(name, f"{'is needed' if missing else 'is only'} for head {kind!r}, head is {head!r}")
    state = _read(source)
    if "grid" in overrides:
        overrides["grid"] = Geometry(grid=overrides["grid"]).grid
    prefixes = {marker: _prefix(state, marker) for marker in _READERS}
    marker = next((marker for marker, prefix in prefixes.items() if prefix is not None), None)
    if marker is None:
        raise ValueError(
            "source is no published PGN, VPT or VAPT checkpoint: it has none of 'tl_vectors', 'pgn_vectors', "
            f"'prompt_embeddings' and 'shallow_prompt'; its keys start with {sorted(state)[:3]}"
        )
    (reader, pixels), prefix = _READERS[marker], prefixes[marker] or ""
    inner = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    generator = reader(inner, backbone, dict(overrides)).eval()
    if backbone is None:
        return generator
    _compare_backbone(inner, backbone)
    given = backbone
    backbone = given.normalising_by(pixels["mean"] if mean is None else mean, pixels["std"] if std is None else std)
    if (mean is None or std is None) and (backbone.mean, backbone.std) != (given.mean, given.std):
        warnings.warn(
            f"raw pixels are normalised as in the authors' code, by mean {backbone.mean} and std {backbone.std}; the "
            f"backbone's own are {given.mean} and {given.std}. mean= and std= choose others",
            stacklevel=2,
        )
    found = _head_of(state, prefix, backbone)
    built: str | Head = "linear" if head is None else head
    if head == "label_map":
        built = _label_map(found, backbone, num_classes)
    elif head == "prototypes":
        if num_classes is None:
            raise ArgumentError("num_classes", "must be given for head 'prototypes', got None")
        released = _read(dino, "dino", ("student", "state_dict", "model"))
        built = PrototypeHead.from_dino(released, num_classes, seed, rows=rows)
    elif head == "text":
        num_classes = len(class_embeddings) if num_classes is None else num_classes
    elif found is not None and head in (None, "linear"):
        if num_classes not in (None, found.num_classes):
            raise ArgumentError("num_classes", f"must be the {found.num_classes} of the file's head, got {num_classes}")
        if head == "linear" and not isinstance(found, LinearHead):
            raise ArgumentError("head", f"must be None or {found.kind!r}, as the file's is, got 'linear'")
        built = found
    model = PromptedViT(backbone, generator.config, num_classes, built, readout, class_embeddings=class_embeddings)
    assert model.generator is not None
    model.generator.load_state_dict(generator.state_dict())
    return model.eval()


def _label_map(found: Head | None, backbone: FrozenViT, num_classes: int | None) -> LabelMapHead:
    """Return PGN's classifier on the supervised ViT: the trained one if the file has it, else the backbone's."""
    outputs = 0 if backbone.head is None else len(backbone.head.weight)
    head = LabelMapHead(backbone, outputs if num_classes is None else num_classes, trainable=True)
    if isinstance(found, LinearHead) and found.weight.shape == (outputs, backbone.feature_width):
        rows = head.num_classes
        trained = {"weight": found.weight[:rows], "bias": found.bias[:rows]}
        head.load_state_dict({f"classifier_{name}": trained[name] for name in trained})
        return head
    warnings.warn(
        "source leaves out the classifier that the authors trained beside the prompts; head 'label_map' starts from "
        "the backbone's pretrained one, and predictions are not those of the authors until it is trained",
        stacklevel=3,
    )
    return head


def _head_of(state: State, prefix: str, backbone: FrozenViT) -> Head | None:
    """Return the classifier beside the prompts in a file of a whole model; None if it has none.

    It is `head.last_layer` in VPT and VAPT. In PGN it is `vit_model.heads.head`, `vit_model.heads.0` for a new
    classifier, or `dino_head` on DINO.
    """
    outer = re.sub(r"(enc\.(transformer\.)?|pgn_module\.)$", "", prefix)
    if f"{outer}dino_head.last_layer.weight" in state:
        stem = f"{outer}dino_head."
        return PrototypeHead(state[f"{stem}last_layer.weight"], dino_layers(state, stem), normalise=False)
    for stem in ("head.last_layer.", "vit_model.heads.head.", "vit_model.heads.0."):
        weight, bias = state.get(f"{outer}{stem}weight"), state.get(f"{outer}{stem}bias")
        if weight is not None:
            break
    else:
        return None
    if any(k.startswith(f"{outer}head.projection.") for k in state):
        raise ValueError(
            f"source has a head of several layers ({outer}head.projection.*); only a linear one can be "
            "read. Without backbone its prompts can"
        )
    if weight.ndim != 2 or weight.shape[1] != backbone.feature_width:
        raise ValueError(
            f"source has a head of shape {tuple(weight.shape)}, backbone takes (C, {backbone.feature_width})"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"source has a head of shape {tuple(weight.shape)} with a bias of shape {tuple(bias.shape)}")
    head = LinearHead(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": weight, "bias": torch.zeros(len(weight)) if bias is None else bias})
    return head


def _read(source: Any, name: str = "source", wrappers: tuple[str, ...] = ("state_dict", "model")) -> State:
    """Read the tensors of a file or a state dict, unwrapping each of the `wrappers` in turn if it is there."""
    content = read_file(source, name) if isinstance(source, (str, os.PathLike)) else source
    for key in wrappers:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return named_tensors(content, name)


def _prefix(state: State, marker: str) -> str | None:
    """Return the prefix of `marker` in the one key that ends with it; None if there is no such key."""
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
    """Build `config` from the values found in the tensors and the overrides, which must not contradict them."""
    for name, value in found.items():
        if name in overrides and overrides[name] != value:
            raise ValueError(f"{name}={overrides[name]!r} contradicts the checkpoint, whose tensors say {value!r}")
    return config.from_dict({**found, **overrides})


def _geometry(backbone: FrozenViT | None, width: int, overrides: dict[str, Any], **found: Any) -> Geometry:
    """Return the backbone's sizes, or else those that the checkpoint and the overrides give."""
    sizes: dict[str, Any] = {k: overrides.pop(k) for k in ("grid", "patch_size", "image_size") if k in overrides}
    if backbone is None:
        return dataclasses.replace(Geometry(), **{"width": width, **found, **sizes})
    geometry = Geometry.of(backbone)
    for name, value in {"width": width, **found, **sizes}.items():
        if getattr(geometry, name) != value:
            raise ValueError(f"source was trained for {name} {value}, backbone has {getattr(geometry, name)}")
    return geometry


def _load(generator: PromptGenerator, state: State) -> PromptGenerator:
    """Load strictly, naming shapes that differ; BatchNorm's batch counters may be missing."""
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
    """Read `tl_vectors` and `model.*`: the authors' ResNet10, or torchvision's ResNet-18."""
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
    overrides.setdefault("resize", "short_side")
    config = _settings(PGNConfig, found, overrides)
    assert isinstance(config, PGNConfig)
    return _load(PGN(config, geometry), own)


def _free(state: State, backbone: FrozenViT | None, overrides: dict[str, Any]) -> PromptGenerator:
    """Read `pgn_vectors`: PGN's input-independent baseline (their `iip.py`)."""
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
    """Read VPT's `prompt_ep*.pth`: `shallow_prompt` (1, P, D), and for VPT-deep `deep_prompt` (L − 1, P, D)."""
    strange = sorted(set(state) - {"shallow_prompt", "deep_prompt"})
    if strange:
        raise ValueError(f"source has 'shallow_prompt' and unknown tensors beside it: {strange[:5]}")
    renamed = {"shallow_prompt": "prompt_embeddings", "deep_prompt": "deep_prompt_embeddings"}
    return _visual_prompts({renamed[name]: tensor for name, tensor in state.items()}, backbone, overrides)


def _visual_prompts(state: State, backbone: FrozenViT | None, overrides: dict[str, Any]) -> PromptGenerator:
    """Read `prompt_embeddings`, `deep_prompt_embeddings`, `prompt_proj`, and VAPT's `deep_prompt_*`."""
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
    # every tensor of the prompts must be used; those of a surrounding full model are ignored
    known = {"prompt_embeddings", "deep_prompt_embeddings", "prompt_proj.weight", "prompt_proj.bias"}
    if any(k.startswith("deep_prompt_downsample.") for k in state):
        generator, used = _vapt(state, backbone, overrides, own, found, width, embeddings.shape[0])
        known |= used
    else:
        rows, depth = len(embeddings), overrides.pop("depth", None)
        depth = depth if depth is None else Geometry(depth=depth).depth
        blocks = depth if backbone is None else len(backbone.blocks)
        if depth not in (None, blocks):
            raise ArgumentError("depth", f"must be that of the backbone, {blocks}, got {depth}")
        found["deep"] = deep is not None
        if deep is not None:  # rows for the first blocks only: the prompts of the last of these stay in the sequence
            blocks = rows if blocks is None or blocks < rows else blocks
            found["deep_layers"] = rows if rows < blocks else None
        geometry = _geometry(backbone, width, overrides, **({} if blocks is None else {"depth": blocks}))
        config = _settings(VPTConfig, found, overrides)
        assert isinstance(config, VPTConfig)
        generator = _load(VPT(config, geometry), own)
    leftover = sorted(k for k in state if "prompt" in k and k not in known)
    if leftover:
        raise ValueError(f"source has prompt tensors that this method does not have: {leftover[:5]}")
    return generator


def _swin_prompts(state: State, backbone: FrozenViT | None, overrides: dict[str, Any]) -> PromptGenerator:
    """Read VPT-deep on Swin: `prompt_embeddings` of block 0, `deep_prompt_embeddings_s` of stage s's other blocks."""
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
    overrides.setdefault("dropout_per", "batch")
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
    if backbone is not None and static_layers == len(backbone.blocks) > layers:
        static_layers -= layers
    elif backbone is None and static_layers == layers + 2:
        static_layers = 2
    # VAPT on MAE keeps embeddings for blocks that have adaptive prompts, but never reads them
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
    VAPTConfig(padding=overrides.get("padding", 0))  # raises if it is invalid
    padding, grid = _padding(positions, grow, grid, conv, overrides.get("padding"))
    if conv:
        found["padding"] = padding
    overrides.pop("grid", None)
    geometry = _geometry(backbone, width, overrides, depth=static_layers + layers, grid=grid)
    config = _settings(VAPTConfig, found, overrides)
    assert isinstance(config, VAPTConfig)
    return _load(VAPT(config, geometry), own), used


def _padding(positions: int, grow: int, grid: Any, conv: bool, given: Any) -> tuple[int, tuple[int, int]]:
    """Infer padding from the projector's width (H + 2p − k + 1)(W + 2p − k + 1), on the given, a 14² or a 16² grid."""
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


_READERS = {
    "tl_vectors": (_pgn, CLIP),
    "pgn_vectors": (_free, CLIP),
    "prompt_embeddings": (_visual_prompts, IMAGENET),
    "shallow_prompt": (_saved_prompts, IMAGENET),
}
"""For each tensor that identifies a method: its reader, and how the authors' code normalises pixels."""


def _compare_backbone(state: State, backbone: FrozenViT) -> None:
    """Warn if the checkpoint contains another backbone than the given one."""
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
