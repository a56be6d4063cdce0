"""Image folders as sources: one folder per class, inside folders per split or to be split here."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from fastprompt.adapters import Preprocessing
from fastprompt.arguments import ArgumentError
from fastprompt.data.checks import Checked, check_images, damage, report_bad, warn_of_cut_bits
from fastprompt.data.images import FULL_RANGE, MAX_DECODED_BYTES, open_image
from fastprompt.data.layout import find_layout, has_splits
from fastprompt.data.pools import Pool, Source
from fastprompt.data.walk import LOOSE, Identity, LeftOut, images_below, loose_images, subfolders

USUAL_RANGES = {
    "I": tuple((0.0, float(2**bits - 1)) for bits in (8, 10, 12, 14, 16)),
    "F": ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (0.0, 65535.0)),
}
"""Usual value ranges of integer and float grey images, narrowest first."""


@dataclass(frozen=True)
class Reading:
    """How the images of a folder are read; see `load_data`."""

    size: tuple[int, int]
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    on_bad: str = "error"
    max_decoded_bytes: int = MAX_DECODED_BYTES


@dataclass(frozen=True)
class ReadChecked:
    """Reads image i of checked files; a file that has changed since is decoded strictly again."""

    paths: Sequence[str]
    checked: Sequence[Checked]
    intensity_range: tuple[float, float] | None
    max_decoded_bytes: int

    def __call__(self, i: int) -> Image.Image:
        path = self.paths[i]
        try:
            unchanged = self.checked[i].still_holds(path)
        except OSError:
            unchanged = False  # open_image raises the error
        return open_image(
            path,
            intensity_range=self.intensity_range,
            max_decoded_bytes=self.max_decoded_bytes,
            strict=not unchanged,
        )


@dataclass(frozen=True)
class _Part:
    """The images of one split: class and file identity of each, by path."""

    folder: Path
    labels: dict[str, int]
    files: dict[str, Identity | None]


def folder_source(root: Path, reading: Reading) -> Source:
    """Return the source of an image folder.

    The folder holds root/train, root/val, root/test with one folder per class (see `find_layout`), or root/<class>.
    Hidden and system folders are left out, links are followed, and every file is used once. Each file is decoded (see
    `check_images`); unreadable files are an error or left out, depending on `reading.on_bad`. A warning names what
    else was left out.

    Raises:
        ValueError: the folders are not as above, or an image is in two classes or splits or cannot be read.
    """
    left_out = LeftOut()
    layout = find_layout(root, left_out)
    classes = _class_names(layout.train, left_out)
    parts = {
        name: _part(root, folder, classes, layout.train, left_out)
        for name, folder in (("train", layout.train), ("val", layout.val), ("test", layout.test))
        if folder is not None
    }
    _check_each_file_is_once(parts)
    message = left_out.message(root)
    if message:
        warnings.warn(message, stacklevel=4)
    pools, intensity_range = pools_of_files(root, {name: part.labels for name, part in parts.items()}, reading)
    for name, part in parts.items():
        present = set(pools[name].labels)
        empty = [label for label in range(len(classes)) if label not in present]
        if not present:
            raise ValueError(f"{part.folder}: no image in any class folder")
        if name == "train" and empty:
            raise ValueError(
                f"{part.folder}: no image in the class folder(s) {', '.join(classes[i] for i in empty[:10])}"
            )
    return Source(
        str(root), classes, pools["train"], pools.get("val"), pools.get("test"), intensity_range, left_out.counts()
    )


def pools_of_files(
    root: Path, parts: Mapping[str, Mapping[str, int]], reading: Reading
) -> tuple[dict[str, Pool], tuple[float, float] | None]:
    """Check the image files of each split and return a pool of each, and the black and white level of deep grey images.

    Args:
        root: the folder below which they lie.
        parts: split -> path -> label; "train" is one of them.

    Raises:
        ValueError: a file cannot be read, unless `reading` skips those, or `reading` needs an intensity range.
    """
    checked = _check(root, parts, reading)
    warn_of_cut_bits(checked, stacklevel=5)
    intensity_range = _intensity_range(root, [path for path in parts["train"] if path in checked], checked, reading)
    pools = {name: _pool(root, labels, checked, intensity_range, reading) for name, labels in parts.items()}
    return pools, intensity_range


def _class_names(folder: Path, left_out: LeftOut) -> list[str]:
    classes = subfolders(folder, left_out)
    if not classes:
        raise ValueError(
            f"{folder} has images but no class folders: put them in {folder}/<class name>/"
            if loose_images(folder)
            else f"{folder} has no class folders and no images: expected {folder}/<class name>/<image files>"
        )
    if len(classes) == 1:
        only = folder / classes[0]
        raise ValueError(
            f"{folder} has only one class folder ({classes[0]}); at least two are needed"
            + (f". {only} has splits: pass its path instead" if has_splits(only) else "")
        )
    return classes


def _part(root: Path, folder: Path, classes: Sequence[str], train: Path, left_out: LeftOut) -> _Part:
    own = subfolders(folder, left_out)
    if not own:
        raise ValueError(
            f"{folder} has images but no class folders: put them in {folder}/<class name>/, or move the folder away "
            "if the images have no labels"
            if loose_images(folder)
            else f"{folder} has no class folders and no images: expected {folder}/<class name>/<image files>"
        )
    strange = sorted(set(own) - set(classes))
    if strange:
        raise ValueError(f"{folder} has classes that {train} does not have: {', '.join(strange[:10])}")
    for path in loose_images(folder):
        left_out.add(LOOSE, path)
    labels: dict[str, int] = {}
    files: dict[str, Identity | None] = {}
    for name in own:
        found = images_below(folder / name, left_out)
        labels |= dict.fromkeys(found, classes.index(name))
        files |= found
    return _Part(folder, labels, files)


def _check_each_file_is_once(parts: Mapping[str, _Part]) -> None:
    """Raise ValueError if links put one file into two classes or two splits."""
    seen: dict[Identity, str] = {}
    twice = []
    for part in parts.values():
        for path, this in part.files.items():
            if this is not None and seen.setdefault(this, path) != path:
                twice.append(f"{seen[this]} and {path}")
    if twice:
        raise ValueError(
            f"links put {len(twice)} image file(s) into two classes or splits: {'; '.join(twice[:5])}"
            + ("; ..." if len(twice) > 5 else "")
            + ". Keep each file in one"
        )


def _check(root: Path, parts: Mapping[str, Mapping[str, int]], reading: Reading) -> dict[str, Checked]:
    """Check all images and return the results of the readable ones by path; report the others."""
    paths = [path for labels in parts.values() for path in labels]
    found = dict(zip(paths, check_images(paths, reading.max_decoded_bytes, root), strict=True))
    bad = {path: damage(checked, reading.size, reading.preprocessing.resize) for path, checked in found.items()}
    report_bad([(path, reason) for path, reason in bad.items() if reason is not None], reading.on_bad)
    return {path: checked for path, checked in found.items() if bad[path] is None}


def _intensity_range(
    root: Path, paths: Sequence[str], checked: Mapping[str, Checked], reading: Reading
) -> tuple[float, float] | None:
    """Return the black and white level of the data set's grey images of more than 8 bits; None if it has none.

    If `reading` does not set it, it is the narrowest of `USUAL_RANGES` that holds all values of the train images and
    of which they fill at least a quarter, else their minimum and maximum.
    """
    ranges = {kind: _range_of([checked[path] for path in paths if checked[path].kind == kind], kind) for kind in "IF"}
    found = {kind: bounds for kind, bounds in ranges.items() if bounds is not None}
    deep = {path: known for path, known in checked.items() if known.kind is not None}
    if reading.preprocessing.intensity_range is not None or not deep:
        return reading.preprocessing.intensity_range
    if len(set(found.values())) > 1:
        raise ArgumentError(
            "intensity_range",
            f"must be one (low, high) for all of {root}, got integer grey images in {found['I']} and float ones in "
            f"{found['F']}",
        )
    example, first = next(iter(deep.items()))
    bounds = next(iter(found.values()), FULL_RANGE[str(first.kind)])
    beyond = [path for path, known in deep.items() if known.low < bounds[0] or known.high > bounds[1]]
    if bounds != FULL_RANGE["I"] or first.kind == "F" or beyond:
        warnings.warn(
            f"{root} has {len(deep)} grey images of more than 8 bits, e.g. {os.path.relpath(example, root)}: black and "
            f"white are set to {bounds[0]:g} and {bounds[1]:g} for all of them, from the values of the train images"
            + (f"; {len(beyond)} exceed this range, e.g. {os.path.relpath(beyond[0], root)}" if beyond else "")
            + ". Set intensity_range=(low, high) (--intensity-range) to change this",
            stacklevel=6,
        )
    return bounds


def _range_of(images: Sequence[Checked], kind: str) -> tuple[float, float] | None:
    if not images:
        return None
    low, high = min(image.low for image in images), max(image.high for image in images)
    for bounds in USUAL_RANGES[kind]:
        if bounds[0] <= low and high <= bounds[1] and high - low >= (bounds[1] - bounds[0]) / 4:
            return bounds
    return (low, high) if high > low else (low, low + 1)


def _pool(
    root: Path,
    labels: Mapping[str, int],
    checked: Mapping[str, Checked],
    bounds: tuple[float, float] | None,
    reading: Reading,
) -> Pool:
    paths = [path for path in labels if path in checked]
    return Pool(
        [labels[path] for path in paths],
        [os.path.relpath(path, root) for path in paths],
        ReadChecked(paths, [checked[path] for path in paths], bounds, reading.max_decoded_bytes),
        paths,
    )
