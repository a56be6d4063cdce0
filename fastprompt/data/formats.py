"""Image formats that are read: those of Pillow's registry, except the ones that start programs."""

from __future__ import annotations

import os

from PIL import Image

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are recognised under any file name, because their first bytes are unambiguous."""
REFUSED = {
    "EPS": "its reader starts Ghostscript",
    "IPTC": "its reader opens embedded images of any format, including EPS",
    "WMF": "its reader leaves drawing to the operating system",
    "BUFR": "Pillow reads no pixels of it",
    "GRIB": "Pillow reads no pixels of it",
    "HDF5": "Pillow reads no pixels of it",
    "MPEG": "Pillow reads no pixels of it",
}
"""Pillow formats that are never opened, and why."""


def opened_formats(path: str | os.PathLike[str]) -> list[str]:
    """Return the formats to try on a file: `FORMATS`, and the one of its extension if Pillow has it.

    The other formats are not tried: some have such a weak signature that a damaged file would pass as one of them.
    """
    Image.init()
    named = Image.EXTENSION.get(os.path.splitext(os.fspath(path))[1].lower())
    formats = [*FORMATS] if named is None or named in FORMATS or named in REFUSED else [*FORMATS, named]
    return [name for name in formats if name in Image.OPEN]


def is_image_name(path: str | os.PathLike[str]) -> bool:
    """Whether the extension belongs to an image format that is read."""
    Image.init()
    name = Image.EXTENSION.get(os.path.splitext(os.fspath(path))[1].lower())
    return name == "MPO" or (name in Image.OPEN and name not in REFUSED)  # the JPEG reader opens MPO


def why_not_opened(suffix: str) -> str | None:
    """Return why files with this extension are not opened although Pillow knows the format, or None."""
    Image.init()
    name = Image.EXTENSION.get(suffix.lower())
    return REFUSED.get(name) if name is not None else None
