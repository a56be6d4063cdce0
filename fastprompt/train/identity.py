"""The identity of a training run: everything its result depends on, as comparable JSON values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from fastprompt.train.batches import (
    check_data,
    feed,
    indices_to_read,
    is_tensor_pair,
    num_images,
    read_item,
)
from fastprompt.train.checkpoint import rng_state, set_rng_state
from fastprompt.train.recipes import RUNTIME_FIELDS, Recipe

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT
    from fastprompt.vit import FrozenViT

_READ_TWICE = 8
_FOLLOWS = {part: {f"{part}.labels", f"{part}.images", f"{part}.read"} for part in ("train", "val")}
"""Parts that always differ if the number of images does."""
_LONGEST_SAID = 60
"""Maximum length of a value that a message repeats; a digest has 66 characters."""


def run_identity(
    model: PromptedViT, recipe: Recipe, backbone_dtype: torch.dtype, data: Mapping[str, Any]
) -> dict[str, Any]:
    """Return everything that must be unchanged to resume a run or to reuse its result.

    This is the recipe, configuration, head with its tensors, class names, readout, backbone (fingerprint,
    normalisation, data types, int8 weights), names of trained parameters, initial values of generator and head, and the
    data.

    Args:
        model: the model before training.
        backbone_dtype: dtype in which the backbone will compute.
        data: result of `data_identities`.
    """
    assert model.head is not None
    backbone, state, int8 = model.backbone, model.adapter_state_dict(), int8_digest(model, recipe)
    fixed = {f"head.{name}" for name, _ in model.head.named_buffers()}
    return {
        "recipe": {name: value for name, value in recipe.to_dict().items() if name not in RUNTIME_FIELDS},
        "config": {"kind": model.config.kind, **model.config.to_dict()},
        "num_classes": model.num_classes,
        "class_names": model.class_names,
        "head": model.head.describe(),
        "head_tensors": {name: tensor_digest(state[name]) for name in sorted(fixed & set(state))},
        "readout": model.readout,
        "domains": None if model.domains is None else asdict(model.domains),
        "backbone": backbone.fingerprint,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "stored_dtype": str(backbone.dtype).removeprefix("torch."),
        "backbone_dtype": str(backbone_dtype).removeprefix("torch."),
        **({} if int8 is None else {"int8": int8}),
        "trained": [name for name, _ in model.trainable_parameters()],
        "initial_weights": weights_digest({name: t for name, t in state.items() if name not in fixed}),
        **data,
    }


def int8_digest(model: PromptedViT, recipe: Recipe) -> str | None:
    """Return what tells the int8 weights that a recipe trains through from others; None if it asks for none."""
    if recipe.backbone != "int8":
        return None
    from fastprompt.int8.weights import find_weights

    return find_weights(model.backbone, None).digest


def data_identities(train: Any, val: Any, num_classes: int, kind: str = "class") -> dict[str, Any]:
    """Return `data_identity` of the data as "train" and "val"; random states are restored."""
    before = rng_state()
    try:
        return {
            "train": data_identity(train, "train", num_classes, kind),
            "val": data_identity(val, "val", num_classes, kind),
        }
    finally:
        set_rng_state(*before)


def data_identity(data: Any, name: str, num_classes: int, kind: str = "class") -> dict[str, Any]:
    """Check labelled images (`check_data`) and compute digests of what was read.

    A Dataset can add to its identity what its images do not show: a method `identity()` that returns JSON values, as
    `ImageSet` has. Its entry "files" counts only if not all images were read.

    Returns:
        "num_images"; "labels" and "images": sha256 of the labels and of the images after their transforms, with
        random transforms drawing from fixed seeds; "read": number of images covered. "images" is None if a second
        reading gives different images, or if an item cannot be hashed. "stated": the result of the Dataset's
        `identity()`. "loader": batch size, order and collate function of a DataLoader.

    Raises:
        TypeError, ValueError: see `check_data`.
    """
    source: Any = data.dataset if isinstance(data, DataLoader) else data
    count = num_images(data, name)
    if hasattr(source, "set_epoch"):
        source.set_epoch(0)
    digest = hashlib.sha256()
    labels = check_data(data, name, num_classes, digest, kind)
    read = range(count) if is_tensor_pair(source) else indices_to_read(count)
    collates = isinstance(data, DataLoader) and data.collate_fn is not default_collate
    if collates and not is_tensor_pair(source):
        seen = all(feed(digest, read_item(source, index)) for index in read)
    else:
        seen = True
    stated = source.identity() if callable(getattr(source, "identity", None)) else {}
    return {
        "num_images": count,
        "labels": hashlib.sha256(labels.numpy().tobytes()).hexdigest(),
        "images": digest.hexdigest() if seen and _repeats(source, read) else None,
        "read": len(read),
        "stated": {key: value for key, value in stated.items() if key != "files" or len(read) < count},
        "loader": _loader_identity(data) if isinstance(data, DataLoader) else None,
    }


def _repeats(source: Any, read: Sequence[int]) -> bool:
    """Whether reading the first images again with the same seeds gives the same images."""
    if is_tensor_pair(source):
        return True
    readings = []
    for _ in range(2):
        digest = hashlib.sha256()
        for index in read[:_READ_TWICE]:
            feed(digest, read_item(source, index))
        readings.append(digest.digest())
    return readings[0] == readings[1]


def _loader_identity(loader: DataLoader[Any]) -> dict[str, Any]:
    return {
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "collate": getattr(loader.collate_fn, "__qualname__", type(loader.collate_fn).__name__),
        "sampler": _sampler_identity(loader.sampler if loader.batch_size is not None else loader.batch_sampler),
    }


def _sampler_identity(sampler: Any) -> dict[str, Any]:
    """Return a sampler's type and settings, except those that change every epoch; "unknown" names unhashable ones."""
    found: dict[str, Any] = {"kind": type(sampler).__qualname__, "unknown": []}
    attributes = {"batches": sampler} if isinstance(sampler, (list, tuple)) else getattr(sampler, "__dict__", {})
    for key, value in attributes.items():
        digest = hashlib.sha256()
        if key in ("data_source", "generator", "epoch"):
            continue
        if key == "sampler":  # of a batch sampler
            found[key] = _sampler_identity(value)
        elif not feed(digest, value):
            found["unknown"].append(key)
        else:
            found[key] = value if isinstance(value, (bool, int, float, str, type(None))) else digest.hexdigest()
    return found


