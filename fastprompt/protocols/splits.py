"""Load a task of a protocol: read its lists, check them, and give the splits."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprompt.adapters import Preprocessing
from fastprompt.arguments import ArgumentError, ArgumentPathError, ArgumentTypeError
from fastprompt.data.augment import Augment, make_augment
from fastprompt.data.folders import ReadChecked, Reading, pools_of_files
from fastprompt.data.images import check_choice, sides
from fastprompt.data.pools import Pool, Source, chosen, joined
from fastprompt.data.sources import torchvision_source
from fastprompt.data.splits import DataSplits, draw, draw_per_class, split
from fastprompt.protocols.layouts import Listing, read_listing
from fastprompt.protocols.tasks import SPLITS, Task

LOCKED = "it may be read once, when every choice has been made on the validation images; pass final=True (--final)"
TRAIN_SHARE = 0.8
"""Share of the training images that are trained on where validation images are taken out of them."""


def load_task(
    task: Task,
    root: Path,
    *,
    protocol: str,
    get: str,
    resize: str,
    together: bool,
    image_size: int | Sequence[int],
    final: bool,
    per_class: int | None,
    seed: int,
    augment: str | Augment,
    on_bad: str,
) -> DataSplits:
    """Load a task; see `Protocol.load`, whose final runs train on training and validation images if `together`."""
    size = sides(image_size)
    check_choice("on_bad", on_bad, ("error", "skip"))
    augmentation = make_augment(augment, size)
    for name, value, low in (("seed", seed, 0), ("per_class", per_class, 1)):
        if value is None and name == "per_class":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(name, f"must be an integer, got {value!r}")
        if value < low:
            raise ArgumentError(name, f"must be at least {low}, got {value}")
    if not isinstance(final, bool):
        raise ArgumentTypeError("final", f"must be True or False, got {final!r}")
    name = f"{protocol}:{task.name}"
    if task.layout == "torchvision":
        source = _of_torchvision(task, name, root)
    else:
        source = _of_files(task, name, root, get, Reading(size, Preprocessing(resize), on_bad), final)
    assert source.val is not None
    train, val = source.train, source.val
    if per_class is not None:
        train, val = (
            chosen(pool, draw_per_class(pool.labels, per_class, seed, part))
            for pool, part in ((train, "train"), (val, "val"))
        )
    elif final and together:
        train = joined([train, val])
    return split(
        Source(name, source.class_names, train, val, source.test, source.intensity_range),
        size=size,
        num_train=None,
        num_val=None,
        num_test=None,
        seed=seed,
        resize=resize,
        augment=augmentation,
        augment_name=augment if isinstance(augment, str) else repr(augment),
        stated={"protocol": protocol, "task": task.name, "final": final, "per_class": per_class},
        locked=None if final else LOCKED,
    )


def _of_torchvision(task: Task, name: str, root: Path) -> Source:
    """Open a set of torchvision, in the folder that holds what `task.folders` names."""
    assert task.torchvision is not None
    source = torchvision_source(task.torchvision, (task.place(root) or root / task.folders[0]).parent)
    train, val = source.train, source.val
    if val is None:
        kept, held_out = _fifth(task, source.train.labels)
        train, val = chosen(source.train, kept), chosen(source.train, held_out)
    assert source.test is not None
    _check_counts(task, name, source.class_names, {"train": train, "val": val, "test": source.test})
    return Source(name, source.class_names, train, val, source.test)


def _of_files(task: Task, name: str, root: Path, get: str, reading: Reading, final: bool) -> Source:
    """Read the lists of a task and check what they name; the test images are opened only if `final`."""
    place = task.place(root)
    if place is None:
        looked = " or ".join(str(root / folder) for folder in task.folders)
        raise ArgumentPathError("root", f"must hold {name}, but there is no {looked}. {get}")
    listing = read_listing(task, place)
    if "val" not in listing.splits:
        kept, held_out = _fifth(task, [label for _, label in listing.splits["train"]])
        of_train = listing.splits["train"]
        parts = {"train": [of_train[i] for i in kept], "val": [of_train[i] for i in held_out]}
        listing = Listing({**listing.splits, **parts}, listing.class_names)
    _check_files(name, listing)
    labels = {part: dict(listing.splits[part]) for part in SPLITS if final or part != "test"}
    pools, bounds = pools_of_files(place, labels, reading)
    test = pools.get("test")
    if test is None:
        entries = listing.splits["test"]
        test = Pool([label for _, label in entries], [os.path.relpath(path, place) for path, _ in entries], _locked)
    skipped = {part: len(labels[part]) - len(pools[part].labels) for part in pools}
    _check_counts(task, name, listing.class_names, {**pools, "test": test}, skipped)
    _warn_of_copies(name, pools)
    return Source(name, listing.class_names, pools["train"], pools["val"], test, bounds)


def _locked(i: int) -> Any:
    raise RuntimeError(f"the test split is locked: {LOCKED}")


def _fifth(task: Task, labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the training and the validation images of a set without published validation images."""
    count = int(TRAIN_SHARE * len(labels))
    if task.val_from == "last":
        return list(range(count)), list(range(count, len(labels)))
    held_out = sorted(draw(labels, range(len(labels)), len(labels) - count, 0, "val", "val", leave_one=True))
    return sorted({*range(len(labels))} - {*held_out}), held_out


def _check_files(name: str, listing: Listing) -> None:
    """Raise ValueError unless every listed file exists and is listed once, under all its names."""
    seen: dict[tuple[int, int], str] = {}
    missing, twice = [], []
    for part, entries in listing.splits.items():
        for path, _ in entries:
            try:
                status = os.stat(path)
            except OSError:
                missing.append(path)
                continue
            where = f"{part}: {path}"
            first = seen.setdefault((status.st_dev, status.st_ino), where)
            if first is not where:
                twice.append(f"{first} and {where}")
    if missing:
        raise ValueError(f"{name}: {len(missing)} of the listed files do not exist: {', '.join(missing[:3])}")
    if twice:
        raise ValueError(f"{name}: {len(twice)} file(s) are listed twice or are in two splits: {'; '.join(twice[:3])}")


def _check_counts(
    task: Task,
    name: str,
    class_names: Sequence[str],
    pools: Mapping[str, Pool],
    skipped: Mapping[str, int] | None = None,
) -> None:
    """Compare numbers of classes and images with the protocol's; `skipped` images count as read."""
    if len(class_names) != task.classes:
        raise ValueError(f"{name} must have {task.classes} classes, got {len(class_names)}")
    for part, pool in pools.items():
        wanted, got = getattr(task, part), len(pool.labels) + (skipped or {}).get(part, 0)
        if got == wanted:
            continue
        text = f"{name} must have {wanted:,} {part} images, got {got:,}"
        if part not in task.unconfirmed:
            raise ValueError(text)
        warnings.warn(f"{text}; the protocol's number is from memory, so the data may be right", stacklevel=6)


def _warn_of_copies(name: str, pools: Mapping[str, Pool]) -> None:
    """Warn of images that are in two splits under two names. Published data have some, so this is no error."""
    digests = {
        part: {checked.sha256 for checked in pool.read.checked}
        for part, pool in pools.items()
        if isinstance(pool.read, ReadChecked)
    }
    counted = Counter(digest for found in digests.values() for digest in found)
    copies = {part: sum(counted[digest] > 1 for digest in found) for part, found in digests.items()}
    if any(copies.values()):
        said = ", ".join(f"{count} of {part}" for part, count in copies.items() if count)
        warnings.warn(f"{name}: images with the same contents are in several splits ({said})", stacklevel=6)
