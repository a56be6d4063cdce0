"""Images to the pixels that the host gets: opened, resized as in training, prompts mixed and put in their place."""

from __future__ import annotations

import io
import os
import warnings
from typing import Any

import numpy as np
from PIL import Image

MAX_PIXELS = 100_000_000
LARGEST_COVER = 1 << 25
"""Pixels that an image may have after it was scaled to be cropped: a line of pixels would need gigabytes."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow is let read: some of its other formats start programs, EPS Ghostscript."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By the EXIF orientation."""
ROWS_AT_ONCE = 1 << 20
"""Values of a grey image of more than 8 bits that are scaled at a time: bounds the memory of the copies."""
TIE = 1e-3
"""Levels taken off a shrunk pixel before it is rounded, where training rounds: half way between two goes down."""

ImageLike = Any
"""A file's path, its bytes, a PIL image, or a uint8 array (H, W, 3)."""


def open_image(
    image: ImageLike, max_pixels: int = MAX_PIXELS, intensity_range: tuple[float, float] | None = None
) -> Image.Image:
    """An upright RGB image; transparent pixels come out as over white.

    Args:
        intensity_range: the values of grey images of more than 8 bits that are black and white; None: 0 and 65535 of
            integers, 0 and 1 of floats.

    Raises:
        TypeError: `image` is none of the kinds above.
        ValueError: it cannot be read, has no pixels, or more than `max_pixels`.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise TypeError(f"image must be a uint8 array (H, W, 3), got {image.dtype} {image.shape}")
        _check_pixels("image", image.shape[1], image.shape[0], max_pixels)
        return Image.fromarray(np.ascontiguousarray(image))
    if isinstance(image, Image.Image):
        _check_pixels("image", image.width, image.height, max_pixels)
        return _rgb("image", image, intensity_range)
    if isinstance(image, (str, os.PathLike)):
        name, source = f"image {os.fspath(image)}", image
        if not os.path.isfile(image):
            raise ValueError(f"{name} is no file")
    elif isinstance(image, (bytes, bytearray, memoryview)):
        name, source = "image", io.BytesIO(image)  # type: ignore[assignment]
    else:
        raise TypeError(f"image must be a path, bytes, a PIL image or a uint8 array, got {type(image).__name__}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(source, formats=_formats())
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels: {error}") from error
    except Exception as error:  # of a damaged file Pillow's readers raise TypeError, struct.error and others, too
        raise ValueError(f"{name} cannot be read: {error}") from error
    with opened:
        _check_pixels(name, opened.width, opened.height, max_pixels)
        return _rgb(name, opened, intensity_range)


def _formats() -> list[str]:
    """Those of FORMATS that the installed Pillow knows."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_pixels(name: str, width: int, height: int, max_pixels: int) -> None:
    if not 1 <= width * height <= max_pixels:
        raise ValueError(f"{name} has {width} x {height} pixels, from 1 to {max_pixels:,} are taken")


def _rgb(name: str, image: Image.Image, intensity_range: tuple[float, float] | None) -> Image.Image:
    try:
        image = _upright(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _grey(image, intensity_range or ((0, 1) if image.mode == "F" else (0, 65535)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image.convert("RGB")
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def _grey(image: Image.Image, bounds: tuple[float, float]) -> Image.Image:
    """A grey image of more than 8 bits in 8, as training reads it: integers rounded down, floats to the nearest."""
    values = np.asarray(image)
    levels = np.empty(values.shape, np.uint8)
    rows = max(1, ROWS_AT_ONCE // max(1, values.shape[1]))
    for start in range(0, len(values), rows):
        part = values[start : start + rows].astype(np.float64)
        if not np.isfinite(part).all():
            raise ValueError("it has NaN or infinite values")
        scaled = np.clip((part - bounds[0]) * 255 / (bounds[1] - bounds[0]), 0, 255)
        levels[start : start + rows] = np.rint(scaled) if values.dtype.kind == "f" else np.floor(scaled)
    return Image.fromarray(levels)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; EXIF data that cannot be read say nothing."""
    image.load()
    try:
        turn = UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:
        return image
    return image if turn is None else image.transpose(turn)


def resized(image: Image.Image, size: tuple[int, int], resize: str) -> np.ndarray:
    """An RGB image as uint8 (*size, 3), bicubic with antialiasing.

    "crop" scales it so that it just covers `size` and cuts out the middle; "squash" scales both sides on their own.

    Raises:
        ValueError: the image is so long and thin that it would have more than `LARGEST_COVER` pixels before it is cut.
    """
    (height, width), covering = size, size
    if resize == "crop":
        scale = max(height / image.height, width / image.width)
        covering = max(height, round(image.height * scale)), max(width, round(image.width * scale))
        if covering[0] * covering[1] > LARGEST_COVER:
            raise ValueError(
                f"image has {image.width} x {image.height} pixels, an aspect ratio that is too extreme to "
                f"crop: covering {width} x {height} pixels it would have {covering[0] * covering[1]:,}, "
                f"at most {LARGEST_COVER:,} are taken"
            )
    for sides in ((covering[1], image.height), (covering[1], covering[0])):  # first the columns, in every Pillow
        if image.size != sides:
            image = image.resize(sides, Image.Resampling.BICUBIC)
    top, left = round((covering[0] - height) / 2), round((covering[1] - width) / 2)
    return np.asarray(image)[top : top + height, left : left + width]


class Shrink:
    """(old, W, 3) levels → (new, W, 3): antialiased bilinear resampling of the rows alone, rounded to whole levels.

    Row i of the result is a weighted mean of the rows within `scale` = old / new of its middle, (i + ½) · scale, the
    weights falling linearly with the distance.

    Args:
        tie: levels taken off before rounding: `TIE`, or 0 for a model that was trained without rounding.
    """

    def __init__(self, old: int, new: int, tie: float = TIE) -> None:
        self.tie, scale = tie, old / new
        middle = (np.arange(new) + 0.5) * scale  # (new,)
        first = np.maximum((middle - scale + 0.5).astype(int), 0)
        count = np.minimum((middle + scale + 0.5).astype(int), old) - first
        self.rows = np.minimum(first[:, None] + np.arange(count.max()), old - 1)  # (new, taps)
        distance = np.abs(first[:, None] + np.arange(count.max()) + 0.5 - middle[:, None]) / scale
        weights = np.where(np.arange(count.max()) < count[:, None], np.maximum(1 - distance, 0), 0)
        self.weights = weights / weights.sum(axis=1, keepdims=True)  # (new, taps)

    def __call__(self, levels: np.ndarray) -> np.ndarray:
        levels = levels.astype(np.float64)
        total = self.weights[:, 0, None, None] * levels[self.rows[:, 0]]
        for tap in range(1, self.rows.shape[1]):
            total += self.weights[:, tap, None, None] * levels[self.rows[:, tap]]
        return to_uint8(total - self.tie)


def to_uint8(levels: np.ndarray) -> np.ndarray:
    """Levels cut off at 0 and 255 and rounded; half way goes to the even one."""
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def assemble(patches: np.ndarray, rows: int, patch: int) -> np.ndarray:
    """(K, 3p²) levels, channel by channel → uint8 (rows · p, W, 3)."""
    columns = len(patches) // rows
    grid = to_uint8(patches).reshape(rows, columns, 3, patch, patch)
    return grid.transpose(0, 3, 1, 4, 2).reshape(rows * patch, columns * patch, 3)


def png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
