"""Image files with several labels, or values, each: a table in a CSV file."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastprompt.adapters import Preprocessing
from fastprompt.arguments import ArgumentError, ArgumentPathError
from fastprompt.data.files import check_files, read_checked
from fastprompt.data.images import MAX_DECODED_BYTES, sides

FILE_COLUMN = "file"


class LabelTable(Dataset[tuple[Tensor, Tensor]]):
    """The images of a CSV file, each with a row of numbers: zeros and ones for labels, or values to predict.

    The header is `file` and the names of the labels; a path is relative to the folder of the CSV file. All images are
    decoded once, strictly, before the first is used.

    Args:
        path: of the CSV file.
        image_size: side in pixels, or (height, width).
        names: labels to read, in this order; None: all columns.
        preprocessing: how images are resized, as in `fastprompt.load_data`; None: cropped to a square.
        max_decoded_bytes: maximum size of one decoded image.

    Attributes:
        class_names: of the labels. labels: (N, C) float32. files: paths of the images.
        preprocessing: as given.
        augment: "none": an image is the same in every epoch.

    Raises:
        ValueError: the file is no such table, a name has no column, a cell is not a finite number, or an image cannot
            be read; the message names line or file.
        FileNotFoundError: there is no such file.
    """

    augment = "none"

    def __init__(
        self,
        path: str | os.PathLike[str],
        image_size: int | Sequence[int],
        names: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        max_decoded_bytes: int = MAX_DECODED_BYTES,
    ) -> None:
        path, self.size = Path(path), sides(image_size)
        if not path.is_file():
            raise ArgumentPathError("path", f"must be a CSV file that exists, got {path}")
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                header, *rows = [row for row in csv.reader(file) if row] or [[]]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ArgumentError("path", f"must be a CSV file in UTF-8, got {path} ({error})") from None
        if header[:1] != [FILE_COLUMN] or len(header) < 2 or len({*header}) < len(header):
            raise ArgumentError(
                "path", f"must have a header of {FILE_COLUMN!r} and different names of labels, got {path} with {header}"
            )
        self.class_names = header[1:] if names is None else list(names)
        if missing := [name for name in self.class_names if name not in header[1:]]:
            raise ArgumentError("path", f"must have a column for {missing[0]!r}, got {path} with {', '.join(header)}")
        if not rows:
            raise ArgumentError("path", f"must have at least one image, got {path} with a header alone")
        columns = [header.index(name) for name in self.class_names]
        self.labels = torch.tensor([_numbers(row, header, columns, path, line) for line, row in enumerate(rows, 2)])
        self.files = [str(path.parent / row[0]) for row in rows]
        self.preprocessing = preprocessing or Preprocessing()
        self.max_decoded_bytes = max_decoded_bytes
        check_files(self.files, self.size, self.preprocessing, "error", max_decoded_bytes)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image (3, H, W) uint8 and its row (C,)."""
        images, _ = read_checked([self.files[index]], self.size, self.preprocessing, "error", self.max_decoded_bytes)
        return images[0], self.labels[index]


def _numbers(row: Sequence[str], header: Sequence[str], columns: Sequence[int], path: Path, line: int) -> list[float]:
    if len(row) != len(header):
        raise ArgumentError(
            "path", f"must have {len(header)} cells in each line, got {len(row)} in line {line} of {path}"
        )
    found = []
    for column in columns:
        try:
            found.append(float(row[column]))
        except ValueError:
            found.append(math.nan)
        if not math.isfinite(found[-1]):
            raise ArgumentError(
                "path", f"must have finite numbers, got {row[column]!r} for {header[column]!r} in line {line} of {path}"
            )
    return found
