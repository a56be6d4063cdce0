from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_protocols import CLASSES, SIDE, SIZES, make_image, make_task, small
from torchvision.datasets import CIFAR10

import fastprompt as fp
from fastprompt.data import DataSplits
from fastprompt.protocols import Protocol

LAYOUTS = {
    "lists": ("vtab1k", "dtd"),
    "json": ("fgvc", "cub"),
    "coop": ("pgn12", "dtd"),
    "clevr": ("pgn12", "clevr-count"),
    "torchvision": ("hta", "cifar10"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Protocol, str, Path]]:
    """Layout -> protocol, task, data root."""
    found = {}
    for layout, (name, task) in LAYOUTS.items():
        root = tmp_path_factory.mktemp(layout)
        sizes = {"train": 9, "val": 3} if layout in ("torchvision", "clevr") else {}  # 80 % of 12 images
        protocol = small(name, [task], **sizes)
        make_task(protocol.task(task), root)
        found[layout] = (protocol, task, root)
    return found


@pytest.fixture(autouse=True)
def unchecked_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    meta = {"filename": "batches.meta", "key": "label_names", "md5": None}
    monkeypatch.setattr(CIFAR10, "meta", meta)


def keys(data: DataSplits) -> dict[str, set[str]]:
    parts = {"train": data.train, "val": data.val, "test": data._test}
    return {name: {part.pool.keys[i] for i in part.indices} for name, part in parts.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_protocols_splits(layout: str, made: dict[str, tuple[Protocol, str, Path]]) -> None:
    protocol, name, root = made[layout]
    task = protocol.task(name)
    data = protocol.load(name, root)
    assert (len(data.train), len(data.val), len(data._test)) == (task.train, task.val, task.test)
    assert data.num_classes == CLASSES
    found = keys(data)
    assert not found["train"] & found["val"]
    assert not (found["train"] | found["val"]) & found["test"]
    image, label = data.train[0]
    assert image.shape == (3, SIDE, SIDE)
    if layout != "torchvision":
        bright = [float(image.float().mean()) > 125 for image, _ in data.val]
        assert bright == [label == 1 for label in data.val.labels]
    assert label in (0, 1)
    assert data.summary()["task"] == name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_test_split_is_locked_until_the_final_run(layout: str, made: dict[str, tuple[Protocol, str, Path]]) -> None:
    protocol, name, root = made[layout]
    with pytest.raises(RuntimeError, match=r"test split of .* is locked: .*final"):
        _ = protocol.load(name, root).test
    data = protocol.load(name, root, final=True)
    task = protocol.task(name)
    together = task.train + (task.val if protocol.final_train == "train+val" else 0)
    assert len(data.train) == together
    assert len(data.test) == task.test
    assert data.test_reads == 1


def test_names_come_from_the_publisher(made: dict[str, tuple[Protocol, str, Path]]) -> None:
    names = {layout: p.load(task, root).class_names for layout, (p, task, root) in made.items()}
    assert names["coop"] == names["torchvision"] == ["class 0", "class 1"]
    assert names["clevr"] == ["3", "4"]
    assert names["json"] == ["1", "2"]


def test_validation_images_taken_out_of_the_training_images(tmp_path: Path) -> None:
    """By the protocol: the last fifth, or a fifth drawn by class, which is the same for every seed."""
    protocol = small("hta", ["cifar10"], train=16, val=4)
    make_task(protocol.task("cifar10"), tmp_path)
    last = protocol.load("cifar10", tmp_path)
    assert keys(last)["val"] == {f"train/{i}" for i in range(16, 20)}
    drawn = small("pgn12", ["clevr-count"], train=16, val=4)
    make_task(drawn.task("clevr-count"), tmp_path)
    of_seeds = [keys(drawn.load("clevr-count", tmp_path, seed=seed))["val"] for seed in (0, 1)]
    assert of_seeds[0] == of_seeds[1]
    assert sorted(drawn.load("clevr-count", tmp_path).val.labels) == [0, 0, 1, 1]


def test_few_images_of_each_class(made: dict[str, tuple[Protocol, str, Path]]) -> None:
    protocol, name, root = made["lists"]
    data = {n: protocol.load(name, root, per_class=n, seed=3) for n in (1, 2)}
    for n, splits in data.items():
        assert sorted(splits.train.labels) == sorted(splits.val.labels) == sorted([0, 1] * n)
    assert keys(data[1])["train"] < keys(data[2])["train"]
    drawn = {frozenset(keys(protocol.load(name, root, per_class=1, seed=seed))["train"]) for seed in range(8)}
    assert len(drawn) > 1
    final = protocol.load(name, root, per_class=1, seed=3, final=True)
    assert keys(final)["train"] == keys(data[1])["train"], "the final run trains on no more"


def remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def rewrite(name: str, old: str, new: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def link(folder: Path) -> None:
    first = folder / "images" / "train800" / "000000.png"
    other = folder / "images" / "val200" / "000008.png"
    other.unlink()
    other.hardlink_to(first)


def short_labels(folder: Path) -> None:
    np.save(folder / "clevr_count" / "train_labels.npy", np.array(["count_3"]))


def strange_count(folder: Path) -> None:
    path = folder / "clevr_count" / "val_labels.npy"
    np.save(path, np.array(["count_12", *np.load(path)[1:]]))


def twice_in_json(folder: Path) -> None:
    (folder / "train.json").write_text('{"a.png": 1, "a.png": 2}')


def nested_json(folder: Path) -> None:
    (folder / "train.json").write_text("[" * 100_000)


SPLIT_ZHOU = "split_zhou_DescribableTextures.json"
DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("lists", remove("val200.txt"), r"val200\.txt is missing"),
    ("lists", remove("images/test/000012.png"), r"1 of the listed files do not exist: .*000012\.png"),
    ("lists", rewrite("test.txt", "000012.png 0", "000012.png"), r'test\.txt:1: must be "path label"'),
    (
        "lists",
        rewrite("test.txt", "000013.png 1", "000013.png 2"),
        r"test\.txt:2: must have a class from 0 to 1",
    ),
    ("lists", rewrite("test.txt", "000012.png", "000013.png"), r"1 file\(s\) are listed twice or are in two splits"),
    ("lists", rewrite("test.txt", "images/test/000012", "images/train800/000000"), r"in two splits: train: .*test: "),
    ("lists", link, r"in two splits: train: .*val: "),
    ("lists", rewrite("test.txt", "images/test", "../images/test"), r"test\.txt:1: must name a file below"),
    (
        "lists",
        rewrite("val200.txt", "000008.png 0\n", "000008.png 1\n"),
        r"train800val200\.txt: must list",
    ),
    ("json", remove("test.json"), r"test\.json is missing"),
    ("json", rewrite("val.json", "}", ""), r"val\.json is corrupted"),
    ("json", rewrite("val.json", ": 1", ": 7"), r"val\.json: has classes that train\.json does not have: \[7\]"),
    ("json", twice_in_json, r"train\.json is corrupted: a key occurs twice: 'a\.png'"),
    ("json", nested_json, r"train\.json is corrupted: it is nested too deeply"),
    ("json", lambda folder: shutil.rmtree(folder / "images"), r"has no folder images with the images of CUB"),
    ("coop", rewrite(SPLIT_ZHOU, '"class 0"', '"class 9"'), r"train\[2\]: class 0 is 'class 9' elsewhere"),
    ("coop", rewrite(SPLIT_ZHOU, '"val"', '"vol"'), r"must be an object with the splits train, val, test"),
    ("coop", rewrite(SPLIT_ZHOU, '0, "class 0"]', "0]"), r"train\[0\]: must be \[path, class, class name\]"),
    ("clevr", short_labels, r"train_images\.npy has 12 images, .*train_labels\.npy 1 labels"),
    ("clevr", strange_count, r"val_labels\.npy: entry 0: must have a class from 0 to 1, got 9"),
    ("clevr", remove("clevr_count/val_images.npy"), r"val_images\.npy is missing"),
]


@pytest.mark.parametrize(("layout", "change", "message"), DAMAGE, ids=[f"{d[0]}-{i}" for i, d in enumerate(DAMAGE)])
def test_damaged_data_are_refused_by_file(
    layout: str,
    change: Callable[[Path], Any],
    message: str,
    made: dict[str, tuple[Protocol, str, Path]],
    tmp_path: Path,
) -> None:
    protocol, name, root = made[layout]
    shutil.copytree(root, tmp_path / "data")
    change(tmp_path / "data" / protocol.task(name).folders[0])
    with pytest.raises(ValueError, match=message):
        protocol.load(name, tmp_path / "data")


def test_a_broken_image_is_named_or_skipped(made: dict[str, tuple[Protocol, str, Path]], tmp_path: Path) -> None:
    protocol, name, root = made["lists"]
    shutil.copytree(root, tmp_path / "data")
    broken = tmp_path / "data" / "dtd" / "images" / "train800" / "000003.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cannot be read: .*000003\.png"):
        protocol.load(name, tmp_path / "data")
    with pytest.warns(UserWarning, match=r"skipped 1 image file"):
        assert len(protocol.load(name, tmp_path / "data", on_bad="skip").train) == SIZES["train"] - 1
    unread = tmp_path / "data" / "dtd" / "images" / "test" / "000012.png"
    unread.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"skipped 1 image file"):
        protocol.load(name, tmp_path / "data", on_bad="skip")  # the locked images are not opened
    with pytest.warns(UserWarning, match=r"skipped 2 image file"):
        assert len(protocol.load(name, tmp_path / "data", on_bad="skip", final=True).test) == SIZES["test"] - 1


