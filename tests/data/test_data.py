from __future__ import annotations

import pytest
import torch

import fastprompt
from fastprompt.data import DataSplits, load_data
from fastprompt.data.pools import Pool, Source


@pytest.fixture
def known(monkeypatch):
    """load_data("known") gives 30 grey images of 3 classes."""
    pool = Pool(
        [i % 3 for i in range(30)],
        [str(i) for i in range(30)],
        lambda i: torch.full((1, 10, 10), i, dtype=torch.uint8),
    )
    monkeypatch.setattr(
        "fastprompt.data.find_source", lambda name, root, reading: Source("known", ["a", "b", "c"], pool)
    )


def test_load_data_is_public():
    assert fastprompt.load_data is load_data


def test_summary_says_what_was_split(known):
    data = load_data(
        "known", image_size=16, num_train=12, num_val=6, num_test=3, seed=4, augment="flip", resize="squash"
    )
    assert isinstance(data, DataSplits)
    summary = data.summary()
    assert len(summary.pop("sha256")) == 64
    assert summary == {
        "name": "known",
        "num_classes": 3,
        "train": 12,
        "val": 6,
        "test": 3,
        "image_size": [16, 16],
        "resize": "squash",
        "augment": "flip",
        "seed": 4,
        "intensity_range": None,
        "left_out": {},
    }
    assert data.num_classes == 3


def test_rectangular_images(known):
    assert load_data("known", image_size=(12, 20)).train[0][0].shape == (3, 12, 20)


def test_augmentation_reaches_train_only(known):
    data = load_data("known", image_size=8, augment=lambda image: 255 - image)
    train_index, val_index = data.train.indices[0], data.val.indices[0]
    assert data.train[0][0].unique().tolist() == [255 - train_index]
    assert data.val[0][0].unique().tolist() == [val_index]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image_size": 0}, ValueError, "image_size"),
        ({"image_size": "112"}, TypeError, "image_size"),
        ({"num_train": 0}, ValueError, "num_train must be a positive number of images, got 0"),
        ({"num_val": -1}, ValueError, "num_val"),
        ({"num_test": 2.0}, TypeError, "num_test"),
        ({"num_train": True}, TypeError, "num_train"),
        ({"seed": "0"}, TypeError, "seed"),
        ({"augment": "mixup"}, ValueError, "augment must be one of"),
        ({"resize": "pad"}, ValueError, "resize"),
        ({"on_bad": "warn"}, ValueError, "on_bad"),
        ({"intensity_range": (1, 0)}, ValueError, "intensity_range"),
        ({"intensity_range": 255}, TypeError, "intensity_range"),
        ({"max_decoded_bytes": 0}, ValueError, "max_decoded_bytes"),
    ],
)
def test_bad_arguments_fail_before_any_work(options, error, message, monkeypatch):
    monkeypatch.setattr("fastprompt.data.find_source", lambda *_: pytest.fail("work was done"))
    with pytest.raises(error, match=message):
        load_data("known", **{"image_size": 8, **options})


def test_more_images_than_there_are(known):
    with pytest.raises(ValueError, match=r"num_train must be at most 23, .*got 30"):
        load_data("known", image_size=8, num_train=30)
