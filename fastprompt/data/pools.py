"""Labelled images before they are split: a pool of them, and a source of pools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image


@dataclass(frozen=True)
class Pool:
    """Labelled images that belong together.

    Attributes:
        labels: the class of each image.
        keys: a name of each image, for the split's checksum.
        read: decodes image i: PIL, or uint8 (1 or 3, H, W).
        files: the path of each image, where each is a file.
    """

    labels: Sequence[int]
    keys: Sequence[str]
    read: Callable[[int], Image.Image | torch.Tensor]
    files: Sequence[str] | None = None


@dataclass(frozen=True)
class Source:
    """A data set before it is split here: the publisher's train images and, where there are some, val and test.

    Attributes:
        intensity_range: the values of grey images of more than 8 bits that become black and white, None where there
            is no such image.
        left_out: how many files and folders were not read, by reason.
    """

    name: str
    class_names: list[str]
    train: Pool
    val: Pool | None = None
    test: Pool | None = None
    intensity_range: tuple[float, float] | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
