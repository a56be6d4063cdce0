"""Read the lists that publishers ship beside their images: which file is in which split, and its class."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fastprompt.fetch import file_sha256
from fastprompt.files import parse_json
from fastprompt.protocols.tasks import SPLITS, Task

LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
TOGETHER = "train800val200.txt"


@dataclass(frozen=True)
class Listing:
    """What a publisher's lists say.

    Attributes:
        splits: split -> (path, label) of each image, in the order of the list. Without "val", validation images are
            taken out of the training images.
        class_names: one name per label.
    """

    splits: Mapping[str, list[tuple[str, int]]]
    class_names: list[str]


def read_listing(task: Task, folder: Path) -> Listing:
    """Read the lists of a task that lies in `folder`.

    Raises:
        ValueError: a list is missing, damaged, or contradicts another; the message names file and line or entry.
    """
    return _READERS[task.layout](task, folder)


def _images_folder(task: Task, folder: Path) -> Path:
    found = next((folder / name for name in task.images if (folder / name).is_dir()), None)
    if found is None:
        raise ValueError(f"{folder} has no folder {' or '.join(task.images)} with the images of {task.title}")
    return found


def _path(folder: Path, name: object, where: str) -> str:
    """Return the file that a list names, below `folder`."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}: must name an image file, got {name!r}")
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{where}: must name a file below {folder}, got {name!r}")
    return os.path.join(folder, *parts.parts)


def _label(value: object, task: Task, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < task.classes:
        raise ValueError(f"{where}: must have a class from 0 to {task.classes - 1}, got {value!r}")
    return value


def _lists(task: Task, folder: Path) -> Listing:
    """`train800.txt`, `val200.txt`, `test.txt` with "path label" on each line, paths relative to the task's folder."""
    splits = {split: _text_list(task, folder, name) for split, name in LISTS.items()}
    together = _text_list(task, folder, TOGETHER)
    # Its paths may be those of copies in a folder of their own, but images and classes are the same ones.
    if sorted(label for _, label in together) != sorted(label for s in ("train", "val") for _, label in splits[s]):
        raise ValueError(
            f"{folder / TOGETHER}: must list the images of {LISTS['train']} and {LISTS['val']}, but has "
            f"{len(together)} images with other classes"
        )
    return Listing(splits, [str(label) for label in range(task.classes)])


def _text_list(task: Task, folder: Path, name: str) -> list[tuple[str, int]]:
    path = folder / name
    found = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        image, _, label = line.strip().rpartition(" ")
        if not image or not label.isdecimal():
            raise ValueError(f'{where}: must be "path label", got {line!r}')
        found.append((_path(folder, image.strip(), where), _label(int(label), task, where)))
    return found


def _json(task: Task, folder: Path) -> Listing:
    """VPT's `train.json`, `val.json` and `test.json`: {path: class}. Classes are numbered in the order of their ids."""
    images = _images_folder(task, folder)
    raw: dict[str, Any] = {split: _json_of(folder / f"{split}.json") for split in SPLITS}
    for split, entries in raw.items():
        if not isinstance(entries, dict) or not all(type(label) is int for label in entries.values()):
            raise ValueError(f"{folder / split}.json: must be an object of paths and whole-numbered classes")
    ids = sorted(set(raw["train"].values()))
    if len(ids) != task.classes:
        raise ValueError(f"{folder / 'train.json'}: must have {task.classes} classes, got {len(ids)}")
    number = {label: i for i, label in enumerate(ids)}
    splits = {}
    for split, entries in raw.items():
        strange = sorted(set(entries.values()) - set(ids))
        if strange:
            raise ValueError(f"{folder / split}.json: has classes that train.json does not have: {strange[:10]}")
        where = f"{folder / split}.json"
        splits[split] = [(_path(images, name, where), number[label]) for name, label in entries.items()]
    return Listing(splits, [str(label) for label in ids])


def _coop(task: Task, folder: Path) -> Listing:
    """CoOp's `split_zhou_*.json` and PGN's list of RESISC45: {split: [[path, label, class name], ...]}."""
    assert task.file is not None
    path, images = folder / task.file, _images_folder(task, folder)
    _check_sha256(task, path)
    raw: Any = _json_of(path)
    if not isinstance(raw, dict) or not set(SPLITS) <= set(raw):
        raise ValueError(f"{path}: must be an object with the splits {', '.join(SPLITS)}")
    names: dict[int, str] = {}
    splits = {}
    for split in SPLITS:
        found = splits[split] = list[tuple[str, int]]()
        for number, entry in enumerate(raw[split]):
            where = f"{path}: {split}[{number}]"
            if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[2], str):
                raise ValueError(f"{where}: must be [path, class, class name], got {entry!r}")
            label = _label(entry[1], task, where)
            if names.setdefault(label, entry[2]) != entry[2]:
                raise ValueError(f"{where}: class {label} is {names[label]!r} elsewhere, got {entry[2]!r}")
            found.append((_path(images, entry[0], where), label))
    return Listing(splits, _names(names, task, path))


def _clevr(task: Task, folder: Path) -> Listing:
    """PGN's `create_clevr_annotations.py`: {train,val}_{images,labels}.npy; "count_3" to "count_10" are the classes.

    CLEVR's validation images are PGN's test images. The lists hold the paths of the machine that wrote them, of which
    the file's name counts here.
    """
    assert task.file is not None
    images = _images_folder(task, folder)
    fewest = 3
    splits = {}
    for split, published in (("train", "train"), ("test", "val")):
        files = [folder / task.file / f"{published}_{what}.npy" for what in ("images", "labels")]
        paths, labels = (_array(file) for file in files)
        if len(paths) != len(labels):
            raise ValueError(f"{files[0]} has {len(paths)} images, {files[1]} {len(labels)} labels")
        found = splits[split] = list[tuple[str, int]]()
        for number, (path, label) in enumerate(zip(paths, labels, strict=True)):
            where = f"{files[1]}: entry {number}"
            count = label.removeprefix("count_")
            if not label.startswith("count_") or not count.isdecimal():
                raise ValueError(f'{where}: must be "count_N", got {label!r}')
            name = PurePosixPath(path.replace("\\", "/")).name
            file = _path(images / published, name, f"{files[0]}: entry {number}")
            found.append((file, _label(int(count) - fewest, task, where)))
    return Listing(splits, [str(fewest + i) for i in range(task.classes)])


_READERS = {"lists": _lists, "json": _json, "coop": _coop, "clevr": _clevr}


def _names(names: Mapping[int, str], task: Task, path: Path) -> list[str]:
    missing = [label for label in range(task.classes) if label not in names]
    if missing:
        raise ValueError(f"{path}: must have {task.classes} classes, got no image of {missing[:10]}")
    listed = [names[label] for label in range(task.classes)]
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: must have a name for each class, but several are {twice[0]!r}")
    return listed


def _check_sha256(task: Task, path: Path) -> None:
    if task.sha256 is not None and path.is_file() and file_sha256(path) != task.sha256:
        raise ValueError(f"{path} is not the published list (its sha256 differs)")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _json_of(path: Path) -> Any:
    return parse_json(_text(path), path)


def _array(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if values.ndim != 1 or values.dtype.kind != "U":
        raise ValueError(f"{path}: must hold one row of texts, got {values.dtype} of shape {values.shape}")
    return [str(value) for value in values]
