"""Image files to uint8 tensors: rotate upright, decode strictly, convert to RGB, resize once."""

from __future__ import annotations

import io
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode, functional as F

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.data.formats import FORMATS as FORMATS, opened_formats
from fastprompt.data.jpeg import jpeg_damage

LARGEST_COVER = 1 << 25
"""Maximum number of pixels of an image scaled for cropping; scaling a very thin image would need gigabytes."""
MAX_DECODED_BYTES = 1 << 29
"""Default maximum size of one decoded image in bytes, see `decoded_bytes`; 134 megapixels in RGB."""
FULL_RANGE = {"I": (0.0, 65535.0), "F": (0.0, 1.0)}
"""Default black and white level of integer (16-bit) and of float grey images."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HEAD = 1 << 16  # bytes of a file that are searched for its bit depth
_ROWS_AT_ONCE = 1 << 20  # values of a deep grey image scaled at a time; bounds the memory of the copies


class TooLarge(ValueError):
    """A decoded image would exceed the memory limit."""


def sides(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Return `image_size` as (height, width); an int means a square. Raises TypeError or ValueError otherwise."""
    both = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(both) != 2 or any(isinstance(side, bool) or not isinstance(side, int) for side in both):
        raise ArgumentTypeError("image_size", f"must be an integer or (height, width) in pixels, got {image_size!r}")
    if min(both) <= 0:
        raise ArgumentError("image_size", f"must be positive, got {image_size!r}")
    return both[0], both[1]


def decoded_limit(max_decoded_bytes: int | None) -> int:
    """Return `max_decoded_bytes`, or `MAX_DECODED_BYTES` for None. Raises TypeError or ValueError otherwise."""
    if max_decoded_bytes is None:
        return MAX_DECODED_BYTES
    if isinstance(max_decoded_bytes, bool) or not isinstance(max_decoded_bytes, int):
        raise ArgumentTypeError("max_decoded_bytes", f"must be an integer or None, got {max_decoded_bytes!r}")
    if max_decoded_bytes <= 0:
        raise ArgumentError("max_decoded_bytes", f"must be a positive number of bytes, got {max_decoded_bytes}")
    return max_decoded_bytes


def decoded_bytes(image: Image.Image) -> int:
    """Return the bytes an opened image needs when decoded, plus those of an RGB copy if it is not RGB.

    Reads only the header.
    """
    per_pixel = {"1": 1, "L": 1, "P": 1}.get(image.mode, 2 if image.mode.startswith("I;16") else 4)
    as_rgb = 0 if image.mode == "RGB" and not image.has_transparency_data else 4
    return image.width * image.height * (per_pixel + as_rgb)


def check_decoded_bytes(image: Image.Image, max_decoded_bytes: int = MAX_DECODED_BYTES) -> None:
    """Raise `TooLarge` if an opened image would exceed `max_decoded_bytes`; does not decode it."""
    needed = decoded_bytes(image)
    if needed > max_decoded_bytes:
        raise TooLarge(
            f"{image.width} x {image.height} pixels in mode {image.mode} need {needed:,} bytes when decoded, more than "
            f"max_decoded_bytes={max_decoded_bytes:,}"
        )


def open_image(
    path: str | os.PathLike[str],
    *,
    intensity_range: tuple[float, float] | None = None,
    max_decoded_bytes: int = MAX_DECODED_BYTES,
    strict: bool = True,
) -> Image.Image:
    """Open an image file, rotate it upright by its EXIF orientation, and convert it to mode RGB.

    The first image is taken from a file with several. Transparent pixels are composited over white.

    Args:
        intensity_range: the values of grey images with more than 8 bits that become black and white; see `to_rgb`.
        max_decoded_bytes: maximum size of the decoded image, see `decoded_bytes`.
        strict: refuse files with damaged pixels that Pillow ignores (see `decode`). Pass False only for files that
            have been checked before.

    Raises:
        ValueError: the file does not exist, is not a regular file, is damaged or is too large. The error names it.
    """
    try:
        with opened(path, max_decoded_bytes) as image:
            if strict:
                decode(path, image)
            return to_rgb(upright(image), intensity_range)
    except FileNotFoundError as error:
        raise ValueError(f"no such image file: {os.fspath(path)}") from error
    except Exception as error:  # on damaged files, Pillow also raises TypeError, struct.error and others
        raise ValueError(f"cannot read the image {os.fspath(path)}: {error}") from error


