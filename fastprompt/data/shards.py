"""Sets that come as archives: WebDataset shards in a folder or on a server, and data sets of Hugging Face's `datasets`.

Neither is unpacked or held in memory. Shards are read where an image lies in them, as the headers of the archive say;
`datasets` maps its Arrow files. So images have indices, and everything that works for folders works here: any order,
resuming within an epoch, and processes that share an epoch without reading an image twice.

Of shards on a server the headers are read once, and what they say is cached; then each image is a request for its bytes
(`remote.py`). `streamed.py` reads data sets of the Hub in the same way.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import tarfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

from PIL import Image

from fastprompt.arguments import ArgumentError
from fastprompt.data.folders import Reading
from fastprompt.data.formats import is_image_name, opened_formats
from fastprompt.data.images import check_decoded_bytes, decode, open_image, to_rgb, upright
from fastprompt.data.layout import split_of
from fastprompt.data.pools import Pool, Source
from fastprompt.data.remote import RemoteFile, expanded, is_address
from fastprompt.data.streamed import streamed_parts
from fastprompt.extras import needed
from fastprompt.fetch import FetchError, cache_dir, locked
from fastprompt.files import atomic_write

WDS, HFDS, HFIDS = "wds:", "hfds:", "hfids:"
MOST_CLASSES = 2**20
"""A larger class index is no class; a list of so many names would fill memory."""
CLASS_NAMES = "classes.txt"
AT_ONCE = 8
"""Shards on servers whose headers are read at the same time."""


@dataclass(frozen=True)
class Member:
    """An image in a shard: its archive, a path or a file on a server, first byte and size."""

    shard: str | RemoteFile
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
        if isinstance(member.shard, RemoteFile):
            content = member.shard.read(member.start, member.size)
        else:
            with open(member.shard, "rb") as file:
                file.seek(member.start)
                content = file.read(member.size)
        return opened(content, member.name, f"{member.name} in {member.shard}", self.reading)


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
        return opened(source, found["path"] or "", f"image {i} of {self.where}", self.reading)


def split_prefix(name: str) -> tuple[str, str]:
    """Return the prefix of an archive's name, "" if it has none, and the rest."""
    for prefix in (WDS, HFDS, HFIDS):
        if name.startswith(prefix):
            return prefix, name.removeprefix(prefix)
    return "", name


def archive_source(name: str, reading: Reading) -> Source:
    """Return the source "wds:FOLDER", "wds:ADDRESSES", "hfds:NAME" or "hfids:NAME".

    Raises:
        ValueError: it cannot be read. FetchError: a server cannot be reached.
    """
    prefix, rest = split_prefix(name)
    if reading.on_bad != "error":
        raise ArgumentError("on_bad", f"must be 'error' for {name}, whose images are not checked before they are read")
    if prefix in (HFDS, HFIDS):
        return huggingface_source(rest, reading, prefix)
    if is_address(rest):
        return remote_source(rest, reading)
    folder = Path(rest).expanduser()
    if not folder.is_dir():
        raise ArgumentError(
            "name", f"must be a folder of .tar shards, or their http addresses, behind {WDS!r}, got {rest!r}"
        )
    return webdataset_source(folder, reading)


def opened(source: bytes | str, name: str, where: str, reading: Reading) -> Image.Image:
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
        with open(shard, "rb") as file:
            members.setdefault(part or "all", []).extend(_samples(str(shard), file))
    return _of_shards(f"{WDS}{folder}", members, str(folder), _names_in(folder / CLASS_NAMES), reading)


def remote_source(name: str, reading: Reading) -> Source:
    """Return the images of .tar shards on HTTP servers, `webdataset_source`'s otherwise.

    Args:
        name: addresses, separated by "::", with braces as of a shell: "https://host/train-{0000..0031}.tar". What
            their headers say is cached, and read again when a shard has changed.

    Raises:
        ValueError: an address is not that of a shard, or a shard is wrong. FetchError: a shard cannot be read.
    """
    addresses = [address for part in name.split("::") for address in expanded(part)]
    paths = [PurePosixPath(urlsplit(address).path) for address in addresses]
    for address, path in zip(addresses, paths, strict=True):
        if not is_address(address) or path.suffix != ".tar":
            raise ArgumentError("name", f"must have addresses of .tar shards behind {WDS!r}, got {address!r}")
    if len({*addresses}) < len(addresses):
        raise ArgumentError("name", f"must have each address once behind {WDS!r}, got {name!r}")
    with ThreadPoolExecutor(AT_ONCE) as threads:
        found = list(threads.map(_indexed, addresses))
    members: dict[str, list[tuple[Member, int]]] = {}
    folder = posixpath.commonpath([path.parent for path in paths])
    for path, samples in zip(paths, found, strict=True):
        part = split_of(path.stem)[0] or (split_of(path.parent.name)[0] if str(path.parent) != folder else None)
        members.setdefault(part or "all", []).extend(samples)
    shown = "::".join(part.partition("?")[0] for part in name.split("::"))  # without signatures
    return _of_shards(f"{WDS}{shown}", members, folder, _names_behind(addresses[0], folder), reading)


def _indexed(address: str) -> list[tuple[Member, int]]:
    """Return the images of a shard on a server with their labels, from the cache if it has not changed."""
    shard = RemoteFile.find(address)
    bare = address.partition("?")[0]  # what follows may be a signature, which changes
    kept = cache_dir() / "shards" / f"{hashlib.sha256(bare.encode()).hexdigest()[:32]}.json"
    state = [bare, shard.size, shard.tag]
    with locked(kept):
        known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        if known.get("state") != state:
            samples = [(m.name, m.start, m.size, label) for m, label in _samples(shard, shard.stream())]
            known = {"state": state, "samples": samples}
            atomic_write(kept, json.dumps(known))
    return [(Member(shard, name, start, size), label) for name, start, size, label in known["samples"]]


