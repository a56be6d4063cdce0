from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastprompt_client import Client, FolderError


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A folder that may be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def change(folder: Path, name: str, value: Any) -> None:
    """Another value in the manifest under a dotted name; `...` removes it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    *path, last = name.split(".")
    place = manifest
    for key in path:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


def replace(folder: Path, name: str, content: bytes) -> None:
    """Another file, and the manifest as if it belonged there."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros(3))
    return stream.getvalue()


def png(height: int, width: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, kind)
    return stream.getvalue()


def test_a_folder_is_read(folder: Path) -> None:
    found = Client(folder).folder
    assert (found.size, found.picture_size, found.patch, found.rows) == ((32, 32), (40, 32), 8, 1)
    assert (found.kind, found.placement, found.resize) == ("patches", "extend", "crop")
    assert found.class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("format", 2, "format must be 1, got 2"),
        ("format", ..., "format is missing"),
        ("format", 1.0, "format must be 1, got 1.0"),
        ("format", True, "format must be 1, got True"),
        ("backbone", 3, "backbone.image_size is missing"),
        ("backbone.image_size", [32], r"backbone.image_size must be \[height, width\]"),
        ("backbone.image_size", [32, 10**9], r"backbone.image_size must be \[height, width\]"),
        ("backbone.image_size", [True, 32], r"backbone.image_size must be \[height, width\]"),
        ("backbone.width", -1, "backbone.width must be a whole number"),
        ("backbone.width", 47, r"must be \(any, 47\)"),
        ("backbone.patch_size", 4, "picture_size must be"),
        ("backbone.name", None, "backbone.name must be of type str"),
        ("picture_size", [32, 32], r"picture_size must be \[40, 32\]"),
        ("prompts.kind", "latent", "prompts.kind must be one of"),
        ("prompts.placement", "border", "prompts.placement must be one of"),
        ("prompts.num_prompts", 8, "prompts.num_prompts must fill 1 rows of 4"),
        ("prompts.library_size", 13, "library.npy must be"),
        ("prompts.rest", 1, "prompts.rest must be of type bool"),
        ("prompts.round_pixels", 1, "prompts.round_pixels must be of type bool"),
        ("prompts.offset", True, "files must list offset.npy"),
        ("preprocessing.resize", "stretch", "preprocessing.resize must be one of"),
        ("head.kind", "svm", "head.kind must be one of"),
        ("head", None, "class_names must have one name for each class"),
        ("class_names", ["a"], "class_names must have one name for each class"),
        ("class_names", ["a", "b", 3], "class_names must be a list of texts"),
        ("golden.threshold", "0.999", "golden.threshold must be a number"),
        ("golden.threshold", float("nan"), "golden.threshold must be a number"),
        ("golden.threshold", 10**400, "golden.threshold must be a number"),
        ("golden.threshold", -5, "golden.threshold must be above 0 and at most 1, got -5"),
        ("golden.threshold", 0, "golden.threshold must be above 0 and at most 1, got 0"),
        ("golden.threshold", 1.001, "golden.threshold must be above 0 and at most 1, got 1.001"),
        ("golden.mistakes", [{}], r"golden.mistakes\[0\] must have a name"),
        ("golden.mistakes", [], "mistakes.npy must be"),
        ("files", [], "is not a manifest"),
        ("files", {}, "files must list"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_damaged_manifest_is_named(copy: Path, name: str, value: Any, message: str) -> None:
    change(copy, name, value)
    with pytest.raises(FolderError, match=message):
        Client(copy)


def test_a_manifest_from_before_round_pixels_means_true(copy: Path) -> None:
    change(copy, "prompts.round_pixels", False)
    assert Client(copy).folder.round_pixels is False
    change(copy, "prompts.round_pixels", ...)
    assert Client(copy).folder.round_pixels is True


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000], ids=lambda c: str(c[:4]))
def test_a_manifest_that_is_none(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(FolderError, match=r"manifest\.json is"):
        Client(copy)


@pytest.mark.parametrize(
    "name",
    [
        "generator.onnx",
        "library.npy",
        "library_rest.npy",
        "head_weight.npy",
        "mistakes.npy",
        "golden_picture.png",
        "golden_embedding.npy",
    ],
)
def test_a_missing_or_damaged_file_is_named(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FolderError, match=f"{name} is damaged: its sha256"):
        Client(copy)
    (copy / name).write_bytes(content[:-1])
    with pytest.raises(FolderError, match=f"{name} is damaged: it has"):
        Client(copy)
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        Client(copy)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("library.npy", npy(np.zeros((12, 191), np.uint8)), r"library.npy must be \(12, 192\) of uint8 or float32"),
        (
            "library.npy",
            npy(np.zeros((12, 192), np.int64)),
            "library.npy must be .* of uint8 or float32, got .* of int64",
        ),
        ("library.npy", npy(np.array([{}], object)), "library.npy is damaged"),
        ("library.npy", b"no array", "library.npy is damaged"),
        ("library.npy", b"", "library.npy is damaged"),
        ("library.npy", npz(), "library.npy is damaged"),
        ("library.npy", npz()[:50], "library.npy is damaged"),
        ("library.npy", npy(np.zeros((12, 192), np.uint8))[:-1], "library.npy is damaged"),
        ("library.npy", b"\x93NUMPY\x01\x00\x10\x00{'a':(((((((((((\n", "library.npy is damaged"),
        (
            "library.npy",
            b"\x93NUMPY\x01\x00\x48\x00"
            + b"{'descr': '|u1', 'fortran_order': False, 'shape': (12, 1e9)}".replace(b"1e9", b"1" + b"0" * 9).ljust(71)
            + b"\n",
            "library.npy is damaged",
        ),
        (
            "library.npy",
            b"\x93NUMPY\x01\x00\x96\x00"
            + b"{'descr': '|u1', 'fortran_order': False, 'shape': (12, 1e9)}".replace(b"1e9", b"1" + b"0" * 40).ljust(
                149
            )
            + b"\n",
            "library.npy is damaged",
        ),
        ("library.npy", b"\x93NUMPY\x09\x00\x40\x00{'descr'", "library.npy is damaged"),
        ("golden_picture.png", b"xx", "golden_picture.png is damaged: image cannot be read"),
        ("golden_image.png", b"xx", "golden_image.png is damaged: image cannot be read"),
        (
            "golden_image.png",
            png(40, 32),
            "golden_image.png is damaged: image must have from 1 to 1,024 pixels, got 32 x 40",
        ),
        ("golden_image.png", png(32, 31), "golden_image.png must be a PNG file of 32 x 32 pixels"),
        ("golden_picture.png", png(32, 40), "golden_picture.png must be a PNG file of 40 x 32 pixels"),
        ("golden_picture.png", png(40, 32, "JPEG"), "golden_picture.png must be a PNG file of 40 x 32 pixels"),
        ("head_bias.npy", npy(np.full(3, np.nan, np.float32)), "head_bias.npy must be finite"),
        ("head_weight.npy", npy(np.zeros((3, 48, 1), np.float32)), r"head_weight.npy must be \(any, 48\)"),
        ("generator.onnx", b"no graph", "generator.onnx is not a graph that fastprompt writes: model has a field 13"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_file_that_does_not_fit_is_named(copy: Path, name: str, content: bytes, message: str) -> None:
    replace(copy, name, content)
    with pytest.raises(FolderError, match=message):
        Client(copy)


def test_weights_that_are_not_finite_are_named(copy: Path, host: Any) -> None:
    import onnx
    from onnx import numpy_helper

    made = onnx.load_from_string((copy / "generator.onnx").read_bytes())
    bias = next(constant for constant in made.graph.initializer if constant.name == made.graph.node[-3].input[2])
    bias.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(bias), np.nan), bias.name))
    replace(copy, "generator.onnx", made.SerializeToString())
    with pytest.raises(FolderError, match=r"generator\.onnx must return finite weights"):
        Client(copy).verify(host.url)
    assert not host.requests


def test_a_picture_that_this_machine_does_not_make_stops_verify(copy: Path, host: Any) -> None:
    replace(copy, "golden_image.png", png(32, 32))
    with pytest.raises(FolderError, match=r"golden_picture\.png is not the picture that this machine makes"):
        Client(copy).verify(host.url)
    assert not host.requests


def test_few_pixels_of_an_image_do_not_stop_verify(folder: Path, host: Any) -> None:
    assert Client(folder, max_pixels=100).verify(host.url).ok


def test_what_is_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"must be a folder, got .*; create it with `fastprompt export RUN --client"
    ):
        Client(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"without manifest\.json"):
        Client(tmp_path)
