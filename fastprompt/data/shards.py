"""Sets that come as archives: WebDataset shards in a folder, and data sets of Hugging Face's `datasets`.

Neither is unpacked or held in memory. Shards are read where an image lies in them, as the headers of the archive say;
`datasets` maps its Arrow files. So images have indices, and everything that works for folders works here: any order,
resuming within an epoch, and processes that share an epoch without reading an image twice.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fastprompt.arguments import ArgumentError
from fastprompt.data.folders import Reading
from fastprompt.data.formats import is_image_name, opened_formats
from fastprompt.data.images import check_decoded_bytes, decode, open_image, to_rgb, upright
from fastprompt.data.layout import split_of
from fastprompt.data.pools import Pool, Source
from fastprompt.extras import needed

WDS, HFDS = "wds:", "hfds:"
MOST_CLASSES = 2**20
"""A larger class index is no class; a list of so many names would fill memory."""
CLASS_NAMES = "classes.txt"


@dataclass(frozen=True)
class Member:
    """An image in a shard: its archive, first byte and size."""

    shard: str
    name: str
    start: int
    size: int


@dataclass(frozen=True)
class ReadMember:
    """Reads image i of shards."""

    members: Sequence[Member]
    reading: Reading

    def __call__(self, i: int) -> Image.Image:
        member = self.members[i]
        with open(member.shard, "rb") as file:
            file.seek(member.start)
            content = file.read(member.size)
        return _opened(content, member.name, f"{member.name} in {member.shard}", self.reading)


@dataclass(frozen=True)
class ReadRow:
    """Reads image i of a split of `datasets`, whose column yields {"bytes": ..., "path": ...}."""

    rows: Any
    column: str
    where: str
    reading: Reading

    def __call__(self, i: int) -> Image.Image:
        found = self.rows[i][self.column]
        if found is None:
            raise ValueError(f"cannot read image {i} of {self.where}: it is missing")
        source = found["path"] if found["bytes"] is None else found["bytes"]
        return _opened(source, found["path"] or "", f"image {i} of {self.where}", self.reading)


def split_prefix(name: str) -> tuple[str, str]:
    """Return the prefix of an archive's name, "" if it has none, and the rest."""
    for prefix in (WDS, HFDS):
        if name.startswith(prefix):
            return prefix, name.removeprefix(prefix)
    return "", name


def archive_source(name: str, reading: Reading) -> Source:
    """Return the source "wds:FOLDER" or "hfds:NAME"; raise ValueError if it cannot be read."""
    prefix, rest = split_prefix(name)
    if reading.on_bad != "error":
        raise ArgumentError("on_bad", f"must be 'error' for {name}, whose images are not checked before they are read")
    if prefix == HFDS:
        return huggingface_source(rest, reading)
    folder = Path(rest).expanduser()
    if not folder.is_dir():
        raise ArgumentError("name", f"must be a folder of .tar shards behind {WDS!r}, got {rest!r}")
    return webdataset_source(folder, reading)


def _opened(source: bytes | str, name: str, where: str, reading: Reading) -> Image.Image:
    """Open an image of a file's bytes or path, as `open_image` opens files."""
    bounds, limit = reading.preprocessing.intensity_range, reading.max_decoded_bytes
    if isinstance(source, str):
        return open_image(source, intensity_range=bounds, max_decoded_bytes=limit)
    try:
        with Image.open(io.BytesIO(source), formats=opened_formats(name)) as image:
            check_decoded_bytes(image, limit)
            decode(source, image)
            return to_rgb(upright(image), bounds)
    except Exception as error:  # on damaged files, Pillow also raises TypeError, struct.error and others
        raise ValueError(f"cannot read the image {where}: {error}") from error


def webdataset_source(folder: Path, reading: Reading) -> Source:
    """Return the images of the .tar shards in a folder, or in its folders of splits.

    The split is that of the shard's folder or name (train-0000.tar); without one, the images are split here. A sample's
    files share a name up to its first dot: an image, and its label as NAME.cls, a class index, or as "label" in
    NAME.json. `classes.txt` beside the shards may name the classes, one a line.

    Raises:
        ValueError: there are no shards, one is damaged or compressed, or a sample has no label, no image or several.
    """
    shards = sorted(path for path in folder.rglob("*.tar") if path.is_file())
    if not shards:
        raise ArgumentError("name", f"must be a folder with .tar shards, got {folder} without any")
    members: dict[str, list[tuple[Member, int]]] = {}
    for shard in shards:
        part = split_of(shard.stem)[0] or (split_of(shard.parent.name)[0] if shard.parent != folder else None)
        members.setdefault(part or "all", []).extend(_samples(shard))
    if "all" in members and len(members) > 1:
        raise ArgumentError("name", f"must name the split of every shard or of none in {folder}, got {sorted(members)}")
    found = {part: samples for part, samples in members.items() if samples}
    labels = [label for samples in found.values() for _, label in samples]
    pools = {
        part: Pool(
            [label for _, label in samples],
            [f"{os.path.relpath(m.shard, folder)}/{m.name}/{m.size}" for m, _ in samples],
            ReadMember([m for m, _ in samples], reading),
        )
        for part, samples in found.items()
    }
    return _source(f"{WDS}{folder}", pools, _class_names(folder / CLASS_NAMES, labels), reading)