@contextmanager
def opened(path: str | os.PathLike[str], max_decoded_bytes: int) -> Iterator[Image.Image]:
    """Open a regular file as an image, reading only its header."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is not a regular file")
    with _pillow_limit(max_decoded_bytes):
        try:
            image = Image.open(path, formats=opened_formats(path))
        except Image.DecompressionBombError as error:
            raise TooLarge(f"it needs more than max_decoded_bytes={max_decoded_bytes:,} decoded ({error})") from error
        with image:
            check_decoded_bytes(image, max_decoded_bytes)
            yield image


_lifting = threading.Lock()
_lifted: list[int | None] = []  # Pillow's own limit, once per image opened while it is lifted


@contextmanager
def _pillow_limit(max_decoded_bytes: int) -> Iterator[None]:
    """Lift Pillow's pixel limit if our limit, which replaces it, is above the default."""
    if max_decoded_bytes <= MAX_DECODED_BYTES:
        yield
        return
    with _lifting:
        _lifted.append(_lifted[0] if _lifted else Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        with _lifting:
            own = _lifted.pop()
            if not _lifted:
                Image.MAX_IMAGE_PIXELS = own


def decode(source: str | os.PathLike[str] | bytes, image: Image.Image) -> None:
    """Decode an opened image; raise an exception if `source`, its path or bytes, is damaged.

    Pillow itself refuses a file that ends early. It does not verify the checksums of PNG pixels and fills missing
    parts of a JPEG with grey, so both are checked here.
    """
    if image.format == "PNG":
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=["PNG"]) as twin:
            twin.verify()
    image.load()
    if image.format in ("JPEG", "MPO"):
        damage = jpeg_damage(source, progressive=bool(image.info.get("progressive")))
        if damage:
            raise OSError(damage)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that turns a decoded image upright; unreadable EXIF data are ignored."""
    try:
        return _UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:
        return None


def upright(image: Image.Image) -> Image.Image:
    """Decode an opened image and rotate it as its EXIF orientation says."""
    image.load()
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def lies_on_its_side(image: Image.Image) -> bool:
    """Whether rotating a decoded image upright swaps its width and height."""
    return _turn(image) in (
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_270,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_90,
    )


def deep_kind(image: Image.Image) -> str | None:
    """Return "I" for integer grey images of more than 8 bits, "F" for float ones, None for all others."""
    return "I" if image.mode.startswith("I") else "F" if image.mode == "F" else None


def loses_bits(image: Image.Image) -> bool:
    """Whether an image that is not decoded yet has more than 8 bits a channel, of which Pillow decodes the upper 8.

    Pillow has no mode for more in colour or in grey with transparency, and none at all in AVIF. Grey images of other
    formats keep their bits.
    """
    if image.mode.startswith("I"):
        return False
    if image.format == "JPEG2000":
        return any(depth > 8 for depth in _jpeg2000_depths(_head(image)))
    if image.format == "AVIF":
        properties = _head(image).partition(b"av1C")[2]  # AV1 in ISO BMFF, section 2.3.3: the third byte has the flag
        return len(properties) > 2 and bool(properties[2] & 0x40)
    for tile in getattr(image, "tile", ()):
        codec, arguments = tile[0], tile[3]
        if ";16" in str(arguments):
            return True
        if codec in ("ppm", "ppm_plain") and isinstance(arguments, tuple) and isinstance(arguments[-1], int):
            return image.mode == "RGB" and arguments[-1] > 255  # the file's highest value
    return False


def depth_warning(image: Image.Image, intensity_range: tuple[float, float] | None) -> str | None:
    """Return what to say of an image that is not decoded yet if its bits do not fit 8 a channel; None if they do.

    A grey image whose `intensity_range` was chosen is read as its owner wants it: None.
    """
    if loses_bits(image):
        return "has colours of more than 8 bits a channel: the upper 8 bits of each are read"
    kind = deep_kind(image)
    if kind is None or intensity_range is not None:
        return None
    low, high = FULL_RANGE[kind]
    return f"is grey with more than 8 bits: its values from {low:g} to {high:g} are scaled to black and white"


def _head(image: Image.Image) -> bytes:
    """Return the first bytes of an opened file; the place where Pillow reads on stays the same."""
    file = image.fp  # type: ignore[attr-defined]
    if file is None:
        return b""
    at = file.tell()
    file.seek(0)
    head = file.read(_HEAD)
    file.seek(at)
    return bytes(head)


def _jpeg2000_depths(head: bytes) -> list[int]:
    """Return the bits of each component, from the SIZ marker that follows a codestream's start (ISO 15444-1, A.5.1)."""
    size = head.partition(b"\xff\x4f\xff\x51")[2]
    components = int.from_bytes(size[36:38], "big")
    return [(depth & 0x7F) + 1 for depth in size[38 : 38 + 3 * components : 3]]


