from __future__ import annotations

import pytest

from fastprompt.data import walk
from fastprompt.data.layout import find_layout, has_splits, split_of
from fastprompt.data.walk import LeftOut

SPLIT_NAMES = {
    "train": ["train", "Train", "TRAIN", "training", "Training", "trainset", "TrainSet", "training_set",
              "train_images", "images_train", "train-data", "TrainingData", "seg_train", "train2017", "01_train",
              "trainval", "train_val"],
    "val": ["val", "Val", "valid", "Valid", "validation", "Validation", "valset", "val_images", "dev", "Dev", "devset",
            "val2017", "validation_set", "validation-data"],
    "test": ["test", "Test", "TEST", "testing", "Testing", "testset", "test_images", "seg_test", "TestSet", "eval",
             "evaluation", "Eval", "test-set", "test1", "images.test"],
}  # fmt: skip
NO_SPLITS = [
    "cat",
    "contest",
    "testament",
    "trainer",
    "strain",
    "devil",
    "valley",
    "evaluator",
    "Valencia",
    "1",
    "ヴァル",
]


@pytest.mark.parametrize(("split", "name"), [(split, name) for split, names in SPLIT_NAMES.items() for name in names])
def test_the_usual_names_are_splits(split, name):
    assert split_of(name) == (split, ())


@pytest.mark.parametrize("name", NO_SPLITS)
def test_other_names_are_none(name):
    assert split_of(name)[0] is None


def test_words_that_say_nothing_of_the_split_are_kept():
    assert split_of("cars_test") == ("test", ("cars",))
    assert split_of("my-train-images") == ("train", ("my",))
    assert split_of("train_and_test")[0] is None


@pytest.fixture
def make(tmp_path):
    """make("train/a", "train/b", ...): folders with an image each, which nobody opens; the folder they are in."""

    def build(*folders):
        for folder in folders:
            (tmp_path / "set" / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / folder / "0.png").write_bytes(b"")
        return tmp_path / "set"

    return build


def classes(*parts, names=("a", "b")):
    return [f"{part}/{name}" for part in parts for name in names]


@pytest.mark.parametrize("train", SPLIT_NAMES["train"])
@pytest.mark.parametrize(("val", "test"), [("val", "test"), ("Validation", "Testing"), ("dev", "eval")])
def test_splits_are_found_by_their_names(train, val, test, make):
    root = make(*classes(train, val, test))
    layout = find_layout(root, LeftOut())
    assert (layout.train, layout.val, layout.test) == (root / train, root / val, root / test)


@pytest.mark.parametrize("split", ["val", "test"])
def test_every_name_of_a_split_is_found_beside_train(split, make):
    for name in SPLIT_NAMES[split]:
        root = make(*classes("train"))
        (root / "other").mkdir(exist_ok=True)
        (root / "other").rename(root / name)
        assert getattr(find_layout(root, LeftOut()), split) == root / name, name
        (root / name).rename(root / "other")


def test_splits_with_a_word_of_their_own_in_common(make):
    root = make(*classes("cars_train", "cars_test"))
    assert find_layout(root, LeftOut()).test == root / "cars_test"
    root = make(*classes("cars_val"))
    assert find_layout(root, LeftOut()).val == root / "cars_val"


def test_a_split_in_a_folder_of_its_own_name(make):
    root = make(*classes("seg_train/seg_train", "seg_test/seg_test"), "seg_pred/seg_pred")
    left_out = LeftOut()
    layout = find_layout(root, left_out)
    assert layout.train == root / "seg_train" / "seg_train"
    assert layout.test == root / "seg_test" / "seg_test"
    assert left_out.counts() == {walk.BESIDE: 1}


def test_train_alone_is_enough(make):
    root = make(*classes("Training"))
    assert find_layout(root, LeftOut()).train == root / "Training"


