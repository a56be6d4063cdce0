"""From images to the pixels that the host gets: open, resize as in training, and place prompts."""

from __future__ import annotations

import io
import os
import warnings
from typing import Any

import numpy as np
from PIL import Image

MAX_PIXELS = 100_000_000
LARGEST_COVER = 1 << 25
"""Maximum number of pixels of an image scaled for cropping; scaling a very thin image would need gigabytes."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that Pillow may read; some of its other formats start programs, as EPS starts Ghostscript."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → transposition that turns the image upright."""
ROWS_AT_ONCE = 1 << 20
"""Values of a grey image with more than 8 bits that are scaled at a time; bounds the memory of the copies."""
TIE = 1e-3
"""Levels subtracted from a shrunk pixel before rounding, as in training, so that ties are rounded down."""

ImageLike = Any
"""A file's path, its bytes, a PIL image, or a uint8 array (H, W, 3)."""


def open_image(
    image: ImageLike, max_pixels: int = MAX_PIXELS, intensity_range: tuple[float, float] | None = None
) -> Image.Image:
    """Open an image as upright RGB, with transparent pixels composited over white.

    Args:
        intensity_range: the values of grey images with more than 8 bits that become black and white; None uses 0 and
            65535 for integers, 0 and 1 for floats.

    Raises:
        TypeError: `image` is not an `ImageLike`.
        ValueError: `image` cannot be read, or has no pixels or more than `max_pixels`.
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
            raise ValueError(f"{name} is not a file")
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
    except Exception as error:  # on damaged files, Pillow also raises TypeError, struct.error and others
        raise ValueError(f"{name} cannot be read: {error}") from error
    with opened:
        _check_pixels(name, opened.width, opened.height, max_pixels)
        return _rgb(name, opened, intensity_range)


def _formats() -> list[str]:
    """Return those of FORMATS that the installed Pillow supports."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_pixels(name: str, width: int, height: int, max_pixels: int) -> None:
    if not 1 <= width * height <= max_pixels:
        raise ValueError(f"{name} must have from 1 to {max_pixels:,} pixels, got {width} x {height}")


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
    """Convert a grey image to 8 bits as in training: integers are rounded down, floats to the nearest."""
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
    """Rotate an image as its EXIF orientation says; ignore unreadable EXIF data."""
    image.load()
    try:
        turn = UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:
        return image
    return image if turn is None else image.transpose(turn)


def resized(image: Image.Image, size: tuple[int, int], resize: str) -> np.ndarray:
    """Resize an RGB image to uint8 (*size, 3), bicubic with antialiasing.

    "crop" scales it so that it just covers `size` and crops the middle; "squash" scales both sides independently.

    Raises:
        ValueError: the image is so thin that it would have more than `LARGEST_COVER` pixels before cropping.
    """
    (height, width), covering = size, size
    if resize == "crop":
        scale = max(height / image.height, width / image.width)
        covering = max(height, round(image.height * scale)), max(width, round(image.width * scale))
        if covering[0] * covering[1] > LARGEST_COVER:
            raise ValueError(
                f"image has an aspect ratio too extreme to crop, got {image.width} x {image.height} pixels: "
                f"scaled to cover {width} x {height} pixels it would have {covering[0] * covering[1]:,}, "
                f"more than {LARGEST_COVER:,}"
            )
    for sides in (
        (covering[1], image.height),
        (covering[1], covering[0]),
    ):  # columns first, whatever the Pillow version
        if image.size != sides:
            image = image.resize(sides, Image.Resampling.BICUBIC)
    top, left = round((covering[0] - height) / 2), round((covering[1] - width) / 2)
    return np.asarray(image)[top : top + height, left : left + width]


class Shrink:
    """Antialiased bilinear resampling of the rows only, (old, W, 3) levels → (new, W, 3), rounded to whole levels.

    Row i of the result is a weighted mean of the rows within `scale` = old / new of its middle, (i + ½) · scale. The
    weights fall linearly with the distance.

    Args:
        tie: levels subtracted before rounding: `TIE`, or 0 for a model that was trained without rounding.
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
    """Round levels, ties to even, and clip them to 0 and 255."""
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def assemble(patches: np.ndarray, rows: int, patch: int) -> np.ndarray:
    """Assemble patches (K, 3p²) of levels, ordered by channel, to uint8 (rows · p, W, 3)."""
    columns = len(patches) // rows
    grid = to_uint8(patches).reshape(rows, columns, 3, patch, patch)
    return grid.transpose(0, 3, 1, 4, 2).reshape(rows * patch, columns * patch, 3)


def png(pixels: np.ndarray) -> bytes:
    """Encode uint8 (H, W, 3) as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