def _samples(shard: Path) -> Iterator[tuple[Member, int]]:
    """Yield the images of a shard with their labels."""
    image, label, key = None, None, ("", "")
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                place, base = os.path.split(member.name)
                stem, _, suffix = base.partition(".")
                if (place, stem) != key:
                    if image is not None or label is not None:
                        yield _complete(image, label, key[1], shard)
                    image, label, key = None, None, (place, stem)
                if is_image_name(base) and "." not in suffix:  # NAME.mask.png is no picture of its own
                    if image is not None:
                        raise ArgumentError("name", f"must have one image a sample, got several of {stem} in {shard}")
                    image = Member(str(shard), member.name, member.offset_data, member.size)
                elif suffix in ("cls", "json"):
                    file = archive.extractfile(member)
                    assert file is not None
                    text = file.read().decode()
                    label = text if suffix == "cls" else json.loads(text).get("label")
    except (tarfile.TarError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise ArgumentError("name", f"must have readable, uncompressed shards, got {shard}: {error}") from error
    if image is not None or label is not None:
        yield _complete(image, label, key[1], shard)


def _complete(image: Member | None, label: Any, sample: str, shard: Path) -> tuple[Member, int]:
    if image is None:
        raise ArgumentError(
            "name", f"must have an image that Pillow reads in each sample, got {sample} in {shard} without one"
        )
    try:
        number = int(label)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < MOST_CLASSES:
        raise ArgumentError("name", f"must label {image.name} in {shard} with a class index, got {label!r}")
    return image, number


def _class_names(path: Path, labels: Sequence[int]) -> list[str]:
    """Return the names in a file, or numbers without one."""
    if not path.is_file():
        return [str(i) for i in range(max(labels, default=-1) + 1)]
    names = path.read_text(encoding="utf-8").splitlines()
    if len(set(names)) != len(names) or max(labels, default=-1) >= len(names):
        raise ArgumentError("name", f"must have {max(labels) + 1} different class names in {path}, got {len(names)}")
    return names


def huggingface_source(name: str, reading: Reading) -> Source:
    """Return a data set of Hugging Face's `datasets`: a folder that `save_to_disk` wrote, or what `load_dataset` takes.

    It has a column of images, and one of labels: a `ClassLabel`, or "label" with class indices or class names.

    Raises:
        ImportError: `datasets` is not installed. ValueError: the set cannot be loaded or lacks a column.
    """
    with needed("datasets", f"the data set {HFDS}{name}"):
        import datasets
    path = Path(name).expanduser()
    try:
        saved = any((path / file).is_file() for file in ("dataset_dict.json", "state.json"))
        loaded = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(name)
    except Exception as error:  # datasets passes on whatever its readers raise
        said = f"{type(error).__name__}: {error}"
        raise ArgumentError("name", f"must be a data set that `datasets` loads, got {name!r} ({said})") from error
    parts: Mapping[str, Any] = loaded if isinstance(loaded, Mapping) else {"all": loaded}
    pools, names = dict[str, Pool](), list[str]()
    for part, rows in parts.items():
        found = split_of(part)[0] or ("all" if len(parts) == 1 else None)
        if found is None or not len(rows):
            why = "it is empty" if found else "its name says neither training, validation nor test"
            warnings.warn(f"{HFDS}{name}: the split {part!r} is left out, {why}", stacklevel=2)
            continue
        if found in pools:
            raise ArgumentError("name", f"must have one {found} split, got {sorted(parts)} in {name!r}")
        images, labels = _columns(rows, datasets, name)
        feature, values = rows.features[labels], list(rows[labels])
        of_class = values and all(isinstance(value, int) and 0 <= value < MOST_CLASSES for value in values)
        if not of_class and not all(isinstance(value, str) for value in values):
            raise ArgumentError("name", f"must label every image of {name!r} with a class, {part} does not")
        if isinstance(feature, datasets.ClassLabel):
            own = list(feature.names)
        elif values and isinstance(values[0], str):
            own = names or sorted(set(values))
        else:
            own = [str(i) for i in range(max(max(values) + 1, len(names)))]
        if values and isinstance(values[0], str):
            unknown = set(values) - set(own)
            if unknown:
                raise ArgumentError(
                    "name", f"must have the same classes in all splits, got {sorted(unknown)} in {part}"
                )
            values = [own.index(value) for value in values]
        if any(not isinstance(value, int) or not 0 <= value < len(own) for value in values):
            raise ArgumentError("name", f"must label every image of {name!r} with a class, {part} does not")
        names = own if len(own) > len(names) else names
        rows = rows.cast_column(images, datasets.Image(decode=False))
        where = f"{name}'s {part} split"
        fingerprint = getattr(rows, "_fingerprint", "")
        keys = [f"{part}/{fingerprint}/{i}" for i in range(len(rows))]
        pools[found] = Pool(values, keys, ReadRow(rows, images, where, reading))
    return _source(f"{HFDS}{name}", pools, names, reading)


def _columns(rows: Any, datasets: Any, name: str) -> tuple[str, str]:
    """Return the columns of images and of labels."""
    images = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    classes = [column for column, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = [column for column in ("label", "labels") if column in rows.features]
    chosen = labels if set(labels) & set(classes) or not classes else classes
    if len(images) != 1 or not chosen:
        raise ArgumentError(
            "name",
            f"must have one column of images and one of labels, got {dict(rows.features)} in {name!r}: select and "
            "rename columns, and save_to_disk",
        )
    return images[0], chosen[0]


def _source(name: str, pools: Mapping[str, Pool], names: list[str], reading: Reading) -> Source:
    train = pools.get("train") or pools.get("all")
    if train is None:
        raise ArgumentError("name", f"must have images to train on, got {name} with {sorted(pools) or 'no images'}")
    return Source(name, names, train, pools.get("val"), pools.get("test"), reading.preprocessing.intensity_range)