@pytest.mark.parametrize(
    "folders",
    [
        ["a", "b"],
        ["car", "train"],
        ["Train", "car", "tram"],
        ["valid", "invalid"],
        ["train_station", "bus_station"],
        ["train_station/platform", "subway_station/platform", "airport"],
        ["cat/indoor", "cat/outdoor", "dog/indoor", "dog/outdoor"],
        ["contest", "strain"],
        ["part1/x", "part2/y"],
        ["1", "2"],
    ],
)
def test_classes_are_classes(folders, make):
    root = make(*folders)
    layout = find_layout(root, LeftOut())
    assert (layout.train, layout.val, layout.test) == (root, None, None)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["Training", "Testing"], "has the folders Testing, Training, but no train/<class name>/"),
        (["seg_train", "seg_test"], "no train/<class name>/"),
        (["cars_train", "cars_test"], "no train/<class name>/"),
        (classes("val", "test"), "has the folders test, val, but no train/<class name>/"),
        (["dev", "cat", "dog"], "named like splits, dev, beside others, cat, dog.*rename any of them that is a class"),
        (["Training", "cat", "dog"], "named like splits, Training"),
        (["train", "test", "cat"], "named like splits, test, train"),
        (["train", "train_images", "cat"], "named like splits"),
        (["a", "b", *classes("val")], "named like splits, val, beside others, a, b: put the classes to train on in"),
        (["a", "b", *classes("Test")], "named like splits, Test"),
        (["a", "b", "my_val/a"], "my_val looks like a split"),
        (classes("fold1", "fold2"), "fold1 looks like a split, with the folders a, b"),
        (classes("my_train", "other_test"), "my_train looks like a split"),
        (classes("part-1", "part-2", "part-3"), "looks like a split"),
        (classes("cars_train"), "cars_train looks like a split.*give the path of the one to read"),
        (classes("train", "training"), "two folders for the train split, train and training"),
        (classes("train", "Train"), "two folders for the train split, Train and train"),
        (classes("train", "val", "valid"), "two folders for the val split, val and valid"),
        (classes("train", "test", "eval"), "two folders for the test split, eval and test"),
        (classes("train", "val", "trainval"), "two folders for the train split"),
        (classes("train", "holdout"), "holdout holds 2 images beside train, .*folders of the same names .a, b"),
        (classes("train", "test", "holdout"), "holdout holds 2 images"),
        (classes("train", "test", "other_val"), "other_val holds 2 images"),
        ([*classes("train", "test"), "my_test"], "my_test holds 1 images"),
        ([*classes("train"), "cat"], "cat holds 1 images beside train, but its name is not that of a split"),
        ([*classes("train"), "bus/city", "bus/school"], "bus holds 2 images"),
        (["a_train/x", "a_test/x", "b_train/x", "b_test/x"], "splits of several data sets"),
    ],
)
def test_what_looks_like_a_split_and_is_none_is_refused(folders, message, make):
    with pytest.raises(ValueError, match=message):
        find_layout(make(*folders), LeftOut())


@pytest.mark.parametrize("name", ["unlabeled", "pred", "seg_pred", "Unlabelled", "submission"])
def test_folders_for_prediction_are_left_out_and_told(name, make):
    root = make(*classes("train"), name)
    left_out = LeftOut()
    assert find_layout(root, left_out).val is None
    assert left_out.counts() == {walk.BESIDE: 1}
    assert f"{name}/0.png" in left_out.message(root)


def test_other_things_beside_the_splits_are_left_out_and_told(make):
    root = make(*classes("train", "test"), "figures")
    (root / "docs").mkdir()
    (root / "docs" / "a.txt").write_text("")
    (root / "cover.png").write_bytes(b"")
    (root / "README.md").write_text("")
    left_out = LeftOut()
    find_layout(root, left_out)
    assert left_out.counts() == {walk.BESIDE: 1, walk.EMPTY: 1, walk.LOOSE: 1}


def test_has_splits(make):
    assert has_splits(make(*classes("train", "test")))
    assert not has_splits(make(*classes("train", "test")) / "train")
