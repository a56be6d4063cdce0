"""Labelled images to train on, and image files to predict."""

from __future__ import annotations

import os
from collections.abc import Sequence

from fastprompt.data.augment import AUGMENTS, Augment, make_augment
from fastprompt.data.images import RESIZES, check_choice, list_images, read_images, sides
from fastprompt.data.sources import find_source, known_names
from fastprompt.data.splits import DataSplits, ImageSet, split

__all__ = ["DataSplits", "ImageSet", "known_names", "list_images", "load_data", "read_images"]


def load_data(
    name: str | os.PathLike[str],
    *,
    image_size: int | Sequence[int],
    num_train: int | None = None,
    num_val: int | None = None,
    num_test: int | None = None,
    seed: int = 0,
    root: str | os.PathLike[str] | None = None,
    augment: str | Augment = "none",
    resize: str = "crop",
    on_bad: str = "error",
) -> DataSplits:
    """A data set split into train, val and test, images as uint8 (3, image_size, image_size).

    ``name``: the path of an image folder (root/train, root/val or root/valid, root/test with one folder per
    class each; or root/<class>, split by us), "fashion-mnist", "mnist5k", a torchvision set ("cifar10",
    "flowers102", ...: see known_names(), or "torchvision:<ClassName>"). ``root``: where torchvision's files
    are or go (default: the cache).

    Splits are stratified and fixed. The publisher's test split is kept; without one a fifth of all images is.
    The test images are the same for every ``seed``, which picks the train and val images. ``num_*`` take that
    many images; by default all, and for val (where the publisher has none) a quarter of ``num_train``, or a
    fifth of the train images.

    ``augment`` (train only): "none", "flip", "crop", "pgn" or a callable on uint8 (3, H, W); its randomness
    depends on (seed, epoch, index) only, see ImageSet.set_epoch. ``resize``: "crop" (short side, centre crop)
    or "squash".
    ``on_bad``: what to do with a broken image file in a folder, "error" (names it) or "skip" (warns with the
    list).

    Raises ValueError or TypeError for a wrong argument or a bad folder, FetchError (a RuntimeError) when a
    set cannot be downloaded.
    """
    size = sides(image_size)
    for argument, value in (("num_train", num_train), ("num_val", num_val), ("num_test", num_test)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{argument}: expected an int or None, got {value!r}")
        if value is not None and value <= 0:
            raise ValueError(f"{argument}: expected a positive number of images, got {value}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {seed!r}")
    if not callable(augment):
        check_choice("augment", augment, AUGMENTS)
    check_choice("resize", resize, RESIZES)
    check_choice("on_bad", on_bad, ("error", "skip"))
    source = find_source(name, root, on_bad)
    return split(
        source,
        size=size,
        num_train=num_train,
        num_val=num_val,
        num_test=num_test,
        seed=seed,
        resize=resize,
        augment=make_augment(augment, size),
        augment_name=augment if isinstance(augment, str) else repr(augment),
    )
