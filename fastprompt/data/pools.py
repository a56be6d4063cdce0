"""Labelled images before they are split: a pool of images, and a source with one pool per published split."""

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
        keys: a name for each image, used in the split's checksum.
        read: decodes image i to a PIL image or uint8 (1 or 3, H, W).
        files: the path of each image, or None if the images are not files of their own.
    """

    labels: Sequence[int]
    keys: Sequence[str]
    read: Callable[[int], Image.Image | torch.Tensor]
    files: Sequence[str] | None = None


@dataclass(frozen=True)
class Source:
    """A data set before it is split here: the publisher's train images, and its val and test images if it has them.

    Attributes:
        intensity_range: the values of grey images with more than 8 bits that become black and white; None if there
            is no such image.
        left_out: number of files and folders that were not read, by reason.
    """

    name: str
    class_names: list[str]
    train: Pool
    val: Pool | None = None
    test: Pool | None = None
    intensity_range: tuple[float, float] | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
