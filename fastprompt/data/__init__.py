"""Labelled images to train on, and image files to predict."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial

from fastprompt.adapters import Preprocessing
from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.data.augment import Augment, make_augment
from fastprompt.data.domains import DomainSet, load_domains
from fastprompt.data.files import list_images, read_images
from fastprompt.data.folders import Reading
from fastprompt.data.images import check_choice, decoded_limit, sides
from fastprompt.data.labelled import LabelTable
from fastprompt.data.sources import find_source, known_names
from fastprompt.data.splits import DataSplits, ImageSet, split

__all__ = [
    "DataSplits",
    "DomainSet",
    "ImageSet",
    "LabelTable",
    "known_names",
    "list_images",
    "load_data",
    "read_images",
]


def load_data(
    name: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]],
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
    labels: str | None = None,
    sampling: str | None = None,
) -> DataSplits:
    """Load a data set, split into train, val and test, with images as uint8 (3, image_size, image_size).

    Splits are stratified and fixed. The test split is the publisher's, or a fifth of all images if there is none. It
    does not depend on `seed`, which picks the train and val images. Every class keeps one image for training before
    any is held out.

    In an image folder, the usual names of splits are recognised in any case (train, training, val, valid, dev, test,
    eval, seg_train, train_images, ...). A folder that looks like a split but cannot be one is an error. All Pillow
    formats are read except those that start a program; a file with several images contributes the first. Hidden and
    system files and folders are left out and links are followed. Every file is used once: one that is in two classes
    or splits is an error. A warning names what was left out, and `summary()["left_out"]` counts it.

    Every file is decoded once, strictly, before anything is drawn, so that training does not run into a broken file.
    This check takes about as long as reading the images once (`bench/data_table.py` measures it). Its result is cached
    for folders of 500 files or more, until a file changes.

    A list of names loads several data sets as domains of one, each split as if alone: see `fastprompt.data.domains`.
    `data.train`, `data.val` and `data.test` hold the images of all, `data.val.of("birds")` those of one, with the same
    labels. A model that is trained on them remembers its domains.

    Args:
        name: the path of an image folder (root/train, root/val, root/test with one folder per class each; or
            root/<class>, split here), "fashion-mnist", "mnist5k", or a torchvision set ("cifar10", "flowers102", ...:
            see `known_names`, or "torchvision:<ClassName>"). If a folder and a set share a name, "./cifar10" is the
            folder and "builtin:cifar10" the set. "wds:FOLDER" reads WebDataset shards where they lie, and "wds:" with
            http addresses, "https://host/train-{00..31}.tar::https://host/val-00.tar", those on servers. "hfds:NAME" is
            a data set of Hugging Face's `datasets` or a folder of its `save_to_disk`, and "hfids:OWNER/NAME" one of the
            Hub that is read from there instead of downloaded (extra `datasets`). The images of all these are checked
            when they are read. Or a list of names, or a mapping of domain names to them.
        num_train, num_val, num_test: number of images; by default all. If the publisher has no val split, num_val
            defaults to a quarter of `num_train`, or to a fifth of the train images.
        root: folder of torchvision's files; None uses the cache.
        augment: augmentation of the train images: "none", "flip", "crop", "pgn", one of timm's such as
            "rand-m9-mstd0.5", several joined by "+", or a callable on uint8 (3, H, W)
            (`fastprompt.data.augment.make_augment`). Its randomness depends on (seed, epoch, index) only, see
            `ImageSet.set_epoch`.
        resize: "crop" (short side, centre crop) or "squash".
        on_bad: what to do about image files in a folder that cannot be read or resized: "error" raises an error that
            names them, "skip" leaves them out with a warning that names them.
        intensity_range: (low, high), the values of grey images with more than 8 bits that become black and white.
            None picks the narrowest usual range (8, 10, 12, 14 or 16 bits; for floats 0 to 1, -1 to 1, 0 to 255,
            0 to 65535) that holds all values of the train images and of which they fill at least a quarter, else
            their minimum and maximum. A warning names the range unless it is that of 16 bits. The same range applies
            to all images. It is available as `DataSplits.intensity_range`; pass it to `read_images`. Of
            colour images with more than 8 bits per channel the upper 8 are read, with a warning.
        max_decoded_bytes: maximum size in bytes of one decoded image of a folder (width x height x 4, and as much
            again if it is not RGB); None is 2²⁹, 134 megapixels of RGB.
        labels: with several sets, "union" (also None): one label space, in which classes of one name are one class; or
            "per-domain": a head for each domain over its own classes.
        sampling: with several sets, "proportional" (also None): an epoch has every training image once; or "balanced":
            an epoch is as long, but has equally many images of each domain.

    Raises:
        ValueError, TypeError: a wrong argument or a bad folder. FetchError (a RuntimeError): a set cannot be
            downloaded or a server not be reached, or the cache holds something else.
    """
    if not isinstance(name, (str, os.PathLike)):
        one = partial(
            load_data,
            image_size=image_size,
            num_train=num_train,
            num_val=num_val,
            num_test=num_test,
            seed=seed,
            root=root,
            augment=augment,
            resize=resize,
            on_bad=on_bad,
            intensity_range=intensity_range,
            max_decoded_bytes=max_decoded_bytes,
        )
        return load_domains(name, one, labels or "union", sampling or "proportional", seed)
    for argument, choice in (("labels", labels), ("sampling", sampling)):
        if choice is not None:
            raise ArgumentError(argument, f"must be None for a single data set, got {choice!r}")
    size = sides(image_size)
    for argument, value in (("num_train", num_train), ("num_val", num_val), ("num_test", num_test)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ArgumentTypeError(argument, f"must be an integer or None, got {value!r}")
        if value is not None and value <= 0:
            raise ArgumentError(argument, f"must be a positive number of images, got {value}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ArgumentTypeError("seed", f"must be an integer, got {seed!r}")
    augmentation = make_augment(augment, size)
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
        augment=augmentation,
        augment_name=augment if isinstance(augment, str) else repr(augment),
    )
