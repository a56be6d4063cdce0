"""Whether the pixels of a JPEG file are all there: libjpeg fills what is missing with grey and says so in warnings."""

from __future__ import annotations

import os
import re
from pathlib import Path

import simplejpeg

_HARMLESS = re.compile(r"ICC|Adobe")  # warnings about colours
_PADDED = re.compile(r"\b([1-9]|1[01]) extraneous bytes before marker 0xd9")  # as some cameras do


def jpeg_damage(source: str | os.PathLike[str] | bytes, progressive: bool = False) -> str | None:
    """What libjpeg warns of when it decodes a JPEG file, or the bytes of one; None where the data are whole.

    The image is decoded at an eighth of its size: all compressed data are read, but few pixels made of them. Compressed
    data have no checksum, so that a wrong byte after which the code finds its way again is not found. Up to 11 bytes of
    padding before the end marker are no damage, unless the image is `progressive`, where they are what is left of it.
    Files that this decoder cannot read at all are Pillow's to judge.
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
    """Whether the decoder makes an image of the data when it passes over damage."""
    try:
        simplejpeg.decode_jpeg(data, colours, min_factor=8, strict=False)
    except ValueError:
        return False
    return True
