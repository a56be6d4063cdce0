"""Every image file is decoded once, strictly, before it is used; what was found is remembered."""

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

REMEMBERED_FROM = 500  # files: so many are worth a file in the cache
_AT_ONCE = 512  # files between two looks at whether the user has interrupted
_LARGE = 1 << 26  # decoded bytes: larger images are checked one at a time, whatever the number of threads
_one_large = threading.Lock()


@dataclass(frozen=True)
class Checked:
    """What is known of an image file.

    Attributes:
        damage: why it cannot be read, or None; then the rest is known.
        width, height: pixels, upright.
        decoded: bytes of memory that it takes, see `decoded_bytes`.
        kind: "I" or "F" for a grey image of more than 8 bits (see `deep_kind`), else None.
        low, high: the least and largest value of such an image.
        sha256: of the file.
        size, mtime_ns: of the file when it was checked.
        cut: only the upper 8 bits of its 16 a channel are read (see `loses_bits`).
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
        """Whether the file is the one that was checked, by its size and the time of its last change."""
        info = os.stat(path)
        return (info.st_size, info.st_mtime_ns) == (self.size, self.mtime_ns)


def check_image(path: str | os.PathLike[str], max_decoded_bytes: int = MAX_DECODED_BYTES) -> Checked:
    """Decode an image file and say what it is or what is wrong with it; raises nothing.

    A JPEG is decoded at an eighth of its size, by Pillow and once more strictly (see `jpeg_damage`); of a PNG all
    checksums are compared; other formats are decoded as for use.
    """
    try:
        info = os.stat(path)
        with opened(path, max_decoded_bytes) as image:
            width, height, needed, cut = image.width, image.height, decoded_bytes(image), loses_bits(image)
            image.draft(image.mode, (max(1, width // 8), max(1, height // 8)))  # has an effect on JPEG alone
            with _one_large if needed > _LARGE else nullcontext():
                decode(path, image)
                kind, (low, high) = deep_kind(image), _extremes(image)
            to_rgb(image.crop((0, 0, 1, 1)))  # Pillow reads modes that it does not convert
            if lies_on_its_side(image):
                width, height = height, width
        digest = file_sha256(path)
        return Checked(None, width, height, needed, kind, low, high, digest, info.st_size, info.st_mtime_ns, cut)
    except Exception as error:
        return Checked(str(error) or type(error).__name__)


def _extremes(image: Image.Image) -> tuple[float, float]:
    """The least and the largest value of a grey image of more than 8 bits; (0, 0) of another image."""
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
    """`check_image` of each file, on several threads.

    With `root`, the folder of a data set of at least `REMEMBERED_FROM` files, what was found is kept in the user's
    cache: a file is decoded again when its size, the time of its last change, or the version of a decoder differs.
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
    return ["2", PIL.__version__, simplejpeg.__version__]  # the first: of the check itself


def _remembered(root: str | os.PathLike[str]) -> dict[str, Checked]:
    """What earlier checks of a data set found, by path; nothing where they used other decoders."""
    try:
        stored = json.loads(_cache_file(root).read_text(encoding="utf-8"))
        if stored["decoders"] != _decoders():
            return {}
        return {os.path.join(root, below): Checked(None, *row) for below, row in stored["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _remember(root: str | os.PathLike[str], found: Mapping[str, Checked]) -> None:
    """Keep what was found of the files that can be read."""
    files = {
        os.path.relpath(path, root): [*asdict(checked).values()][1:]
        for path, checked in found.items()
        if checked.damage is None
    }
    try:
        atomic_write(_cache_file(root), json.dumps({"decoders": _decoders(), "files": files}))
    except OSError as error:
        warnings.warn(f"the check of {os.fspath(root)} is not remembered: {error}", stacklevel=2)


def warn_of_cut_bits(checked: Mapping[str, Checked], stacklevel: int) -> None:
    """Warn of colour images, by path, of whose 16 bits a channel only the upper 8 are read."""
    cut = [path for path, known in checked.items() if known.cut]
    if cut:
        warnings.warn(
            f"{len(cut)} image(s) have colours of 16 bits a channel, e.g. {cut[0]}: the upper 8 bits of each are read, "
            "and intensity_range does not apply to them",
            stacklevel=stacklevel + 1,
        )


def damage(checked: Checked, size: tuple[int, int], resize: str) -> str | None:
    """Why an image cannot be brought to `size`, or None."""
    if checked.damage is not None:
        return checked.damage
    try:
        covering(checked.width, checked.height, size, resize)
    except ValueError as error:
        return str(error)
    return None


def report_bad(bad: Sequence[tuple[str, str]], on_bad: str) -> None:
    """Raise ValueError for a list of (file, reason), or with `on_bad="skip"` warn; up to ten are named."""
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
