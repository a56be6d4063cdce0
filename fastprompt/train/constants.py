"""Keep what is constant in training, so that only the first pass over the images runs the frozen blocks.

`PromptedViT.constants` says what that is. A record holds it for one image: the parts one after the other as bytes, each
with its own dtype. Records lie in memory, or in a file of a directory that several runs may share:

    records (N · bytes), JSON of the facts they depend on and their sha256, length of the JSON (8 bytes)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor

from fastprompt.adapters import state_digest
from fastprompt.train.batches import Batches
from fastprompt.train.evaluate import device_of, evaluation_mode
from fastprompt.train.recipes import Recipe

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT

FORMAT = 1
_SUFFIX = ".constants"
_ALIGNED = 64
_CHUNK = 1 << 24
_GIB = 1 << 30
CAST = ("rows", "embeddings", "inputs", "keys", "values")
"""Parts that are kept in the recipe's `cache_dtype`; the others keep their own."""


class Part(NamedTuple):
    """One tensor of a record: name, dtype ("float32"), shape and first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * _dtype(self.dtype).itemsize


class Constants:
    """The constants of a run's images, and the model's forward from them.

    Args:
        model: the model in the state that it trains in; `has_constants` says that it has some.
        recipe: `cache`, `cache_dtype` and `cache_gib` apply.
        directory: where records are kept; None: in memory.
        facts: what the images depend on, by name ("train", "val"): the result of `data_identities`.
        kind: of the labels (`fastprompt.train.tasks.kind_of_labels`).
    """

    def __init__(
        self,
        model: PromptedViT,
        recipe: Recipe,
        directory: Path | None,
        facts: Mapping[str, Any],
        kind: str = "class",
    ) -> None:
        self.model, self.recipe, self.directory, self.facts, self.kind = model, recipe, directory, facts, kind
        self.keep = "inputs" if recipe.cache == "auto" else recipe.cache
        own = str(model.backbone.dtype).removeprefix("torch.")
        self.dtype = own if recipe.cache_dtype == "auto" else recipe.cache_dtype
        self.layout: list[Part] = []
        self.bytes = 0

    def prepare(self, sources: Mapping[str, Any]) -> str:
        """Find out how large a record is; return why the images of `sources` are not kept, "" if they are."""
        first, count = next(iter(sources.values())), 0
        for data in sources.values():
            count += self._batches(data).num_images
        images, labels = next(iter(self._batches(first, 1).epoch()))
        self.layout, self.bytes = self._laid_out(self._parts(images, labels))
        needed = count * self.bytes
        if needed > self.recipe.cache_gib * _GIB:
            limit = f"more than cache_gib={self.recipe.cache_gib:g}"
            return f"the constants of {count:,} images take {size_of(needed)}, {limit}"
        return ""

    def describe(self, count: int) -> str:
        """Say what is kept of `count` images."""
        where = "memory" if self.directory is None else str(self.directory)
        return (
            f"kept for all epochs: {self.what()}, {count:,} images in {self.dtype}, {self.bytes:,} bytes each, "
            f"{size_of(count * self.bytes)} in {where}"
        )

    def what(self) -> str:
        """Say what is kept of an image."""
        names = {part.name.partition(".")[0] for part in self.layout} & set(CAST)
        blocks = sum(part.name.startswith(("inputs.", "keys.")) for part in self.layout)
        return f"{' and '.join(sorted(names))} of {blocks} blocks" if blocks else "what enters the first prompted block"

    def place(self, name: str) -> str:
        """Say where the records of `name` are kept: "memory" or the directory."""
        return "memory" if self._path(name) is None else str(self.directory)

    def kept(self, name: str, data: Any) -> tuple[Tensor, Tensor]:
        """Return records (N, bytes) uint8 of the images of `data`, and labels (N,), in the order of the data.

        They are computed, or read from the directory if it has them.

        Raises:
            OSError: the directory cannot be written.
        """
        count = self._batches(data).num_images
        path = self._path(name)
        if path is None:
            records = torch.empty(count, self.bytes, dtype=torch.uint8)
            for start, rows in self._computed(data):
                records[start : start + len(rows)] = rows
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                found = self._read(path, count)
                if found is None:
                    self._make_room(path, count * self.bytes)
                    self._write(path, name, data)
                    found = self._read(path, count)
                if found is None:
                    raise OSError(f"{path} is not what was written")
                records = found
        return records, self.unpacked(records, ("labels",))["labels"]

    def unpacked(self, records: Tensor, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """Return the parts of records (B, bytes), each (B, ...), as views; `names` selects some."""
        return {
            part.name: records[:, part.start : part.start + part.size]
            .view(_dtype(part.dtype))
            .view(len(records), *part.shape)
            for part in self.layout
            if names is None or part.name in names
        }

    def forward(self, records: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits (B, C) and what a loss needs besides them, from records (B, bytes)."""
        found = self.unpacked(records)
        found.pop("labels")
        logits, aux = self.model.from_constants(found, return_aux=True)
        return logits, aux

    def _batches(self, data: Any, batch_size: int | None = None) -> Batches:
        assert self.model.num_classes is not None
        return Batches(
            data,
            batch_size or self.recipe.batch_size,
            name="data",
            num_classes=self.model.num_classes,
            kind=self.kind,
            device=device_of(self.model),
            num_workers=self.recipe.num_workers,
        )

    def _parts(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The parts of the images' records, in their dtypes."""
        with evaluation_mode(self.model):
            found = self.model.constants(images, self.keep)
        for name, tensor in found.items():
            if name.partition(".")[0] in CAST:
                found[name] = tensor.to(_dtype(self.dtype))
            elif name == "features":
                found[name] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        return {**found, "labels": labels}

    def _laid_out(self, parts: Mapping[str, Tensor]) -> tuple[list[Part], int]:
        """Return the layout of records with these parts, (1, ...) each, and their bytes."""
        layout, start = [], 0
        for name, tensor in parts.items():
            part = Part(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape[1:]), start)
            layout.append(part)
            start += -(-part.size // _ALIGNED) * _ALIGNED
        return layout, start

    def _computed(self, data: Any) -> Iterator[tuple[int, Tensor]]:
        """Yield the records of each batch, (b, bytes) on the CPU, with the index of the first."""
        start = 0
        for images, labels in self._batches(data).epoch():
            rows = torch.zeros(len(labels), self.bytes, dtype=torch.uint8)
            parts = self._parts(images, labels)
            for part in self.layout:
                tensor = parts[part.name]
                if (str(tensor.dtype), tuple(tensor.shape[1:])) != (f"torch.{part.dtype}", part.shape):
                    raise ValueError(f"images must have one size, got another one at image {start}")
                flat = tensor.contiguous().view(len(labels), -1).cpu()
                rows[:, part.start : part.start + part.size] = flat.view(torch.uint8)
            yield start, rows
            start += len(labels)

    def _facts(self, name: str) -> dict[str, Any]:
        """What the records of `name` depend on."""
        model, backbone = self.model, self.model.backbone
        assert model.generator is not None
        return {
            "format": FORMAT,
            "backbone": backbone.fingerprint,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "backbone_dtype": str(backbone.dtype),
            "interleaved": self._interleaved(),
            **self._rounded(),
            "torch": torch.__version__,
            "readout": model.readout,
            "layers": list(model.generator.layers),
            "role": model.generator.role,
            "layout": [list(part) for part in self.layout],
            "images": self.facts[name],
        }

    def _interleaved(self) -> bool:
        """Whether kept keys have the channels that a rotation pairs side by side."""
        folded = self.model.backbone.folded()
        return folded is not None and any(block.interleaved for block in folded.blocks)

    def _rounded(self) -> dict[str, str]:
        """What the records owe to int8 weights; nothing if the blocks have none."""
        from fastprompt.int8.linear import is_int8

        folded = self.model.backbone.folded()
        if folded is None or not any(is_int8(block) for block in folded.blocks):
            return {}
        tensors = {f"{i}.{name}": x for i, block in enumerate(folded.blocks) for name, x in block.named_buffers()}
        return {"int8": state_digest(tensors)}

    def _path(self, name: str) -> Path | None:
        """The file for the images of `name`; None: they are kept in memory."""
        if self.directory is None:
            return None
        images = self.facts[name]["images"]
        if images is None or self.facts[name]["read"] < self.facts[name]["num_images"]:
            return None  # a file must not be taken for that of images which nothing has compared
        key = hashlib.sha256(json.dumps(self._facts(name), sort_keys=True).encode()).hexdigest()
        return self.directory / f"{key[:32]}{_SUFFIX}"

    def _write(self, path: Path, name: str, data: Any) -> None:
        """Write a file of records, whole or not at all."""
        temporary, digest = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp"), hashlib.sha256()
        try:
            with open(temporary, "wb") as file:
                for _, rows in self._computed(data):
                    content = rows.numpy().data
                    digest.update(content)
                    file.write(content)
                described = json.dumps({"facts": self._facts(name), "sha256": digest.hexdigest()}).encode()
                file.write(described + len(described).to_bytes(8, "little"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _read(self, path: Path, count: int) -> Tensor | None:
        """Map the records (count, bytes) of a file; None, with a warning if it is damaged, if it has none."""
        if not path.is_file():
            return None
        size, digest = count * self.bytes, hashlib.sha256()
        with open(path, "rb") as file:
            left = size
            while left and (content := file.read(min(left, _CHUNK))):
                digest.update(content)
                left -= len(content)
            described = file.read()
        try:
            recorded = json.loads(described[:-8])
            whole = left == 0 and recorded["sha256"] == digest.hexdigest()
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            warnings.warn(f"{path} is damaged and is computed again", stacklevel=6)
            return None
        os.utime(path)
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).view(count, self.bytes)

    def _make_room(self, path: Path, needed: int) -> None:
        """Remove the files used least recently until `needed` bytes more are within `cache_gib`."""
        others = sorted(path.parent.glob(f"*{_SUFFIX}"), key=lambda other: other.stat().st_mtime)
        total = needed + sum(other.stat().st_size for other in others)
        for other in others:
            if total <= self.recipe.cache_gib * _GIB:
                return
            total -= other.stat().st_size
            other.unlink()


def reason_against(model: PromptedViT, recipe: Recipe, fixed: bool) -> str:
    """Return why a run keeps no constants; "" if it does.

    `fixed`: whether the images are the same in every epoch.
    """
    reason = "the recipe says cache='none'" if recipe.cache == "none" else model.has_constants()
    return reason or ("" if fixed else "the images may change from epoch to epoch")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def size_of(size: int) -> str:
    """Return a number of bytes for people."""
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 10 else f"{size / 2**20:.1f} MiB"