def test_other_numbers_of_images_are_an_error_or_a_warning(made: dict[str, tuple[Protocol, str, Path]]) -> None:
    _, name, root = made["lists"]
    confirmed = small("vtab1k", [name], test=7)
    with pytest.raises(ValueError, match="vtab1k:dtd must have 7 test images, got 6"):
        confirmed.load(name, root)
    recalled = small("vtab1k", [name], test=7)
    object.__setattr__(recalled.task(name), "unconfirmed", ("test",))
    with pytest.warns(UserWarning, match="must have 7 test images, got 6; the protocol's number is from memory"):
        recalled.load(name, root)


def test_equal_images_in_two_splits_are_told(made: dict[str, tuple[Protocol, str, Path]], tmp_path: Path) -> None:
    protocol, name, root = made["lists"]
    shutil.copytree(root, tmp_path / "data")
    make_image(tmp_path / "data" / "dtd" / "images" / "val200" / "000008.png", 0, 0)
    with pytest.warns(UserWarning, match=r"same contents are in several splits \(1 of train, 1 of val\)"):
        protocol.load(name, tmp_path / "data")


def test_a_list_that_is_not_the_published_one(made: dict[str, tuple[Protocol, str, Path]]) -> None:
    protocol, name, root = made["coop"]
    object.__setattr__(protocol.task(name), "sha256", "0" * 64)
    try:
        with pytest.raises(ValueError, match="is not the published list"):
            protocol.load(name, root)
    finally:
        object.__setattr__(protocol.task(name), "sha256", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_class": 0}, "per_class must be at least 1"),
        ({"per_class": True}, "per_class must be an integer"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"seed": None}, "seed must be an integer"),
        ({"final": 1}, "final must be True or False"),
        ({"augment": "spin"}, "augment must be one of"),
        ({"on_bad": "guess"}, "on_bad must be one of"),
        ({"image_size": 0}, "image_size must be positive"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str, made: dict[str, tuple[Protocol, str, Path]]) -> None:
    protocol, name, root = made["lists"]
    with pytest.raises(ValueError, match=message):
        protocol.load(name, root, **arguments)


def test_missing_data_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"root must hold vtab1k:dtd, but there is no .*/dtd\. Put one folder"):
        fp.load_protocol("vtab1k").load("dtd", tmp_path)


def test_the_json_of_the_publisher_is_read_as_it_is(made: dict[str, tuple[Protocol, str, Path]]) -> None:
    protocol, name, root = made["json"]
    listed = json.loads((root / "CUB_200_2011" / "train.json").read_text())
    data = protocol.load(name, root)
    found = {data.train.pool.keys[i].removeprefix("images/"): data.train.pool.labels[i] for i in data.train.indices}
    assert found == {path: label - 1 for path, label in listed.items()}
