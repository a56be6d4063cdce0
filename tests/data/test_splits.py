from __future__ import annotations

import json
import os
import pickle
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastprompt.data import load_data, splits
from fastprompt.data.pools import Pool, Source
from fastprompt.data.splits import ImageSet, draw, split


def read(counts, i):
    counts[i] = counts.get(i, 0) + 1
    return torch.full((1, 8, 8), i % 256, dtype=torch.uint8)


def pool(labels, part="train", counts=None):
    return Pool(labels, [f"{part}/{i}" for i in range(len(labels))], partial(read, {} if counts is None else counts))


def make(source, **options):
    defaults = {
        "size": (8, 8),
        "num_train": None,
        "num_val": None,
        "num_test": None,
        "seed": 0,
        "resize": "crop",
        "augment": None,
        "augment_name": "none",
    }
    return split(source, **{**defaults, **options})


@pytest.fixture
def plain():
    return Source("plain", ["a", "b"], pool([0] * 150 + [1] * 50))


def keys(part):
    return [part.pool.keys[i] for i in part.indices]


def test_splits_are_disjoint_stratified_and_cover_all(plain):
    data = make(plain)
    parts = [set(keys(part)) for part in (data.train, data.val, data.test)]
    assert [len(part) for part in parts] == [128, 32, 40]
    assert len(set.union(*parts)) == 200
    assert Counter(data.train.labels) == {0: 96, 1: 32}
    assert Counter(data.val.labels) == {0: 24, 1: 8}


def test_seed_moves_train_and_val_but_never_test(plain):
    one, same, other = make(plain, num_train=40), make(plain, num_train=40), make(plain, num_train=40, seed=1)
    assert keys(one.train) == keys(same.train)
    assert one.summary()["sha256"] == same.summary()["sha256"] != other.summary()["sha256"]
    assert set(keys(one.train)) != set(keys(other.train))
    assert set(keys(one.val)) != set(keys(other.val))
    assert keys(one.test) == keys(other.test)


def test_the_split_is_the_same_on_every_machine(plain):
    assert make(plain, num_train=8, num_val=2, num_test=4).summary()["sha256"] == (
        "581af4f15fe975013dc0ac690d30c5293507fbc144eaf19b8a441b217d6f1038"
    )


def test_smaller_val_and_test_are_part_of_the_larger(plain):
    small, large = make(plain, num_val=10, num_test=20), make(plain, num_val=20, num_test=40)
    assert set(keys(small.test)) < set(keys(large.test))


def test_publishers_test_and_val_stay(plain):
    source = Source("official", ["a", "b"], plain.train, pool([0, 1] * 20, "val"), pool([0, 1] * 30, "test"))
    data = make(source, num_test=10)
    assert len(data.train) == 200
    assert all(key.startswith("val/") for key in keys(data.val))
    test = data.test
    assert all(key.startswith("test/") for key in keys(test))
    assert Counter(test.labels) == {0: 5, 1: 5}
    assert len(data.val) == 40


def test_default_val_is_a_quarter_of_num_train(plain):
    data = make(plain, num_train=80)
    assert (len(data.train), len(data.val)) == (80, 20)


def test_test_split_can_be_read_once(plain):
    data = make(plain)
    assert len(data.summary())
    assert "test" in repr(data)
    test = data.test
    assert len(test) == 40
    with pytest.raises(RuntimeError, match="Read it once, at the end"):
        data.test  # noqa: B018
    assert data.test_reads == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train": 161}, "num_train must be at most 159, the number of images available, got 161"),
        ({"num_val": 161}, "num_val must be at most 160, the number of images available, got 161"),
        ({"num_test": 201}, "num_test must be at most 200, the number of images available, got 201"),
        ({"num_test": 200, "num_val": 1}, "num_val must be at most 0, the number of images available, got 1"),
        ({"num_val": 160}, "leaves no image for the train split"),
    ],
)
def test_more_images_than_there_are(plain, options, message):
    with pytest.raises(ValueError, match=message):
        make(plain, **options)


@pytest.mark.parametrize("number", [1, 2, 3, 7, 10, 99])
def test_draw_keeps_rare_classes_and_the_number(number):
    labels = [0] * 90 + [1] * 8 + [2, 2]
    taken = draw(labels, range(100), number, 0, "train", "num_train")
    assert len(taken) == len(set(taken)) == number
    if number >= 3:
        assert {labels[i] for i in taken} == {0, 1, 2}
    assert Counter(labels[i] for i in taken)[0] <= 90


def sized(*sizes):
    """A source to be split whose class c has sizes[c] images."""
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    return Source("sized", [f"class{label}" for label in range(len(sizes))], pool(labels))