def not_covered(identity: Mapping[str, Any], name: str) -> str | None:
    """Describe which changes of the data its identity cannot detect; None if it detects any change of the images."""
    sampler = (identity["loader"] or {}).get("sampler", {})
    if sampler.get("unknown"):
        return (
            f"{name} is drawn by a {sampler['kind']}, and its {', '.join(sampler['unknown'])} cannot be compared: a "
            "run may be resumed on different images"
        )
    if identity["stated"].get("files") is not None:
        return None
    if identity["images"] is None:
        return (
            f"{name} yields different images each time it is read, so a run is resumed if only their number and "
            "labels are unchanged. Give the Dataset a method identity() that returns what its images depend on"
        )
    if identity["read"] < identity["num_images"]:
        return (
            f"{name} has {identity['num_images']:,} images, of which only {identity['read']:,} are compared when a run "
            "is resumed. Give the Dataset a method identity() that returns what its images depend on"
        )
    return None


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, str]:
    """Compare two identities: return the name of each part that differs → a phrase for a message.

    A part that only one of them has, because another version wrote it, is ignored.
    """
    found = {}
    for name, new, old in _unequal(json.loads(json.dumps(mine)), theirs, ""):
        said = all(len(repr(value)) <= _LONGEST_SAID for value in (new, old))
        found[name] = f"{name} is {new!r}, was {old!r}" if said else f"{name} changed"
    for part in ("train", "val"):
        if f"{part}.num_images" in found:  # explains the rest
            found = {name: text for name, text in found.items() if name not in _FOLLOWS[part]}
    return found


def as_recorded_here(
    recorded: Mapping[str, Any], resampled: Mapping[str, Tensor], backbone: FrozenViT
) -> dict[str, Any]:
    """A recorded identity with this backbone's own fingerprint, where it is the backbone that was recorded.

    The fingerprint may be one as earlier versions took it, and tensors that a library has resampled may differ in their
    last bits (`Backbone.fits`).
    """
    named = recorded["backbone"]
    if backbone.fits(named, resampled):
        named = backbone.fingerprint
    elif named == backbone.fingerprint:
        named = f"{named}, resampled otherwise"
    return {**recorded, "backbone": named}


def require_same(
    mine: Mapping[str, Any],
    theirs: Mapping[str, Any],
    where: Path,
    except_for: Sequence[str] = (),
    hint: str = "",
) -> None:
    """Raise `ValueError` if the run in `where` has a different identity; the message says what differs.

    Args:
        except_for: names of parts to ignore.
        hint: appended to the message.
    """
    different = differences(mine, theirs)
    said = [phrase for name, phrase in different.items() if name not in except_for]
    if not said:
        return
    if said == [different.get("initial_weights")]:
        hint = ". To resume a run, start from the same weights: seed before building the model"
    raise ValueError(
        f"out_dir {where} holds another run ({', '.join(said)}); choose another directory, or replace it with "
        f"resume=False (--no-resume){hint}"
    )


def _unequal(mine: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for name in mine:
        if name not in theirs:
            continue
        new, old = mine[name], theirs[name]
        if isinstance(new, dict) and isinstance(old, dict):
            yield from _unequal(new, old, f"{prefix}{name}.")
        elif new != old:
            yield f"{prefix}{name}", new, old


def tensor_digest(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256()
    feed(digest, tensor)
    return digest.hexdigest()


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of named tensors."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        feed(digest, state[name])
    return digest.hexdigest()
