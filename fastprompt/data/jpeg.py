"""Detect JPEG files with missing pixels, which libjpeg fills with grey and reports in warnings."""

from __future__ import annotations

import os
import re
from pathlib import Path

import simplejpeg

_HARMLESS = re.compile(r"ICC|Adobe")  # warnings about colours
_PADDED = re.compile(r"\b([1-9]|1[01]) extraneous bytes before marker 0xd9")  # some cameras write them


def jpeg_damage(source: str | os.PathLike[str] | bytes, progressive: bool = False) -> str | None:
    """Return libjpeg's warning when decoding a JPEG (a path or bytes), or None if the data are intact.

    The image is decoded at an eighth of its size, which reads all compressed data but computes few pixels. JPEG data
    have no checksum, so a wrong byte after which the decoder resynchronises goes unnoticed. Up to 11 bytes of padding
    before the end marker do not count as damage, except in a `progressive` image, where they are the rest of a scan.
    Files that this decoder cannot read at all return None and are left to Pillow.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        colours = simplejpeg.decode_jpeg_header(data, strict=False)[2]
    except ValueError:
        return None
    wanted = {"Gray": "GRAY", "CMYK": "CMYK", "YCCK": "CMYK"}.get(colours, "RGB")
    try:
        simplejpeg.decode_jpeg(data, wanted, fastdct=True, fastupsample=True, min_factor=8, strict=True)
    except ValueError as error:
        harmless = _HARMLESS.search(str(error)) or (not progressive and _PADDED.search(str(error)))
        return None if harmless or not _decodes(data, wanted) else str(error)
    return None


def _decodes(data: bytes, colours: str) -> bool:
    """Whether the decoder produces an image if it ignores damage."""
    try:
        simplejpeg.decode_jpeg(data, colours, min_factor=8, strict=False)
    except ValueError:
        return False
    return True
