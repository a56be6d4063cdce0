"""Image files to uint8 tensors: opened upright, made RGB, resized once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import InterpolationMode, functional as F

RESIZES = ("crop", "squash")
LARGEST_COVER = 1 << 25
"""Pixels that an image may have after it was scaled to be cropped: a line of pixels would need gigabytes."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow is let read: some of its other formats start programs, EPS Ghostscript."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def sides(image_size: int | Sequence[int]) -> tuple[int, int]:
    """``image_size`` as (height, width); an int is a square. TypeError, ValueError for anything else."""
    both = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(both) != 2 or any(isinstance(side, bool) or not isinstance(side, int) for side in both):
        raise TypeError(f"image_size: expected an int or (height, width) in pixels, got {image_size!r}")
    if min(both) <= 0:
        raise ValueError(f"image_size: expected a positive size, got {image_size!r}")
    return both[0], both[1]


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """The image of a file, decoded, turned upright by its EXIF orientation, in mode RGB.

    Transparent pixels come out as over white; 16-bit grey is scaled to 8 bits. Raises ValueError naming the
    file.
    """
    try:
        with Image.open(path, formats=_formats()) as image:
            return to_rgb(_upright(image))
    except FileNotFoundError as error:
        raise ValueError(f"no such image file: {os.fspath(path)}") from error
    except Exception as error:  # of a damaged file Pillow's readers raise TypeError, struct.error and others, too
        raise ValueError(f"cannot read the image {os.fspath(path)}: {error}") from error


def _formats() -> list[str]:
    """Those of FORMATS that the installed Pillow knows."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; EXIF data that cannot be read say nothing."""
    image.load()
    try:
        turn = _UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:
        return image
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB; see open_image."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        wide = image.mode.startswith("I;16") or values.max(initial=0) > 255  # mode "I" does not say how many bits count
        image = Image.fromarray((values // 257 if wide else values).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def to_tensor(image: Image.Image | torch.Tensor, size: tuple[int, int], resize: str = "crop") -> torch.Tensor:
    """A PIL image, or a uint8 (1 or 3, H, W) tensor, as a uint8 (3, *size) tensor, bicubic with antialiasing.

    ``resize``: "crop" scales so that the image just covers ``size`` and cuts out the centre (for a square
    size: short side, then centre crop); "squash" scales both sides independently. ValueError where "crop" would
    scale an image, long and thin, to more than LARGEST_COVER pixels.
    """
    tensor = image if isinstance(image, torch.Tensor) else F.pil_to_tensor(to_rgb(image))
    height, width = size
    if resize == "crop":
        scale = max(height / tensor.shape[1], width / tensor.shape[2])
        covering = [max(height, round(tensor.shape[1] * scale)), max(width, round(tensor.shape[2] * scale))]
        if covering[0] * covering[1] > LARGEST_COVER:
            raise ValueError(
                f"image: {tensor.shape[2]} x {tensor.shape[1]} pixels are an aspect ratio that is too extreme to crop: "
                f"covering {width} x {height} pixels it would have {covering[0] * covering[1]:,}, at most "
                f"{LARGEST_COVER:,} are taken; resize='squash' takes it"
            )
    else:
        covering = [height, width]
    tensor = F.resize(tensor, covering, interpolation=InterpolationMode.BICUBIC, antialias=True)
    tensor = F.center_crop(tensor, [height, width])
    return tensor.expand(3, -1, -1).contiguous()


def check_image(path: str | os.PathLike[str]) -> str | None:
    """Why a file is not a whole image, or None. Cheap: pixels are decoded only where nothing else tells.

    PNG: all checksums. JPEG: header and end marker; where the end marker is missing the file is decoded.
    Other formats are decoded.
    """
    try:
        with Image.open(path, formats=_formats()) as image:
            if image.format == "PNG":
                image.verify()
            elif image.format != "JPEG" or not _ends_as_jpeg(path):
                image.load()
    except Exception as error:
        return str(error) or type(error).__name__
    return None


def _ends_as_jpeg(path: str | os.PathLike[str]) -> bool:
    with open(path, "rb") as stream:
        stream.seek(max(0, os.path.getsize(path) - 64))
        return b"\xff\xd9" in stream.read()


def bad_images(paths: Sequence[str | os.PathLike[str]]) -> dict[int, str]:
    """Index -> reason of the files among ``paths`` that check_image finds broken."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        return {i: reason for i, reason in enumerate(pool.map(check_image, paths)) if reason is not None}


def report_bad(bad: Sequence[tuple[str, str]], on_bad: str) -> None:
    """Raise ValueError for a list of (file, reason), or with ``on_bad="skip"`` warn; up to ten are named."""
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


def is_image_name(path: str | os.PathLike[str]) -> bool:
    """Whether the name is one of an image file (and not a hidden file)."""
    name = os.path.basename(os.fspath(path))
    return not name.startswith(".") and name.lower().endswith(IMG_EXTENSIONS)


def list_images(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str]:
    """The image files named by ``paths``: files as they are, folders searched through and through, sorted.

    Raises ValueError for a path that does not exist, a folder that cannot be read or has no image, and an
    empty list.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    found: list[str] = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            inside = sorted(
                os.path.join(folder, file) for folder, _, files in walk(path) for file in files if is_image_name(file)
            )
            if not inside:
                raise ValueError(f"paths: no image in the folder {path} (looked for {', '.join(IMG_EXTENSIONS)})")
            found += inside
        elif path.exists():
            found.append(str(path))
        else:
            raise ValueError(f"paths: no such file or folder: {path}")
    if not found:
        raise ValueError("paths: expected at least one image file or folder, got none")
    return found


def walk(folder: Path) -> list[tuple[str, list[str], list[str]]]:
    """os.walk, links followed, but a folder that cannot be listed is a ValueError, not an empty one."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    return list(os.walk(folder, onerror=refuse, followlinks=True))


def read_images(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    image_size: int | Sequence[int],
    *,
    resize: str = "crop",
    on_bad: str = "error",
) -> tuple[torch.Tensor, list[str]]:
    """Image files and folders of them -> (uint8 (N, 3, S, S), the N file names), for prediction.

    The EXIF orientation is honoured. ``resize``: "crop" (short side, centre crop) or "squash".
    ``on_bad``: "error" raises a ValueError naming the files that cannot be read, "skip" leaves them out with
    a warning. For more images than fit in memory call list_images and hand this function a slice at a time.
    """
    size = sides(image_size)
    check_choice("resize", resize, RESIZES)
    check_choice("on_bad", on_bad, ("error", "skip"))
    tensors, names, bad = [], [], []
    for path in list_images(paths):
        try:
            tensors.append(to_tensor(open_image(path), size, resize))
            names.append(path)
        except ValueError as error:
            bad.append((path, str(error.__cause__ or error)))
    report_bad(bad, on_bad)
    if not tensors:
        raise ValueError(f"paths: none of the {len(bad)} image files can be read")
    return torch.stack(tensors), names


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    """ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
