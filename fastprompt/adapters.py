"""Adapters on disk: a directory with `adapter_config.json` and `adapter_model.safetensors`.

`adapter_model.safetensors` is the whole adapter: its tensors and, in its metadata, the text of the configuration and a
digest over both. One rename puts it in place. So on any file system, and whenever the process is killed, the adapter is
either the old one or the new one. `adapter_config.json` is a copy of the configuration for people, for other programs
and for versions that read nothing else. Its own digest distinguishes an edited or damaged copy from one that belongs to
another save.

Tensors named "resampled.…" are not part of the model. They are the backbone's, resampled by its library, and help to
identify it (`fastprompt.vit.backbone.Identity`).

All keys of a configuration are required, except those of `backbone.optional`. A reader ignores unknown keys there, and
rejects an unknown key anywhere else by name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load as tensors_from_bytes, save as tensors_to_bytes
from torch import Tensor

import fastprompt
from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.domains import Domains
from fastprompt.files import atomic_write_many, parse_json
from fastprompt.generators import PromptConfig, build_generator, config_from_dict, method_of
from fastprompt.heads import Head, LabelMapHead, LinearHead, PrototypeHead, TextHead, build_head
from fastprompt.vit import FrozenViT
from fastprompt.vit.source import BackboneSource

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
LARGEST_CONFIG = 16 << 20
"""Maximum bytes of a configuration; the names of 100,000 classes take a few million."""
_SHORT = 8
"""A list option may have this many entries, such as a pair or a triple, even if there are fewer tensors."""
_FORMAT = 1
_KEYS = {"format", "fastprompt_version", "method", "num_classes", "head", "readout", "class_names", "backbone"}
PREDICTS = ("class", "labels", "values")
_RESAMPLED = "resampled."
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)


RESIZES = ("crop", "squash")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How image files became the pixels that a model was trained on. Size, mean and std are those of its backbone.

    Attributes:
        resize: "crop" (short side, centre crop) or "squash", bicubic with antialiasing.
        intensity_range: the values of grey images with more than 8 bits that became black and white; None: the full
            range of the image's format.

    Raises:
        TypeError, ValueError: a value is invalid; the error names it.
    """

    resize: str = "crop"
    intensity_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.resize not in RESIZES:
            raise ArgumentError("resize", f"must be one of {RESIZES}, got {self.resize!r}")
        if self.intensity_range is None:
            return
        both = tuple(self.intensity_range) if isinstance(self.intensity_range, (tuple, list)) else ()
        if len(both) != 2 or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in both):
            raise ArgumentTypeError("intensity_range", f"must be (low, high) or None, got {self.intensity_range!r}")
        if not -math.inf < both[0] < both[1] < math.inf:
            raise ArgumentError("intensity_range", f"must be two finite numbers, the lower first, got {both}")
        object.__setattr__(self, "intensity_range", (float(both[0]), float(both[1])))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Invert `dataclasses.asdict`; an unknown key could change pixels, so it raises ValueError."""
        if not isinstance(values, Mapping):
            raise ArgumentTypeError("preprocessing", f"must be a mapping, got {values!r}")
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ArgumentError("preprocessing", f"has no option {unknown[0]!r}; a later version may know it")
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Int8Check:
    """What int8 changes about an adapter's predictions, compared with float32 image by image.

    `fastprompt eval --keep-check` makes it.

    Attributes:
        adapter: digest of the adapter's tensors (`state_digest`); weights: that of the int8 weights.
        num_images: images that were compared.
        difference: accuracy in int8 minus that in float32; low, high: its 95 % interval over images.
        agreement: share of the images that both predict alike.
    """

    adapter: str
    weights: str
    num_images: int
    difference: float
    low: float
    high: float
    agreement: float

    MOST_LOST: ClassVar[float] = 0.003
    LOWEST: ClassVar[float] = -0.01

    @property
    def passed(self) -> bool:
        """Whether int8 loses at most 0.3 points, and the interval reaches no lower than a loss of 1 point."""
        return self.difference >= -self.MOST_LOST and self.low >= self.LOWEST


def write_adapter(directory: str | os.PathLike[str], config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write an adapter's configuration and tensors into `directory`, both or neither.

    As with a commit of SQLite, any reader finds either the previous adapter or this one, never a mixture, even after a
    kill or a power failure: the weights file also holds the configuration, under one digest. A failing `fsync` is an
    error. If two processes write at once, the last one wins.

    Args:
        config: everything but the format, the version and the digest, which are added here.
        state: the tensors by name (`PromptedViT.adapter_state_dict`).

    Raises:
        ValueError: the configuration is too long, or contains a number that is not finite.
        OSError: the disk is full or the directory is not writable. Nothing has changed in this case.
    """
    optional = {key: value for key, value in config["backbone"].get("optional", {}).items() if key != "sha256"}
    config = {**config, "format": _FORMAT, "fastprompt_version": fastprompt.__version__}
    config["backbone"] = {**config["backbone"], "optional": optional}
    optional["sha256"] = _config_digest(config)
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    if len(text) > LARGEST_CONFIG:
        raise ValueError(f"an adapter's configuration must have at most {LARGEST_CONFIG:,} bytes, got {len(text):,}")
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    metadata = {"format": "pt", "config": text, "digest": _digest(text, tensors)}
    # The weights file is renamed first: readers open the copy first, so their copy is never newer than the weights.
    atomic_write_many(directory, {WEIGHTS_FILE: tensors_to_bytes(tensors, metadata), CONFIG_FILE: text})