def _names_behind(address: str, folder: str) -> list[str] | None:
    """Return the class names that lie beside shards on a server; None: there is no such file."""
    place = urlsplit(address)._replace(path=posixpath.join(folder, CLASS_NAMES)).geturl()
    try:
        file = RemoteFile.find(place)
    except FetchError as error:
        if getattr(error.__cause__, "code", None) in (403, 404):
            return None
        raise
    return file.read(0, file.size).decode().splitlines()


def _of_shards(
    name: str,
    members: Mapping[str, list[tuple[Member, int]]],
    folder: str,
    class_names: list[str] | None,
    reading: Reading,
) -> Source:
    """Return the source of the samples of each split, or of "all"; `folder` has all shards."""
    if "all" in members and len(members) > 1:
        raise ArgumentError("name", f"must name the split of every shard or of none in {folder}, got {sorted(members)}")
    found = {part: samples for part, samples in members.items() if samples}
    labels = [label for samples in found.values() for _, label in samples]
    pools = {
        part: Pool(
            [label for _, label in samples],
            [f"{_place(m.shard, folder)}/{m.name}/{m.size}" for m, _ in samples],
            ReadMember([m for m, _ in samples], reading),
        )
        for part, samples in found.items()
    }
    return source_of(name, pools, _class_names(class_names, labels, folder), reading)


def _place(shard: str | RemoteFile, folder: str) -> str:
    """Return where a shard lies in the folder that has all of them."""
    if isinstance(shard, RemoteFile):
        return posixpath.relpath(urlsplit(shard.address).path, folder)
    return os.path.relpath(shard, folder)


def _samples(shard: str | RemoteFile, file: IO[bytes]) -> Iterator[tuple[Member, int]]:
    """Yield the images of a shard with their labels; a file on a server is read once, from the beginning to the end."""
    mode: Any = "r|" if isinstance(shard, RemoteFile) else "r:"
    image, label, key = None, None, ("", "")
    try:
        with tarfile.open(fileobj=file, mode=mode) as archive:
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
                    image = Member(shard, member.name, member.offset_data, member.size)
                elif suffix in ("cls", "json"):
                    content = archive.extractfile(member)
                    assert content is not None
                    text = content.read().decode()
                    label = text if suffix == "cls" else json.loads(text).get("label")
    except (tarfile.TarError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise ArgumentError("name", f"must have readable, uncompressed shards, got {shard}: {error}") from error
    if image is not None or label is not None:
        yield _complete(image, label, key[1], shard)


def _complete(image: Member | None, label: Any, sample: str, shard: str | RemoteFile) -> tuple[Member, int]:
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


def _names_in(path: Path) -> list[str] | None:
    """Return the class names in a file; None: there is no such file."""
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else None


def _class_names(names: list[str] | None, labels: Sequence[int], folder: str) -> list[str]:
    """Return the names of the classes, numbers if they have none."""
    if names is None:
        return [str(i) for i in range(max(labels, default=-1) + 1)]
    if len({*names}) != len(names) or max(labels, default=-1) >= len(names):
        wanted = max(labels, default=-1) + 1
        raise ArgumentError(
            "name", f"must have {wanted} different class names in {CLASS_NAMES} in {folder}, got {len(names)}"
        )
    return names


def huggingface_source(name: str, reading: Reading, prefix: str = HFDS) -> Source:
    """Return a data set of Hugging Face's `datasets`: a folder that `save_to_disk` wrote, or what `load_dataset` takes.

    It has a column of images, and one of labels: a `ClassLabel`, or "label" with class indices or class names.

    Args:
        prefix: "hfds:", or "hfids:" for a data set of the Hub that is read from there (`streamed.py`).

    Raises:
        ImportError: `datasets` is not installed. ValueError: the set cannot be loaded or lacks a column. FetchError: a
            set is to be read from the Hub, which does not answer.
    """
    with needed("datasets", f"the data set {prefix}{name}"):
        import datasets
    path = Path(name).expanduser()
    try:
        saved = any((path / file).is_file() for file in ("dataset_dict.json", "state.json"))
        if prefix == HFIDS:
            loaded: Any = streamed_parts(name)
        else:
            loaded = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(name)
    except (ArgumentError, FetchError):
        raise
    except Exception as error:  # datasets passes on whatever its readers raise
        said = f"{type(error).__name__}: {error}"
        raise ArgumentError("name", f"must be a data set that `datasets` loads, got {name!r} ({said})") from error
    parts: Mapping[str, Any] = loaded if isinstance(loaded, Mapping) else {"all": loaded}
    pools, names = dict[str, Pool](), list[str]()
    for part, rows in parts.items():
        found = split_of(part)[0] or ("all" if len(parts) == 1 else None)
        if found is None or not len(rows):
            why = "it is empty" if found else "its name says neither training, validation nor test"
            warnings.warn(f"{prefix}{name}: the split {part!r} is left out, {why}", stacklevel=2)
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
        together = getattr(rows, "together", None)
        pools[found] = Pool(values, keys, ReadRow(rows, images, where, reading), together=together)
    return source_of(f"{prefix}{name}", pools, names, reading)


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


def source_of(name: str, pools: Mapping[str, Pool], names: list[str], reading: Reading) -> Source:
    """Return the source of the pools "train", "val" and "test", or "all"."""
    train = pools.get("train") or pools.get("all")
    if train is None:
        raise ArgumentError("name", f"must have images to train on, got {name} with {sorted(pools) or 'no images'}")
    return Source(name, names, train, pools.get("val"), pools.get("test"), reading.preprocessing.intensity_range)
