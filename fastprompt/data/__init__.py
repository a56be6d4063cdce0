"""Labelled images to train on, and image files to predict."""

from __future__ import annotations

import os
from collections.abc import Sequence

from fastprompt.adapters import Preprocessing
from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.data.augment import AUGMENTS, Augment, make_augment
from fastprompt.data.files import list_images, read_images
from fastprompt.data.folders import Reading
from fastprompt.data.images import check_choice, decoded_limit, sides
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
    intensity_range: tuple[float, float] | None = None,
    max_decoded_bytes: int | None = None,
) -> DataSplits:
    """A data set split into train, val and test, images as uint8 (3, image_size, image_size).

    Splits are stratified and fixed. The publisher's test split is kept; without one a fifth of all images is. The
    test images are the same for every `seed`, which picks the train and val images. One image of every class is
    trained on before any is held out.

    In an image folder the usual names of splits are recognised in any case (train, training, val, valid, dev, test,
    eval, seg_train, train_images, ...); what looks like a split and is none is an error. Every format of Pillow's that
    starts no program is read, of several images in a file the first. Hidden and system files and folders are left
    out, links are followed, and every file is taken once: one that is in two classes or splits is an error. What is
    left out is named in a warning and counted in `summary()["left_out"]`.

    Every file is decoded once, strictly, before anything is drawn, so that training does not meet a broken one. That
    takes about as long as reading the images once (`bench/data_table.py` measures it), and is remembered for folders
    of 500 files or more, until a file changes.

    Args:
        name: the path of an image folder (root/train, root/val, root/test with one folder per class each; or
            root/<class>, split here), "fashion-mnist", "mnist5k", a torchvision set ("cifar10", "flowers102", ...: see
            `known_names`, or "torchvision:<ClassName>"). Where a folder has the name of a set, "./cifar10" is the
            folder and "builtin:cifar10" the set.
        num_train, num_val, num_test: take that many images; by default all, and for val (where the publisher has
            none) a quarter of `num_train`, or a fifth of the train images.
        root: where torchvision's files are or go; None: the cache.
        augment: of train only: "none", "flip", "crop", "pgn" or a callable on uint8 (3, H, W); its randomness
            depends on (seed, epoch, index) only, see `ImageSet.set_epoch`.
        resize: "crop" (short side, centre crop) or "squash".
        on_bad: what to do about image files in a folder that cannot be read or brought to size: "error" names them,
            "skip" leaves them out with a warning that does.
        intensity_range: (low, high), the values of grey images of more than 8 bits that become black and white. None:
            the narrowest usual range that holds all values of the train images (8, 10, 12, 14 or 16 bits; for floats
            0 to 1, -1 to 1, 0 to 255, 0 to 65535) and of which they fill a quarter, else their least and largest
            value; a warning names it unless it is that of 16 bits. It is `DataSplits.intensity_range`, the same for
            all images, and `read_images` takes it. Colour images of 16 bits a channel are read as their upper 8, with
            a warning.
        max_decoded_bytes: memory in bytes that one image of a folder may take decoded (width x height x 4, and as
            much again where it is not RGB); None: 2²⁹, 134 megapixels of RGB.

    Raises:
        ValueError, TypeError: a wrong argument or a bad folder. FetchError (a RuntimeError): a set cannot be
            downloaded, or the cache holds something else.
    """
    size = sides(image_size)
    for argument, value in (("num_train", num_train), ("num_val", num_val), ("num_test", num_test)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ArgumentTypeError(argument, f"must be an integer or None, got {value!r}")
        if value is not None and value <= 0:
            raise ArgumentError(argument, f"must be a positive number of images, got {value}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ArgumentTypeError("seed", f"must be an integer, got {seed!r}")
    if not callable(augment):
        check_choice("augment", augment, AUGMENTS)
    check_choice("on_bad", on_bad, ("error", "skip"))
    reading = Reading(size, Preprocessing(resize, intensity_range), on_bad, decoded_limit(max_decoded_bytes))
    return split(
        find_source(name, root, reading),
        size=size,
        num_train=num_train,
        num_val=num_val,
        num_test=num_test,
        seed=seed,
        resize=resize,
        augment=make_augment(augment, size),
        augment_name=augment if isinstance(augment, str) else repr(augment),
    )
