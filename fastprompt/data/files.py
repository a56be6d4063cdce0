"""Find, check and read image files without labels, for prediction."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from fastprompt.adapters import Preprocessing
from fastprompt.arguments import ArgumentError
from fastprompt.data.checks import Checked, check_images, damage, report_bad, warn_of_cut_bits
from fastprompt.data.images import (
    FULL_RANGE,
    MAX_DECODED_BYTES,
    check_choice,
    decoded_limit,
    open_image,
    sides,
    to_tensor,
)
from fastprompt.data.walk import LeftOut, images_below

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def list_images(paths: Paths) -> list[str]:
    """Return the image files named by `paths`. Files are returned as given, folders are searched recursively.

    In folders, hidden and system files and folders are left out, links are followed, and every file is returned once.
    The files of a folder are sorted. A warning names whatever else is left out.

    Raises:
        ValueError: a path does not exist, a folder cannot be read or has no image, or `paths` is empty.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    found: list[str] = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            left_out = LeftOut()
            inside = list(images_below(path, left_out))
            message = left_out.message(path)
            if not inside:
                raise ArgumentError(
                    "paths", f"must hold images, got the folder {path}" + (f" ({message})" if message else "")
                )
            if message:
                warnings.warn(message, stacklevel=3)
            found += inside
        elif path.exists():
            found.append(str(path))
        else:
            raise ArgumentError("paths", f"must be files or folders that exist, got {path}")
    if not found:
        raise ArgumentError("paths", "must name at least one image file or folder, got none")
    return found


def check_files(
    paths: Sequence[str],
    size: tuple[int, int],
    preprocessing: Preprocessing,
    on_bad: str = "error",
    max_decoded_bytes: int = MAX_DECODED_BYTES,
) -> list[str]:
    """Return those of `paths` that can be read and resized to `size`; raise or warn about the others.

    A warning names grey images of more than 8 bits with values that do not fit the range they are read with, and colour
    images with more than 8 bits per channel, of which the upper 8 are read.

    Raises:
        ValueError: a file cannot be read and `on_bad` is "error", or no file can be read.
    """
    found = dict(zip(paths, check_images(paths, max_decoded_bytes), strict=True))
    bad = {path: damage(checked, size, preprocessing.resize) for path, checked in found.items()}
    report_bad([(path, reason) for path, reason in bad.items() if reason is not None], on_bad)
    whole = [path for path in paths if bad[path] is None]
    if not whole:
        raise ArgumentError("paths", f"must name at least one readable image, got {len(bad)} unreadable files")
    warn_of_cut_bits({path: found[path] for path in whole}, stacklevel=3)
    if preprocessing.intensity_range is None:
        _warn_of_other_ranges({path: found[path] for path in whole})
    return whole


def read_checked(
    paths: Sequence[str],
    size: tuple[int, int],
    preprocessing: Preprocessing,
    on_bad: str = "error",
    max_decoded_bytes: int = MAX_DECODED_BYTES,
) -> tuple[torch.Tensor, list[str]]:
    """Read files that passed `check_files` -> (uint8 (N, 3, *size), their names).

    A file that has been damaged or removed since is an error or is skipped, as in `check_files`.
    """
    tensors, names, bad = [], [], []
    for path in paths:
        try:
            image = open_image(
                path,
                intensity_range=preprocessing.intensity_range,
                max_decoded_bytes=max_decoded_bytes,
                strict=False,
            )
            tensors.append(to_tensor(image, size, preprocessing.resize))
            names.append(path)
        except ValueError as error:
            bad.append((path, str(error.__cause__ or error)))
    report_bad(bad, on_bad)
    return torch.stack(tensors) if tensors else torch.empty(0, 3, *size, dtype=torch.uint8), names


def _warn_of_other_ranges(images: Mapping[str, Checked]) -> None:
    """Warn about grey images of more than 8 bits with values that the mode's range would clip or squeeze."""
    strange = []
    for path, image in images.items():
        if image.kind is None:
            continue
        low, high = FULL_RANGE[image.kind]
        if image.low < low or image.high > high or image.high - image.low < (high - low) / 4:
            strange.append(f"{path} ({image.low:g} to {image.high:g}, read as {low:g} to {high:g})")
    if strange:
        warnings.warn(
            f"{len(strange)} grey image(s) of more than 8 bits have values that do not fill the usual range: "
            f"{'; '.join(strange[:3])}{'; ...' if len(strange) > 3 else ''}. intensity_range=(low, high) "
            "(--intensity-range) sets the values that become black and white",
            stacklevel=4,
        )


def read_images(
    paths: Paths,
    image_size: int | Sequence[int],
    *,
    resize: str = "crop",
    on_bad: str = "error",
    intensity_range: tuple[float, float] | None = None,
    max_decoded_bytes: int | None = None,
) -> tuple[torch.Tensor, list[str]]:
    """Read image files and folders for prediction -> (uint8 (N, 3, S, S), the N file names).

    The EXIF orientation is applied. For more images than fit in memory, call `list_images` and pass this function one
    slice at a time.

    Args:
        resize: "crop" (short side, centre crop) or "squash".
        on_bad: "error" raises a ValueError naming the files that cannot be read, "skip" leaves them out with a
            warning.
        intensity_range: the values of grey images with more than 8 bits that become black and white; pass
            `DataSplits.intensity_range` of the training data. None uses 0 and 65535 for integers, 0 and 1 for floats.
        max_decoded_bytes: maximum size of one decoded image in bytes; None is `MAX_DECODED_BYTES`.

    Raises:
        ValueError, TypeError: an argument is wrong, or a file cannot be read.
    """
    size, preprocessing = sides(image_size), Preprocessing(resize, intensity_range)
    check_choice("on_bad", on_bad, ("error", "skip"))
    limit = decoded_limit(max_decoded_bytes)
    whole = check_files(list_images(paths), size, preprocessing, on_bad, limit)
    images, names = read_checked(whole, size, preprocessing, on_bad, limit)
    if not names:
        raise ArgumentError("paths", "must stay readable, got files that can no longer be read")
    return images, names
