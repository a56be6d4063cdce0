"""Which image formats are read: those of Pillow's registry, without the ones that start programs."""

from __future__ import annotations

import os

from PIL import Image

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that a file of any name may have: their first bytes tell them apart without doubt."""
REFUSED = {
    "EPS": "its reader starts Ghostscript",
    "IPTC": "its reader opens what is inside in any format, EPS included",
    "WMF": "its reader leaves drawing to the operating system",
    "BUFR": "Pillow reads no pixels of it",
    "GRIB": "Pillow reads no pixels of it",
    "HDF5": "Pillow reads no pixels of it",
    "MPEG": "Pillow reads no pixels of it",
}
"""Formats of Pillow's that are never opened, and why."""


def opened_formats(path: str | os.PathLike[str]) -> list[str]:
    """The formats that a file is tried as: `FORMATS`, and the one that its extension names, where Pillow has it.

    Some of the others are told by next to nothing, so that a damaged file of any name would be taken for one.
    """
    Image.init()
    named = Image.EXTENSION.get(os.path.splitext(os.fspath(path))[1].lower())
    formats = [*FORMATS] if named is None or named in FORMATS or named in REFUSED else [*FORMATS, named]
    return [name for name in formats if name in Image.OPEN]


def is_image_name(path: str | os.PathLike[str]) -> bool:
    """Whether the extension is one of an image that is read."""
    Image.init()
    name = Image.EXTENSION.get(os.path.splitext(os.fspath(path))[1].lower())
    return name == "MPO" or (name in Image.OPEN and name not in REFUSED)  # the JPEG reader opens MPO


def why_not_opened(suffix: str) -> str | None:
    """Why files with this extension are not opened although Pillow knows their format, or None."""
    Image.init()
    name = Image.EXTENSION.get(suffix.lower())
    return REFUSED.get(name) if name is not None else None
