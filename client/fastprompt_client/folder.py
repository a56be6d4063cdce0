"""Read and validate the untrusted folder written by `fastprompt export --client`."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastprompt_client import pictures
from fastprompt_client.graph import GraphError, check_graph

FORMAT = 1
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 16 << 20
LARGEST_FILE = 2 << 30
LARGEST_NUMBER = 1e30


class FolderError(ValueError):
    """A file of the folder is missing, damaged or does not fit the others; the message names it."""


@dataclasses.dataclass(frozen=True)
class Head:
    """Maps features (n, D) to logits (n, C).

    Attributes:
        kind: "linear" is W f + b. "cosine" is scale · cos(MLP(f), rows), with GELU between the layers of the MLP.
        rows: (C, E). bias: (C,), for "linear". scale: for "cosine".
        layers: [(weight (out, in), bias (out,)), ...] of the MLP.
    """

    kind: str
    rows: np.ndarray
    bias: np.ndarray | None = None
    scale: float = 1.0
    layers: tuple[tuple[np.ndarray, np.ndarray], ...] = ()

    @property
    def ignores_length(self) -> bool:
        """Whether features of another length, for example normalised ones, give the same logits."""
        return self.kind == "cosine" and len(self.layers) <= 1 and not any(bias.any() for _, bias in self.layers)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        x = features.astype(np.float32)
        if self.kind == "linear":
            assert self.bias is not None
            return x @ self.rows.T + self.bias
        for i, (weight, bias) in enumerate(self.layers):
            x = (gelu(x) if i else x) @ weight.T + bias
        return self.scale * (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)) @ self.rows.T


@dataclasses.dataclass(frozen=True)
class Folder:
    """The contents of a folder. Pixels are levels from 0 to 255; p is the patch size.

    Attributes:
        name, fingerprint, readout: the backbone that the host must run. width: D of its features.
        size: (H, W) of the resized images. picture_size: (H', W) of the pictures for the host.
        patch: p. resize: "crop" or "squash".
        intensity_range: the values of grey images with more than 8 bits that become black and white; None is the
            default of `open_image`.
        kind: "patches" or "border". placement: "extend" or "replace", for patches. rows: number of rows of patches.
        round_pixels: whether training rounded pixels to levels.
        graph: the ONNX file; None without patches. library: (M, 3p²) float32. offset: (K, 3p²) or None.
        added: (H, W, 3) levels added to the image, or None.
        head: None for a model without a head. class_names: C names, or None.
        golden_image, golden_picture: PNG files. golden_embedding: (D,). threshold: lowest accepted cosine.
        mistakes: (n, D) embeddings. mistake_names, mistake_details: n texts each.
        manifest: the whole manifest.
    """

    name: str
    fingerprint: str
    readout: str
    width: int
    size: tuple[int, int]
    picture_size: tuple[int, int]
    patch: int
    resize: str
    intensity_range: tuple[float, float] | None
    kind: str
    placement: str
    rows: int
    round_pixels: bool
    graph: bytes | None
    library: np.ndarray | None
    offset: np.ndarray | None
    added: np.ndarray | None
    head: Head | None
    class_names: tuple[str, ...] | None
    golden_image: bytes
    golden_picture: bytes
    golden_embedding: np.ndarray
    threshold: float
    mistakes: np.ndarray
    mistake_names: tuple[str, ...]
    mistake_details: tuple[str, ...]
    manifest: dict[str, Any]


def gelu(x: np.ndarray) -> np.ndarray:
    """Compute x Φ(x) with the error function."""
    return (x * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2)))).astype(np.float32)


def read_folder(folder: str | os.PathLike[str]) -> Folder:
    """Read and validate a folder.

    Raises:
        FileNotFoundError: `folder` is not a folder, or a file in it is missing.
        FolderError: a file is damaged, or has a format that this client does not read.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(
            f"folder must be a folder, got {path}; create it with `fastprompt export RUN --client --out {path}`"
        )
    manifest = _read_manifest(path)
    fields = _Fields(manifest, path / MANIFEST)
    if type(fields.get("format")) is not int or manifest["format"] != FORMAT:
        raise FolderError(
            f"{path / MANIFEST}: format must be {FORMAT}, got {manifest.get('format')!r}; "
            "install the fastprompt-client of the version that wrote it"
        )
    height, width = fields.sides("backbone.image_size")
    picture_size = fields.sides("picture_size")
    features, patch = fields.whole("backbone.width"), fields.whole("backbone.patch_size")
    kind = fields.choice("prompts.kind", ("patches", "border"))
    placement = fields.choice("prompts.placement", ("extend", "replace")) if kind == "patches" else "border"
    rows = fields.whole("prompts.rows") if kind == "patches" else 0
    expected = (height + rows * patch if placement == "extend" else height, width)
    if picture_size != expected:
        raise FolderError(
            f"{path / MANIFEST}: picture_size must be {list(expected)} with placement {placement!r}, "
            f"got {list(picture_size)}"
        )
    if placement == "replace" and rows * patch >= height:
        raise FolderError(f"{path / MANIFEST}: prompts.rows must leave rows for the image, got {rows}")

    def array(name: str, shape: tuple[int | None, ...], *dtypes: str) -> np.ndarray:
        return _array(path / name, _content(path, name, manifest), shape, dtypes or ("float32",))

    graph = library = offset = added = None
    rounds = True
    if kind == "patches":
        count, entries = fields.whole("prompts.num_prompts"), fields.whole("prompts.library_size")
        if count * patch != rows * width:
            raise FolderError(
                f"{path / MANIFEST}: prompts.num_prompts must fill {rows} rows of {width // patch} patches, got {count}"
            )
        graph = _content(path, "generator.onnx", manifest)
        library = array("library.npy", (entries, 3 * patch**2), "uint8", "float32").astype(np.float32)
        rounds = fields.get("prompts.round_pixels", bool) if "round_pixels" in fields.get("prompts") else True
        if fields.get("prompts.rest", bool):
            library = library + array("library_rest.npy", library.shape, "float16")
        if fields.get("prompts.offset", bool):
            offset = array("offset.npy", (count, 3 * patch**2))
        try:
            check_graph(graph, (1, height, width, 3), (count, entries))
        except GraphError as error:
            raise FolderError(f"{path / 'generator.onnx'} is not a graph that fastprompt writes: {error}") from error
    if fields.get("prompts.added", bool):
        added = array("added.npy", (height, width, 3))
    least = fields.number("golden.threshold")
    if not 0 < least <= 1:
        raise FolderError(f"{path / MANIFEST}: golden.threshold must be above 0 and at most 1, got {least}")
    head = _head(fields, array, features)
    names = fields.texts("class_names") if manifest.get("class_names") is not None else None
    if (head is None) != (names is None) or (head is not None and names is not None and len(head.rows) != len(names)):
        raise FolderError(f"{path / MANIFEST}: class_names must have one name for each class of the head")
    mistakes = fields.get("golden.mistakes", list)
    for i, mistake in enumerate(mistakes):
        if not isinstance(mistake, dict) or not all(isinstance(mistake.get(k), str) for k in ("name", "detail")):
            raise FolderError(f"{path / MANIFEST}: golden.mistakes[{i}] must have a name and a detail")
    return Folder(
        name=fields.get("backbone.name", str),
        fingerprint=fields.get("backbone.fingerprint", str),
        readout=fields.get("backbone.readout", str),
        width=features,
        size=(height, width),
        picture_size=picture_size,
        patch=patch,
        resize=fields.choice("preprocessing.resize", ("crop", "squash")),
        intensity_range=fields.range("preprocessing.intensity_range"),
        kind=kind,
        placement=placement,
        rows=rows,
        round_pixels=rounds,
        graph=graph,
        library=library,
        offset=offset,
        added=added,
        head=head,
        class_names=names,
        golden_image=_png(path, "golden_image.png", manifest, (height, width)),
        golden_picture=_png(path, "golden_picture.png", manifest, picture_size),
        golden_embedding=array("golden_embedding.npy", (features,)),
        threshold=least,
        mistakes=array("mistakes.npy", (len(mistakes), features)),
        mistake_names=tuple(mistake["name"] for mistake in mistakes),
        mistake_details=tuple(mistake["detail"] for mistake in mistakes),
        manifest=manifest,
    )


class _Fields:
    """Access to the manifest's values by dotted name; raises a FolderError naming a missing or invalid value."""

    def __init__(self, manifest: dict[str, Any], path: Path) -> None:
        self.manifest, self.path = manifest, path

    def get(self, name: str, kind: type = object) -> Any:
        value: Any = self.manifest
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                raise FolderError(f"{self.path}: {name} is missing")
            value = value[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
            raise FolderError(f"{self.path}: {name} must be of type {kind.__name__}, got {value!r}")
        return value

    def whole(self, name: str) -> int:
        value = self.get(name, int)
        if not 1 <= value <= 1 << 20:
            raise FolderError(f"{self.path}: {name} must be a whole number of at least 1, got {value!r}")
        return value

    def number(self, name: str) -> float:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST_NUMBER:
            raise FolderError(f"{self.path}: {name} must be a number, got {str(value)[:50]}")
        return float(value)

    def sides(self, name: str) -> tuple[int, int]:
        value = self.get(name, list)
        if len(value) != 2 or any(type(side) is not int or not 1 <= side <= 1 << 14 for side in value):
            raise FolderError(f"{self.path}: {name} must be [height, width] in pixels, got {value!r}")
        return value[0], value[1]

    def range(self, name: str) -> tuple[float, float] | None:
        """Return two numbers, the lower first; None if the value is missing, as in folders of earlier versions."""
        if self.get(name.rpartition(".")[0], dict).get(name.rpartition(".")[2]) is None:
            return None
        value = self.get(name, list)
        if len(value) != 2 or not all(type(v) in (int, float) and abs(v) <= LARGEST_NUMBER for v in value):
            raise FolderError(f"{self.path}: {name} must be [low, high], got {value!r}")
        if not value[0] < value[1]:
            raise FolderError(f"{self.path}: {name} must have the lower number first, got {value!r}")
        return float(value[0]), float(value[1])

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.get(name, str)
        if value not in choices:
            raise FolderError(f"{self.path}: {name} must be one of {choices}, got {value!r}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.get(name, list)
        if not all(isinstance(text, str) for text in value):
            raise FolderError(f"{self.path}: {name} must be a list of texts")
        return tuple(value)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"folder must be one for fastprompt's client, got {path} without {MANIFEST}")
    if file.stat().st_size > LARGEST_MANIFEST:
        raise FolderError(f"{file} must have at most {LARGEST_MANIFEST} bytes, got {file.stat().st_size}")
    try:
        manifest = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{file} is damaged: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise FolderError(f"{file} is not a manifest of fastprompt's client")
    return manifest


def _content(path: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """Return the bytes of a file after checking its size and sha256 against the manifest."""
    stated, file = manifest["files"].get(name), path / name
    if not isinstance(stated, dict) or type(stated.get("bytes")) is not int:
        raise FolderError(f"{path / MANIFEST}: files must list {name}")
    if not file.is_file():
        raise FileNotFoundError(f"folder: {file} is missing")
    if file.stat().st_size != stated["bytes"] or stated["bytes"] > LARGEST_FILE:
        raise FolderError(f"{file} is damaged: it has {file.stat().st_size} bytes, the manifest says {stated['bytes']}")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != stated.get("sha256"):
        raise FolderError(f"{file} is damaged: its sha256 differs from the manifest's")
    return content


def _png(path: Path, name: str, manifest: dict[str, Any], size: tuple[int, int]) -> bytes:
    """Return the bytes of a PNG file after checking that its picture has the size (H, W)."""
    content = _content(path, name, manifest)
    try:
        opened = pictures.open_image(content, size[0] * size[1])
    except ValueError as error:
        raise FolderError(f"{path / name} is damaged: {error}") from error
    if not content.startswith(b"\x89PNG") or (opened.height, opened.width) != size:
        raise FolderError(f"{path / name} must be a PNG file of {size[0]} x {size[1]} pixels")
    return content


def _array(file: Path, content: bytes, shape: tuple[int | None, ...], dtypes: tuple[str, ...]) -> np.ndarray:
    try:
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # numpy tokenizes the header as Python, so errors vary
        raise FolderError(f"{file} is damaged: {error}") from error
    fits = array.ndim == len(shape) and all(want in (None, got) for got, want in zip(array.shape, shape, strict=True))
    if not fits or array.dtype.name not in dtypes:
        wanted = ", ".join("any" if side is None else str(side) for side in shape)
        raise FolderError(f"{file} must be ({wanted}) of {' or '.join(dtypes)}, got {array.shape} of {array.dtype}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise FolderError(f"{file} must be finite, got NaN or infinite values")
    return array


def _head(fields: _Fields, array: Callable[..., np.ndarray], features: int) -> Head | None:
    if fields.manifest.get("head") is None:
        return None
    if fields.choice("head.kind", ("linear", "cosine")) == "linear":
        rows = array("head_weight.npy", (None, features))
        return Head("linear", rows, array("head_bias.npy", (len(rows),)))
    layers, width = [], features
    count = fields.get("head.layers", int)
    if not 0 <= count <= 16:
        raise FolderError(f"{fields.path}: head.layers must be from 0 to 16, got {count}")
    for i in range(count):
        weight = array(f"projection{i}_weight.npy", (None, width))
        width = len(weight)
        layers.append((weight, array(f"projection{i}_bias.npy", (width,))))
    rows = array("class_embeddings.npy", (None, width))
    return Head("cosine", rows, scale=fields.number("head.scale"), layers=tuple(layers))
