"""Labelled images before they are split: a pool of images, and a source with one pool per published split."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

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
        together: for each image, the number of what has to be fetched to read it, and is fetched for all images with
            that number at once; None: each is read alone.
    """

    labels: Sequence[int]
    keys: Sequence[str]
    read: Callable[[int], Image.Image | torch.Tensor]
    files: Sequence[str] | None = None
    together: Sequence[int] | None = None


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


@dataclass(frozen=True)
class _Chosen:
    """Reads image `indices[i]` of a pool."""

    pool: Pool
    indices: Sequence[int]

    def __call__(self, i: int) -> Image.Image | torch.Tensor:
        return self.pool.read(self.indices[i])


@dataclass(frozen=True)
class _Joined:
    """Reads image i of pools that follow each other; `ends` are their cumulative sizes."""

    pools: Sequence[Pool]
    ends: Sequence[int]

    def __call__(self, i: int) -> Image.Image | torch.Tensor:
        which = bisect.bisect_right(self.ends, i)
        return self.pools[which].read(i - (self.ends[which - 1] if which else 0))


def chosen(pool: Pool, indices: Sequence[int]) -> Pool:
    """Return the pool of the images `indices`, in their order."""
    files = None if pool.files is None else [pool.files[i] for i in indices]
    together = None if pool.together is None else [pool.together[i] for i in indices]
    keys = [pool.keys[i] for i in indices]
    return Pool([pool.labels[i] for i in indices], keys, _Chosen(pool, indices), files, together)


def joined(pools: Sequence[Pool]) -> Pool:
    """Return one pool of the images of several, one pool after the other."""
    parts = [pool.files for pool in pools]
    return Pool(
        [label for pool in pools for label in pool.labels],
        [key for pool in pools for key in pool.keys],
        _Joined(list(pools), list(accumulate(len(pool.labels) for pool in pools))),
        None if None in parts else [file for files in parts if files is not None for file in files],
    )
