"""Adapters on disk: a directory with `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

import fastprompt
from fastprompt.files import atomic_write_many
from fastprompt.heads import Head, PrototypeHead, TextHead, build_head
from fastprompt.vit import FrozenViT

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_FORMAT = 1


def write_adapter(directory: str | os.PathLike[str], config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write an adapter's configuration and tensors into `directory`, both or neither.

    Args:
        config: everything but the format and the version, which are added here.
        state: the tensors by name (`PromptedViT.adapter_state_dict`).

    Raises:
        OSError: the disk is full or the place is not writable; nothing has changed then.
    """
    config = {"format": _FORMAT, "fastprompt_version": fastprompt.__version__, **config}
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    metadata = {"format": "pt", "sha256": _data_digest(tensors_to_bytes(tensors))}
    atomic_write_many(
        directory, {WEIGHTS_FILE: tensors_to_bytes(tensors, metadata), CONFIG_FILE: json.dumps(config, indent=2) + "\n"}
    )


def read_adapter(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of an adapter directory.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is corrupted or of an unknown format.
    """
    directory = Path(directory)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} is no adapter: {name} is missing")
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{directory / CONFIG_FILE} is corrupted: {error}") from error
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise ValueError(f"{directory / CONFIG_FILE} is not an adapter configuration of format {_FORMAT}")
    keys = {"format", "fastprompt_version", "method", "num_classes", "head", "readout", "class_names", "backbone"}
    if set(config) != keys:
        raise ValueError(
            f"{directory / CONFIG_FILE}: missing keys {sorted(keys - set(config))}, "
            f"unknown keys {sorted(set(config) - keys)}"
        )
    stored = config["backbone"]
    for key, kind in (("name", str), ("fingerprint", str), ("image_size", list)):
        if not isinstance(stored, dict) or not isinstance(stored.get(key), kind):
            raise ValueError(f"{directory / CONFIG_FILE} is corrupted: backbone lacks {key}")
    try:
        with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            digest = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{directory / WEIGHTS_FILE} is corrupted: {error}") from error
    if digest is not None and digest != _data_digest((directory / WEIGHTS_FILE).read_bytes()):
        raise ValueError(f"{directory / WEIGHTS_FILE} is corrupted: its tensors are not those that were saved (sha256)")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{directory / WEIGHTS_FILE}: {name} contains NaN or infinite values")
    return config, state


def _data_digest(content: bytes) -> str:
    """sha256 of the tensors' bytes in a safetensors file, which follow a header of the length its first 8 bytes say."""
    return hashlib.sha256(memoryview(content)[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def check_backbone(who: str, stored: Mapping[str, Any], backbone: FrozenViT) -> None:
    """Raise `ValueError` where `backbone` is not the one that an adapter's configuration describes."""
    if backbone.fingerprint != stored["fingerprint"]:
        raise ValueError(
            f"{who} was trained on another backbone: {stored['name']} at "
            f"{'x'.join(map(str, stored['image_size']))} px, fingerprint {stored['fingerprint'][:12]}; this one is "
            f"{backbone.spec.name} at {'x'.join(map(str, backbone.image_size))} px, fingerprint "
            f"{backbone.fingerprint[:12]}"
        )
    warn_of_other_pixels(who, stored, backbone)


def warn_of_other_pixels(who: str, trained: Mapping[str, Any], backbone: FrozenViT) -> None:
    """Warn where an adapter trained with another "mean" and "std" than those by which `backbone` normalises."""
    ours = {"mean": list(backbone.mean), "std": list(backbone.std)}
    theirs = {key: None if trained.get(key) is None else list(trained[key]) for key in ours}
    if ours != theirs:
        warnings.warn(
            f"{who} was trained on images normalised with {theirs}, this backbone normalises raw (uint8) "
            f"ones with {ours}",
            stacklevel=4,
        )


def head_from(info: Mapping[str, Any], backbone: FrozenViT, num_classes: int, state: Mapping[str, Tensor]) -> Head:
    """The head that an adapter's configuration describes, with its tensors."""
    if info["kind"] == "text":
        return TextHead(state["head.class_embeddings"], backbone, info["logit_scale"])
    if info["kind"] == "prototypes":
        return PrototypeHead(
            state["head.prototypes"],
            [(state[f"head.weight{i}"], state[f"head.bias{i}"]) for i in range(info["num_layers"])],
        )
    return build_head(info["kind"], backbone, num_classes)