def read_adapter(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the configuration and tensors of an adapter directory, as one save wrote them.

    Both files are read into memory and checked there. The checked contents are returned, so later changes to the files
    do not affect them.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is corrupted, was edited, or has an unknown format; the message names it.
    """
    directory = Path(directory)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} is no adapter: {name} is missing")
    copy = _read_config(directory / CONFIG_FILE)
    text, state = _read_weights(directory / WEIGHTS_FILE)
    if text is not None:  # `copy` may be from the previous save, if this one is in progress or was interrupted
        return _check_config(parse_json(text, directory / WEIGHTS_FILE), directory / WEIGHTS_FILE), state
    if "sha256" in copy["backbone"].get("optional", {}):
        raise ValueError(
            f"{directory / WEIGHTS_FILE} is corrupted: it has no digest, which the version that wrote {CONFIG_FILE} "
            "gives it"
        )
    return copy, state  # written by an earlier version


def _read_config(path: Path) -> dict[str, Any]:
    """Read the configuration in `adapter_config.json` and check its digest if it has one."""
    with open(path, "rb") as file:
        content = file.read(LARGEST_CONFIG + 1)
    if len(content) > LARGEST_CONFIG:
        raise ValueError(f"{path} is corrupted: it has more than {LARGEST_CONFIG:,} bytes")
    config = _check_config(parse_json(content, path), path)
    digest = config["backbone"].get("optional", {}).get("sha256")
    if digest is not None and digest != _config_digest(config):
        raise ValueError(
            f"{path} is not as it was saved (sha256): it is corrupted, or was edited. To change an adapter, load it, "
            "change the model and save it again"
        )
    return config


def _check_config(config: Any, path: Path) -> dict[str, Any]:
    """Return `config` after checking that it has everything any reader needs and requires nothing unknown."""
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise ValueError(f"{path} is not an adapter configuration of format {_FORMAT}")
    if set(config) != _KEYS:
        raise ValueError(
            f"{path}: missing keys {sorted(_KEYS - set(config))}, unknown keys {sorted(set(config) - _KEYS)}"
        )
    names = config["class_names"]
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{path} is corrupted: class_names must be a list of texts or null")
    stored = config["backbone"]
    for key, kind in (("name", str), ("fingerprint", str), ("image_size", list)):
        if not isinstance(stored, dict) or not isinstance(stored.get(key), kind):
            raise ValueError(f"{path} is corrupted: backbone lacks {key}")
    if not isinstance(stored.get("optional", {}), dict):
        raise ValueError(f"{path} is corrupted: backbone.optional must be an object")
    return config


def _read_weights(path: Path) -> tuple[str | None, dict[str, Tensor]]:
    """Read the configuration's text and the tensors of a weights file; the text is None in files of earlier versions.

    The digest is computed over the returned tensors.
    """
    content = path.read_bytes()
    try:
        state = tensors_from_bytes(content)
    except Exception as error:  # safetensors raises several kinds of errors, and KeyError for some dtypes
        raise ValueError(f"{path} is corrupted: {error}") from error
    header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")], path)
    metadata = header.get("__metadata__", {})
    if set(metadata) not in ({"format", "config", "digest"}, {"format", "sha256"}, {"format"}, set()):
        raise ValueError(f"{path} is corrupted: unknown metadata {sorted(metadata)}")
    for name, tensor in state.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{path}: {name} has dtype {tensor.dtype}, adapters hold {_DTYPES}")
    if "digest" in metadata:
        if metadata["digest"] != _digest(metadata["config"], state):
            raise ValueError(
                f"{path} is corrupted: configuration and tensors are not those that were saved together (sha256)"
            )
    elif metadata.get("sha256") not in (None, _data_digest(content)):
        raise ValueError(f"{path} is corrupted: its tensors are not those that were saved (sha256)")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} contains NaN or infinite values")
    return metadata.get("config"), {name: state[name] for name in sorted(state)}


def _config_digest(config: Mapping[str, Any]) -> str:
    """sha256 of a configuration, independent of its own digest and of the layout of its text."""
    optional = {key: value for key, value in config["backbone"]["optional"].items() if key != "sha256"}
    bare = {**config, "backbone": {**config["backbone"], "optional": optional}}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()


def _digest(text: str, state: Mapping[str, Tensor]) -> str:
    """sha256 of a configuration's text and of every tensor's name, dtype, shape and bytes."""
    described = [(name, str(state[name].dtype), list(state[name].shape)) for name in sorted(state)]
    digest = hashlib.sha256(json.dumps([text, described]).encode())
    for name in sorted(state):
        digest.update(state[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _data_digest(content: bytes) -> str:
    """sha256 of the tensor bytes in a safetensors file. The file's first 8 bytes give the length of their header."""
    return hashlib.sha256(memoryview(content)[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def state_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 of an adapter's tensors (`PromptedViT.adapter_state_dict`), wherever they are."""
    return _digest("", {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})


def int8_check_of(config: Mapping[str, Any]) -> Int8Check | None:
    """Return the comparison of int8 with float32 of an adapter's configuration; None if none was kept.

    Raises:
        TypeError: it has other fields than this version knows.
    """
    recorded = config["backbone"].get("optional", {}).get("int8_check")
    return None if recorded is None else Int8Check(**recorded)


def keep_int8_check(directory: str | os.PathLike[str], check: Int8Check) -> None:
    """Write a comparison of int8 with float32 into an adapter's configuration.

    Raises:
        ValueError: the comparison is of another adapter. FileNotFoundError, OSError: as in `read_adapter` and
            `write_adapter`.
    """
    config, state = read_adapter(directory)
    if state_digest(without_resampled(state)[0]) != check.adapter:
        raise ValueError(f"the adapter in {directory} is not the one that was compared")
    optional = {**config["backbone"].get("optional", {}), "int8_check": dataclasses.asdict(check)}
    write_adapter(directory, {**config, "backbone": {**config["backbone"], "optional": optional}}, state)


def source_of(config: Mapping[str, Any]) -> BackboneSource | None:
    """Return how the backbone of an adapter's configuration was loaded; None if it is not recorded.

    Raises:
        ValueError: it was loaded in a way that this version does not know.
    """
    recorded = config["backbone"].get("optional", {}).get("source")
    if recorded is None:
        return None
    try:
        return BackboneSource(**recorded)
    except (TypeError, ValueError) as error:
        raise ValueError(f"backbone.optional.source names no backbone that this version loads: {error}") from error


def preprocessing_of(config: Mapping[str, Any]) -> Preprocessing | None:
    """Return the preprocessing of an adapter's configuration; None if it is not recorded."""
    recorded = config["backbone"].get("optional", {}).get("preprocessing")
    return None if recorded is None else Preprocessing.from_dict(recorded)


def domains_of(config: Mapping[str, Any]) -> Domains | None:
    """Return the domains of an adapter's configuration; None if it was trained on one data set."""
    recorded = config["backbone"].get("optional", {}).get("domains")
    return None if recorded is None else Domains.from_dict(recorded)


def predicts_of(config: Mapping[str, Any]) -> str:
    """Return what the outputs of an adapter stand for (`PromptedViT.predicts`).

    Raises:
        ValueError: it is nothing that this version knows.
    """
    recorded = config["backbone"].get("optional", {}).get("predicts", "class")
    if recorded not in PREDICTS:
        raise ValueError(f"backbone.optional.predicts must be one of {PREDICTS}, got {recorded!r}")
    return recorded


def with_resampled(state: Mapping[str, Tensor], backbone: FrozenViT) -> dict[str, Tensor]:
    """Add to `state` what identifies the backbone besides its fingerprint: tensors that its library had resampled."""
    resampled = backbone.identity.resampled
    return {**state, **{f"{_RESAMPLED}{name}": tensor for name, tensor in resampled.items()}}


def without_resampled(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split `state` into the adapter's tensors and those that identify its backbone (`with_resampled`)."""
    resampled = {name.removeprefix(_RESAMPLED): t for name, t in state.items() if name.startswith(_RESAMPLED)}
    return {name: tensor for name, tensor in state.items() if not name.startswith(_RESAMPLED)}, resampled


def as_trained(who: str, stored: Mapping[str, Any], resampled: Mapping[str, Tensor], backbone: FrozenViT) -> FrozenViT:
    """Return `backbone`, normalising raw pixels by the mean and std that the adapter was trained with.

    Raises:
        ValueError: it is not the backbone that the adapter's configuration, `stored`, and `resampled` tensors describe.
    """
    if not backbone.fits(stored["fingerprint"], resampled):
        raise ValueError(
            f"{who} was trained on another backbone: {stored['name']} at "
            f"{'x'.join(map(str, stored['image_size']))} px, fingerprint {stored['fingerprint'][:12]}; this one is "
            f"{backbone.spec.name} at {'x'.join(map(str, backbone.image_size))} px, fingerprint "
            f"{backbone.fingerprint[:12]}"
            + (", resampled otherwise" if backbone.fingerprint == stored["fingerprint"] else "")
        )
    try:
        return backbone.normalising_by(*(stored.get(key) or getattr(backbone, key) for key in ("mean", "std")))
    except ValueError as error:
        raise ValueError(f"{who} is corrupted: backbone.{error}") from error


def check_sizes(config: PromptConfig, num_classes: Any, backbone: FrozenViT, state: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` if `state` does not have the tensors that a configuration requires.

    This allocates no memory, so a configuration cannot request more memory than its own file takes. It cannot request
    more modules either: each entry of a list option creates a module with its own tensors.
    """
    expected: dict[str, torch.Size] = {}
    width = backbone.feature_width
    for option, value in config.to_dict().items():
        if isinstance(value, (list, tuple)) and len(value) > max(len(state), _SHORT):
            raise ValueError(f"{option} has {len(value):,} entries, but there are only {len(state)} tensors")
    try:
        with torch.device("meta"):
            generator = build_generator(config, backbone)
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:  # sizes that overflow
        raise ValueError(f"no tensor can have the sizes of {str(config)[:200]}") from error
    if generator is not None:
        expected = {f"generator.{name}": tensor.shape for name, tensor in generator.state_dict().items()}
        width = generator.feature_width(width)
    if num_classes is not None and "head.weight" in state:
        read = len(state["head.selected"]) if "head.selected" in state else width
        expected["head.weight"] = torch.Size([num_classes, read])
    for name, shape in expected.items():
        if name in state and state[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, the configuration says {tuple(shape)}")
    missing = sorted(set(expected) - set(state))
    if missing:
        raise ValueError(f"tensors are missing: {missing[:5]}")


def registered_by(config: PromptConfig) -> str | None:
    """Return the module that registers a configuration's method; None if it belongs to this package."""
    method = method_of(config)
    module = (method.generator_class or method.config_class).__module__
    if module == "__main__":
        module = Path(getattr(sys.modules["__main__"], "__file__", None) or "").name or module
    return None if module.split(".")[0] == "fastprompt" else module


def config_from(adapter: Mapping[str, Any]) -> PromptConfig:
    """Return the configuration of an adapter's method, ready for loading its tensors.

    Raises:
        ValueError: no method of this kind is registered. The message says how to register it, and which module had
            registered it when the adapter was saved.
    """
    try:
        return config_from_dict(adapter["method"]).to_load()
    except ValueError as error:
        module = adapter["backbone"].get("optional", {}).get("registered_by")
        if module is None:
            raise
        raise ValueError(f"{error}; where the adapter was saved, {module} had registered it") from error


def head_from(
    info: Mapping[str, Any],
    backbone: FrozenViT,
    num_classes: int,
    state: Mapping[str, Tensor],
    config: PromptConfig,
) -> Head:
    """Build the head that an adapter's configuration describes for its method, with its tensors."""
    if info["kind"] == "text":
        return TextHead(state["head.class_embeddings"], backbone, info["logit_scale"])
    if info["kind"] == "prototypes":
        return PrototypeHead(
            state["head.prototypes"],
            [(state[f"head.weight{i}"], state[f"head.bias{i}"]) for i in range(info["num_layers"])],
            normalise=info.get("normalise", True),
        )
    if info["kind"] == "label_map":
        return LabelMapHead(backbone, num_classes, trainable=info.get("trainable", False))
    with torch.device("meta"):
        generator = build_generator(config, backbone)
    width = backbone.feature_width if generator is None else generator.feature_width(backbone.feature_width)
    if info["kind"] == "linear" and "selected" in info:
        return LinearHead(width, num_classes, state["head.selected"])
    return build_head(info["kind"], backbone, num_classes, width=width)