def to_rgb(image: Image.Image, intensity_range: tuple[float, float] | None = None) -> Image.Image:
    """Convert any PIL image to RGB, compositing transparent pixels over white.

    Grey images of more than 8 bits (modes I;16, I and F) are scaled: `intensity_range` = (low, high) maps to 0 and
    255, and values outside are clipped. Integers are rounded down, floats to the nearest. Without `intensity_range`
    the mode's `FULL_RANGE` is used; the range never depends on the image. Colour images with more bits per channel keep
    the upper 8, as Pillow reads them (`loses_bits`); `intensity_range` does not apply to them.

    Raises:
        ValueError: values are NaN or infinite.
    """
    kind = deep_kind(image)
    if kind is not None:
        image = Image.fromarray(_levels(np.asarray(image), *(intensity_range or FULL_RANGE[kind])))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale (H, W) numbers to (H, W) uint8, with low → 0 and high → 255."""
    levels = np.empty(values.shape, np.uint8)
    rows = max(1, _ROWS_AT_ONCE // max(1, values.shape[1]))
    for start in range(0, len(values), rows):
        part = values[start : start + rows].astype(np.float64)
        if not np.isfinite(part).all():
            raise ValueError("it has NaN or infinite values")
        scaled = np.clip((part - low) * 255 / (high - low), 0, 255)
        levels[start : start + rows] = np.rint(scaled) if values.dtype.kind == "f" else np.floor(scaled)
    return levels


def covering(width: int, height: int, size: tuple[int, int], resize: str) -> tuple[int, int]:
    """Return the (height, width) to scale an image to before it is cropped to `size`.

    "crop" scales so that the image just covers `size`; "squash" scales both sides independently. Raises ValueError if
    "crop" would scale a long, thin image to more than `LARGEST_COVER` pixels.
    """
    if resize != "crop":
        return size
    scale = max(size[0] / height, size[1] / width)
    scaled = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    if scaled[0] * scaled[1] > LARGEST_COVER:
        raise ArgumentError(
            "image",
            f"has an aspect ratio too extreme to crop, got {width} x {height} pixels: "
            f"scaled to cover {size[1]} x {size[0]} pixels it would have {scaled[0] * scaled[1]:,}, more than "
            f"{LARGEST_COVER:,}; use resize='squash'",
        )
    return scaled


def to_tensor(image: Image.Image | torch.Tensor, size: tuple[int, int], resize: str = "crop") -> torch.Tensor:
    """Resize a PIL image or a uint8 (1 or 3, H, W) tensor to a uint8 (3, *size) tensor, bicubic with antialiasing.

    `resize`: "crop" scales so that the image just covers `size` and crops the centre (for a square size: short side,
    then centre crop); "squash" scales both sides independently. Raises ValueError as `covering` does.
    """
    tensor = image if isinstance(image, torch.Tensor) else F.pil_to_tensor(to_rgb(image))
    scaled = covering(tensor.shape[2], tensor.shape[1], size, resize)
    tensor = F.resize(tensor, [*scaled], interpolation=InterpolationMode.BICUBIC, antialias=True)
    tensor = F.center_crop(tensor, [*size])
    return tensor.expand(3, -1, -1).contiguous()


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ArgumentError(argument, f"must be one of {', '.join(map(repr, choices))}, got {value!r}")
