"""Tell whether the folders of a data set are splits, recognised by their names, or classes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastprompt.data.walk import BESIDE, EMPTY, LOOSE, LeftOut, images_below, loose_images, subfolders

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "devel", "development"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation"), "test"),
}
"""The usual names of splits, and the split each one means."""
_BESIDE_SPLIT_WORDS = frozenset(
    "set sets data dataset split image images img imgs picture pictures photo photos file files folder folders "
    "sample samples jpg jpeg png seg".split()
)
"""Further words that the name of a split may contain: train_images, seg_train, TestSet."""
_PART_WORDS = frozenset("fold folds holdout split partition part subset batch chunk shard labeled labelled".split())
_UNLABELLED_WORDS = frozenset(
    "pred predict prediction predictions inference submission unlabeled unlabelled unsup unsupervised".split()
)
_GLUED = re.compile(
    rf"({'|'.join(_BESIDE_SPLIT_WORDS)})?({'|'.join(SPLIT_WORDS)})({'|'.join(_BESIDE_SPLIT_WORDS)})?", re.ASCII
)


@dataclass(frozen=True)
class Layout:
    """The folders of a data set's splits.

    Attributes:
        train: the folder with one folder per class; the data set's own folder if there are no splits.
        val, test: folders of the same kind, or None.
    """

    train: Path
    val: Path | None = None
    test: Path | None = None


def words(name: str) -> list[str]:
    """Split a folder's name into lower-case words, without numbers: "seg_trainSet2" → ["seg", "train", "set"]."""
    found = []
    for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name):
        glued = _GLUED.fullmatch(word.lower())
        found += [part for part in glued.groups() if part] if glued else [word.lower()]
    return found


