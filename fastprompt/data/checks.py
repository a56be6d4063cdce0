"""Check every image file by decoding it once, strictly, before it is used; cache the results."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import simplejpeg
from PIL import Image

from fastprompt.data.images import (
    MAX_DECODED_BYTES,
    covering,
    decode,
    decoded_bytes,
    deep_kind,
    lies_on_its_side,
    loses_bits,
    opened,
    to_rgb,
)
from fastprompt.fetch import cache_dir, file_sha256
from fastprompt.files import atomic_write

REMEMBERED_FROM = 500  # number of files from which results are cached
_AT_ONCE = 512  # files per batch; an interrupt takes effect between batches
_LARGE = 1 << 26  # decoded bytes; larger images are checked one at a time, whatever the number of threads
_one_large = threading.Lock()


@dataclass(frozen=True)
class Checked:
    """The result of checking one image file.

    Attributes:
        damage: why the file cannot be read, or None. The other attributes are valid only if this is None.
        width, height: in pixels, after rotation to upright.
        decoded: size of the decoded image in bytes, see `decoded_bytes`.
        kind: "I" or "F" for a grey image of more than 8 bits (see `deep_kind`), else None.
        low, high: minimum and maximum value of such an image.
        sha256: digest of the file.
        size, mtime_ns: size and modification time of the file when it was checked.
        cut: whether it has more than 8 bits per channel, of which only the upper 8 are read (see `loses_bits`).
    """

    damage: str | None = None
    width: int = 0
    height: int = 0
    decoded: int = 0
    kind: str | None = None
    low: float = 0.0
    high: float = 0.0
    sha256: str = ""
    size: int = -1
    mtime_ns: int = -1
    cut: bool = False

    def still_holds(self, path: str | os.PathLike[str]) -> bool:
        """Whether size and modification time of the file are those of the checked file."""
        info = os.stat(path)
        return (info.st_size, info.st_mtime_ns) == (self.size, self.mtime_ns)


def check_image(path: str | os.PathLike[str], max_decoded_bytes: int = MAX_DECODED_BYTES) -> Checked:
    """Decode an image file and report what it is or what is wrong with it; never raises.

    A JPEG is decoded at an eighth of its size, by Pillow and then strictly (see `jpeg_damage`). All checksums of a PNG
    are verified. Other formats are decoded in full.
    """
    try:
        info = os.stat(path)
        with opened(path, max_decoded_bytes) as image:
            width, height, needed, cut = image.width, image.height, decoded_bytes(image), loses_bits(image)
            image.draft(image.mode, (max(1, width // 8), max(1, height // 8)))  # affects JPEG only
            with _one_large if needed > _LARGE else nullcontext():
                decode(path, image)
                kind, (low, high) = deep_kind(image), _extremes(image)
            to_rgb(image.crop((0, 0, 1, 1)))  # Pillow reads some modes that it cannot convert
            if lies_on_its_side(image):
                width, height = height, width
        digest = file_sha256(path)
        return Checked(None, width, height, needed, kind, low, high, digest, info.st_size, info.st_mtime_ns, cut)
    except Exception as error:
        return Checked(str(error) or type(error).__name__)


def _extremes(image: Image.Image) -> tuple[float, float]:
    """Return minimum and maximum of a grey image of more than 8 bits; (0, 0) for other images."""
    if deep_kind(image) is None:
        return 0.0, 0.0
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite((low, high)).all():
        raise ValueError("it has NaN or infinite values")
    return low, high


def check_images(
    paths: Sequence[str], max_decoded_bytes: int = MAX_DECODED_BYTES, root: str | os.PathLike[str] | None = None
) -> list[Checked]:
    """Run `check_image` on each file, on several threads.

    If `root`, the folder of the data set, is given and there are at least `REMEMBERED_FROM` files, the results are
    kept in the user's cache. A file is decoded again when its size, its modification time or the version of a decoder
    differs.
    """
    known = {} if root is None or len(paths) < REMEMBERED_FROM else _remembered(root)
    found = {
        path: checked for path in paths if (checked := known.get(path)) and _usable(path, checked, max_decoded_bytes)
    }
    unknown = [path for path in paths if path not in found]
    try:
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(unknown), _AT_ONCE):
                part = unknown[start : start + _AT_ONCE]
                results = pool.map(partial(check_image, max_decoded_bytes=max_decoded_bytes), part)
                found.update(zip(part, results, strict=True))
    finally:
        if root is not None and len(paths) >= REMEMBERED_FROM and unknown:
            _remember(root, found)
    return [found[path] for path in paths]


def _usable(path: str, checked: Checked, max_decoded_bytes: int) -> bool:
    try:
        return checked.decoded <= max_decoded_bytes and checked.still_holds(path)
    except OSError:
        return False


def _cache_file(root: str | os.PathLike[str]) -> Path:
    name = hashlib.sha256(os.path.realpath(root).encode("utf-8", "surrogateescape")).hexdigest()
    return cache_dir() / "checked" / f"{name[:32]}.json"


def _decoders() -> list[str]:
    return ["3", PIL.__version__, simplejpeg.__version__]  # the first entry is the version of this check


def _remembered(root: str | os.PathLike[str]) -> dict[str, Checked]:
    """Return cached results of a data set by path; empty if they come from other decoder versions."""
    try:
        stored = json.loads(_cache_file(root).read_text(encoding="utf-8"))
        if stored["decoders"] != _decoders():
            return {}
        return {os.path.join(root, below): Checked(None, *row) for below, row in stored["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _remember(root: str | os.PathLike[str], found: Mapping[str, Checked]) -> None:
    """Cache the results of the readable files."""
    files = {
        os.path.relpath(path, root): [*asdict(checked).values()][1:]
        for path, checked in found.items()
        if checked.damage is None
    }
    try:
        atomic_write(_cache_file(root), json.dumps({"decoders": _decoders(), "files": files}))
    except OSError as error:
        warnings.warn(f"the check of {os.fspath(root)} could not be cached: {error}", stacklevel=2)


def warn_of_cut_bits(checked: Mapping[str, Checked], stacklevel: int) -> None:
    """Warn of colour images, by path, with more than 8 bits a channel, of which only the upper 8 are read."""
    cut = [path for path, known in checked.items() if known.cut]
    if cut:
        warnings.warn(
            f"{len(cut)} image(s) have colours of more than 8 bits a channel, e.g. {cut[0]}: the upper 8 bits of each "
            "are read, and intensity_range does not apply to them",
            stacklevel=stacklevel + 1,
        )


def damage(checked: Checked, size: tuple[int, int], resize: str) -> str | None:
    """Return why an image cannot be read or resized to `size`, or None."""
    if checked.damage is not None:
        return checked.damage
    try:
        covering(checked.width, checked.height, size, resize)
    except ValueError as error:
        return str(error)
    return None


def report_bad(bad: Sequence[tuple[str, str]], on_bad: str) -> None:
    """Raise ValueError for a list of (file, reason), or warn with `on_bad="skip"`; names up to ten files."""
    if not bad:
        return
    listed = "; ".join(f"{path} ({reason})" for path, reason in bad[:10]) + (
        f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
    )
    if on_bad == "error":
        raise ValueError(
            f"{len(bad)} image file(s) cannot be read: {listed}. Remove them or leave them out with on_bad='skip' "
            "(--on-bad skip)"
        )
    warnings.warn(f"skipped {len(bad)} image file(s) that cannot be read: {listed}", stacklevel=4)