@pytest.mark.parametrize(
    "sizes", [(9, 1), (1, 9), (8, 2), (1, 1, 1, 20), (2, 2, 2, 2, 2), (3, 1), (2, 2), (1, 40, 2, 3)]
)
@pytest.mark.parametrize("options", [{}, {"seed": 5}, {"num_val": 1}, {"num_test": 1}])
def test_every_class_is_trained_on_before_any_is_tested(sizes, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = make(sized(*sizes), **options)
    assert set(data.train.labels) == set(range(len(sizes)))
    assert len(data.train) + len(data.val) + len(data.test) == sum(sizes)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 1, 1, 1), (1,) * 50])
def test_too_few_images_to_split_are_an_error_that_says_what_to_do(sizes):
    with pytest.raises(ValueError, match=r"leaves no image for the (test|val) split: sized.*or give num_(test|val)"):
        make(sized(*sizes))


def test_classes_that_asked_for_numbers_leave_untrained_are_named():
    with pytest.warns(UserWarning, match=r"1 of 2 classes of sized have no training image.*: class0"):
        make(sized(9, 1), num_test=8, num_val=1)


@pytest.mark.parametrize("case", range(60))
def test_draw_takes_the_number_in_proportion_and_leaves_one(case):
    random = np.random.default_rng(case)
    sizes = random.integers(1, 30, random.integers(2, 8)).tolist()
    number, leave_one, seed = int(random.integers(1, sum(sizes) + 1)), bool(random.integers(2)), int(random.integers(3))
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    taken = draw(labels, range(len(labels)), number, seed, "val", "num_val", leave_one=leave_one)
    counts = Counter(labels[i] for i in taken)
    assert len(taken) == len(set(taken)) == number
    if leave_one and number <= len(labels) - len(sizes):
        assert all(counts[label] < size for label, size in enumerate(sizes))
    elif number >= len(sizes):
        assert len(counts) == len(sizes)


def test_images_are_decoded_once_and_labels_without_decoding():
    counts = {}
    data = ImageSet(pool([0, 1, 1], counts=counts), [2, 0], (8, 8), "crop")
    assert data.labels == [1, 0]
    assert not counts
    for _ in range(3):
        image, label = data[0]
        assert (image.shape, image.dtype, label) == ((3, 8, 8), torch.uint8, 1)
        assert image.unique().tolist() == [2]
        image.zero_()  # the caller's copy
    assert torch.equal(data[-1][0], data[1][0])
    assert counts == {2: 1, 0: 1}
    with pytest.raises(IndexError, match="out of range"):
        data[2]
    assert [label for _, label in data] == [1, 0]


def test_large_splits_are_decoded_each_time(monkeypatch):
    monkeypatch.setattr(splits, "KEEP_BYTES", 100)
    counts = {}
    data = ImageSet(pool([0, 1], counts=counts), [0, 1], (8, 8), "crop")
    data[0], data[0]
    assert counts == {0: 2}


def test_augmentation_repeats_and_changes_with_the_epoch(plain):
    def noise(image):
        return torch.randint(0, 256, image.shape, dtype=torch.uint8)

    def run(epoch, seed=0):
        data = make(plain, augment=noise, seed=seed)
        data.train.set_epoch(epoch)
        return torch.stack([data.train[i][0] for i in range(5)])

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert not torch.equal(run(0), run(0, seed=1))
    assert len(run(0).flatten(1).unique(dim=0)) == 5
    data = make(plain, augment=noise)
    assert torch.equal(data.val[0][0], data.val[0][0])
    assert data.val.augment is None
    assert data.test.augment is None


def test_datasets_travel_to_worker_processes(plain):
    data = make(plain)
    back = pickle.loads(pickle.dumps(data.train))
    assert torch.equal(back[3][0], data.train[3][0])
    loader = torch.utils.data.DataLoader(data.val, batch_size=8, num_workers=1)
    assert sum(len(labels) for _, labels in loader) == len(data.val)


def test_a_split_says_what_its_images_do_not_show(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(8):
            Image.new("RGB", (32, 32), (i, len(name), 99)).save(tmp_path / name / f"{i}.png")

    def identity(**options: Any) -> dict[str, Any]:
        return load_data(tmp_path, image_size=32, **options).train.identity()

    plain = identity()
    assert plain == identity()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["augment_seed"] is None
    changed = {"resize": identity(resize="squash"), "augment": identity(augment="flip"), "files": identity(seed=1)}
    for key, found in changed.items():
        assert found[key] != plain[key], key
    assert identity(augment="flip") != identity(augment="crop")
    assert identity(augment="flip", seed=1)["augment_seed"] == 1
    assert identity(augment=torch.flipud) == identity(augment=torch.flipud)  # no address of the function in it
    for path in tmp_path.rglob("*.png"):
        os.utime(path, (1, 1))
    assert identity()["files"] != plain["files"]
    assert {key: value for key, value in identity().items() if key != "files"} == {
        key: value for key, value in plain.items() if key != "files"
    }