def split_of(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the split that a folder's name means, and the words of the name that do not describe a split.

    "train_images" → ("train", ()), "cars_test" → ("test", ("cars",)), "cat" → (None, ("cat",)).
    """
    found = words(name)
    named = {SPLIT_WORDS[word] for word in found if word in SPLIT_WORDS}
    rest = tuple(word for word in found if word not in SPLIT_WORDS and word not in _BESIDE_SPLIT_WORDS)
    if named == {"train", "val"}:  # one folder with both, to be split here
        named = {"train"}
    return (named.pop() if len(named) == 1 else None), rest


def find_layout(root: Path, left_out: LeftOut) -> Layout:
    """Find the splits in `root`, or return `root` itself if its folders are classes.

    A folder is recognised as a split by its name, in any case: train, training, val, valid, validation, dev, test,
    testing, eval; alone, with words such as set, data, images, seg or numbers (seg_train, TrainSet, train2017), or
    with a word that all splits share (cars_train, cars_test). `root`/train needs one folder per class. A split folder
    that holds nothing but a folder of the same split (seg_train/seg_train) is replaced by that folder.

    Raises:
        ValueError: the layout is ambiguous: two folders for one split, splits without train, folders with images
            beside the splits, or classes beside a folder that is named like a split.
    """
    names = subfolders(root, left_out)
    inside = {name: set(subfolders(root / name, left_out)) for name in names}
    for path in loose_images(root) if names else ():
        left_out.add(LOOSE, path)
    splits = _named_splits(root, inside)
    if not any(split == "train" and inside[name] for name, split in splits.items()):
        _refuse_stray_splits(root, splits, inside)
        return Layout(root)
    folders: dict[str, Path] = {}
    for name, split in splits.items():
        if split in folders:
            raise ValueError(
                f"{root} has two folders for the {split} split, {folders[split].name} and {name}: rename one of them, "
                "or move it away"
            )
        folders[split] = _unwrapped(root / name, split, left_out)
    classes = set(subfolders(folders["train"], left_out))
    for name in names:
        if name not in splits:
            _check_beside(root / name, inside[name] & classes, sorted(splits), left_out)
    return Layout(folders["train"], folders.get("val"), folders.get("test"))


def has_splits(folder: Path) -> bool:
    """Whether a folder holds folders that are named like splits."""
    return any(split_of(name)[0] is not None for name in subfolders(folder, LeftOut()))


def _named_splits(root: Path, inside: dict[str, set[str]]) -> dict[str, str]:
    """Return the folders that are splits by their names, and the split each one is."""
    meanings = {name: split_of(name) for name in inside}
    plain = {name: split for name, (split, rest) in meanings.items() if split is not None and not rest}
    if plain:
        return plain
    groups = []  # folders with names that differ only in the split: cars_train, cars_test
    for shared in sorted({rest for split, rest in meanings.values() if split is not None}):
        group = {name: split for name, (split, rest) in meanings.items() if split is not None and rest == shared}
        if len(set(group.values())) > 1 and (any(map(inside.get, group)) or len(group) == len(inside)):
            groups.append(group)
    if len(groups) > 1:
        raise ValueError(
            f"{root} has the splits of several data sets: {' and '.join(_listed(group) for group in groups)}. "
            "Give each a folder of its own"
        )
    return groups[0] if groups else {}


def _unwrapped(folder: Path, split: str, left_out: LeftOut) -> Path:
    """Return the only folder inside a split's folder if it is named like the split too, else the split's folder."""
    inside = subfolders(folder, left_out)
    if len(inside) == 1 and split_of(inside[0])[0] == split and subfolders(folder / inside[0], left_out):
        return _unwrapped(folder / inside[0], split, left_out)
    return folder


def _refuse_stray_splits(root: Path, splits: dict[str, str], inside: dict[str, set[str]]) -> None:
    """Raise ValueError if classes and splits are mixed, or if splits have unrecognised names."""
    if splits and set(splits) == set(inside):
        raise ValueError(
            f"{root} has the folders {_listed(splits)}, but no train/<class name>/: images are expected in "
            f"{root / 'train'}/<class name>/, or in {root}/<class name>/ to be split here"
        )
    mixed = [name for name in splits if inside[name] or not _is_class(name, splits, inside)]
    if mixed:
        raise ValueError(
            f"{root} has folders that are named like splits, {_listed(mixed)}, beside others, "
            f"{_listed(set(inside) - set(splits))}: put the classes to train on in {root / 'train'}/<class name>/, or "
            f"move {_listed(mixed)} away; rename any of them that is a class"
        )
    parts = [name for name in inside if inside[name] and (_PART_WORDS | set(SPLIT_WORDS)) & set(words(name))]
    for name in parts:
        in_other_parts = inside[name] & set().union(*(inside[other] for other in parts if other != name))
        if inside[name] & set(inside) or len(in_other_parts) > 1 or len(inside) == 1:
            raise ValueError(
                f"{root / name} looks like a split, with the folders {_listed(inside[name])}: call the splits train, "
                f"val and test, or give the path of the one to read, {root / name}"
            )


def _is_class(name: str, splits: dict[str, str], inside: dict[str, set[str]]) -> bool:
    """Whether a folder without subfolders that is named like a split is a class: trains, or valid beside invalid."""
    return len(splits) == 1 and (name.lower() == "train" or f"in{name.lower()}" in map(str.lower, inside))


def _check_beside(folder: Path, shared: set[str], splits: Sequence[str], left_out: LeftOut) -> None:
    """Leave out a folder beside the splits; raise ValueError if it may hold images to train or test on."""
    images = images_below(folder, LeftOut())
    unlabelled = len(splits) > 1 or bool(_UNLABELLED_WORDS & set(words(folder.name)))
    if images and (shared or split_of(folder.name)[0] is not None or not unlabelled):
        raise ValueError(
            f"{folder} holds {len(images)} images beside {_listed(splits)}, but its name is not that of a split"
            + (f", although it has folders of the same names ({_listed(shared)})" if shared else "")
            + ": name it train, val or test, or move it away; rename any split that is a class"
        )
    for path in images or [folder]:
        left_out.add(BESIDE if images else EMPTY, path)


def _listed(names: Sequence[str] | set[str] | dict[str, str]) -> str:
    return ", ".join(sorted(map(os.fspath, names))[:5]) + (", ..." if len(names) > 5 else "")
