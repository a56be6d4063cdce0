"""The train/val/test split of a labelled image source, fixed by a seed, and the datasets that serve it."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from fastprompt.adapters import Preprocessing
from fastprompt.arguments import ArgumentError
from fastprompt.data.augment import Augment, apply_seeded, widest_part
from fastprompt.data.images import to_tensor
from fastprompt.data.pools import Pool, Source

KEEP_BYTES = 1 << 30  # maximum size of a split's resized images that are kept in memory


class ImageSet(Dataset[tuple[torch.Tensor, int]]):
    """Images `indices` of a pool as (uint8 (3, H, W), label), decoded and resized on first use.

    Resized images are kept in memory if they take up to KEEP_BYTES (each DataLoader worker keeps its own copy).
    `labels` holds the labels in order, without decoding anything. With an augmentation, image i of epoch e is the same
    in every run. Call `set_epoch(e)` before each epoch; workers that persist over epochs do not see it. With `widest`,
    the images are squashed from their `widest_part`; `resize` then only
    describes the images that the model will see.
    """

    def __init__(
        self,
        pool: Pool,
        indices: Sequence[int],
        size: tuple[int, int],
        resize: str,
        augment: Augment | None = None,
        seed: int = 0,
        class_names: Sequence[str] | None = None,
        intensity_range: tuple[float, float] | None = None,
        widest: bool = False,
    ) -> None:
        self.class_names = class_names
        self.widest = widest
        self.intensity_range = intensity_range
        self.pool = pool
        self.indices = list(indices)
        self.size = size
        self.resize = resize
        self.augment = augment
        self.seed = seed
        self.epoch = 0
        self.labels = [pool.labels[i] for i in self.indices]
        self._kept: torch.Tensor | None = None
        self._has: list[bool] = []
        if self.decoded_bytes <= KEEP_BYTES:
            self._kept = torch.empty(len(self.indices), 3, *size, dtype=torch.uint8)
            self._has = [False] * len(self.indices)

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing that turns image files into these pixels."""
        return Preprocessing(self.resize, self.intensity_range)

    def identity(self) -> dict[str, Any]:
        """Return what identifies these images to a training run, as JSON values.

        "files" is a sha256 over names, sizes and modification times of the files. For sets without one file per image,
        which are checked when they are opened, it is a sha256 over the images' names.
        """
        digest = hashlib.sha256()
        for i in self.indices:
            line = self.pool.keys[i]
            if self.pool.files is not None:
                status = os.stat(self.pool.files[i])
                line += f"\t{status.st_size}\t{status.st_mtime_ns}"
            digest.update(f"{line}\n".encode("utf-8", "surrogateescape"))
        augment = self.augment
        named = isinstance(augment, torch.nn.Module) or augment is None
        return {
            "resize": self.resize,
            "augment": repr(augment) if named else getattr(augment, "__qualname__", type(augment).__qualname__),
            "augment_seed": None if augment is None else self.seed,
            "files": digest.hexdigest(),
        }

    @property
    def together(self) -> list[int] | None:
        """For each image, the number of what is fetched at once with others, as in `Pool`; None: nothing is."""
        return None if self.pool.together is None else [self.pool.together[i] for i in self.indices]

    @property
    def decoded_bytes(self) -> int:
        """Bytes of all resized images."""
        return len(self.indices) * 3 * self.size[0] * self.size[1]

    @property
    def kept_bytes(self) -> int:
        """Bytes of the resized images that are kept in memory once they have been read; 0 if they are not."""
        return 0 if self._kept is None else self._kept.nbytes

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that seeds the augmentations. Call it before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.indices)

    def file_of(self, index: int) -> str | None:
        """Return the path of an image's file; None if it is not a file of its own."""
        return None if self.pool.files is None else str(self.pool.files[self.indices[index]])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        index %= len(self)
        image = self._image(index)
        if self.augment is not None:
            image = apply_seeded(self.augment, image, self.seed, self.epoch, index)
        return image, self.labels[index]

    def _image(self, index: int) -> torch.Tensor:
        if self._kept is None:
            return self._read(index)
        if not self._has[index]:
            self._kept[index] = self._read(index)
            self._has[index] = True
        return self._kept[index].clone()

    def _read(self, index: int) -> torch.Tensor:
        image = self.pool.read(self.indices[index])
        if self.widest:
            return to_tensor(widest_part(image), self.size, "squash")
        return to_tensor(image, self.size, self.resize)


class DataSplits:
    """`.train`, `.val` and `.test` of a data set, each yielding (uint8 (3, H, W), int).

    `.test` can be read only once, at the end, after every choice was made on `.val`. To evaluate several models, keep
    the dataset that it returns. `.class_names` has one name per label; `.name` is the source. `.locked` says why
    `.test` cannot be read at all, or is None.
    """

    def __init__(
        self,
        name: str,
        class_names: list[str],
        train: ImageSet,
        val: ImageSet,
        test: ImageSet,
        facts: dict[str, Any],
        locked: str | None = None,
    ) -> None:
        self.locked = locked
        self.name = name
        self.class_names = class_names
        self.train = train
        self.val = val
        self._test = test
        self._facts = facts
        self.test_reads = 0

    @property
    def test(self) -> ImageSet:
        """The test split; reading it a second time, or while it is locked, raises RuntimeError."""
        if self.locked is not None:
            raise RuntimeError(f"the test split of {self.name} is locked: {self.locked}")
        if self.test_reads:
            raise RuntimeError(
                f"the test split of {self.name} was read already. Read it once, at the end, after every choice has "
                "been made on the validation split; to evaluate several models, keep the dataset of the first read "
                "(test = splits.test)"
            )
        self.test_reads += 1
        return self._test

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def intensity_range(self) -> tuple[float, float] | None:
        """The black and white level of grey images with more than 8 bits; None if there are none."""
        bounds = self._facts["intensity_range"]
        return None if bounds is None else (bounds[0], bounds[1])

    def summary(self) -> dict[str, Any]:
        """Return name, sizes, seed, how images are read, what was left out, and a sha256 of the split assignment."""
        return dict(self._facts)

    def __repr__(self) -> str:
        sizes = f"{len(self.train)} train, {len(self.val)} val, {len(self._test)} test"
        return f"DataSplits({self.name!r}: {sizes}, {self.num_classes} classes)"


def split(
    source: Source,
    *,
    size: tuple[int, int],
    num_train: int | None,
    num_val: int | None,
    num_test: int | None,
    seed: int,
    resize: str,
    augment: Augment | None,
    augment_name: str,
    stated: Mapping[str, Any] | None = None,
    locked: str | None = None,
) -> DataSplits:
    """Draw the three splits, stratified by class.

    The test images do not depend on `seed`, so that runs with different seeds are measured on the same images. They
    are the publisher's test split (`num_test` of it), else a fifth of all images. Validation images are then drawn
    with `seed` from the publisher's val split, else from the train images: `num_val` of them, or by default a quarter
    of `num_train` (800 and 200 in VTAB-1k), or a fifth of the images. Train images are drawn from the rest.

    Training takes precedence: by default, drawing from the train images leaves at least one image of every class to
    train on. If `num_test` or `num_val` ask for more than that allows, a warning names the classes without a training
    image.

    `stated` are further facts for `DataSplits.summary`, `locked` is as in `DataSplits`.

    Raises:
        ValueError: there are too few images for the requested numbers, or none are left for one of the splits.
    """
    everything = range(len(source.train.labels))
    test_pool, test, left = _held_out(source, source.test, everything, num_test, len(everything) // 5, 0, "test")
    fifth_or_quarter = len(left) // 5 if num_train is None else min(num_train // 4, len(left) - num_train)
    val_pool, val, left = _held_out(source, source.val, left, num_val, fifth_or_quarter, seed, "val")
    train = draw(source.train.labels, left, num_train, seed, "train", "num_train")
    for pool, indices in ((val_pool, val), (test_pool, test)):
        if pool.together is not None:
            indices.sort()  # they are read in this order
    for part, indices in (("train", train), ("val", val), ("test", test)):
        if not indices:
            raise ArgumentError(
                "name",
                f"leaves no image for the {part} split: {source.name} has {len(everything)} images of "
                f"{len(source.class_names)} classes to split, and every class keeps one for training: add images"
                + ("" if part == "train" else f", or give num_{part}, which may take a class's only image"),
            )
    seen = {source.train.labels[i] for i in train}
    unseen = [name for label, name in enumerate(source.class_names) if label not in seen]
    if unseen:
        warnings.warn(
            f"{len(unseen)} of {len(source.class_names)} classes of {source.name} have no training image, so they "
            f"cannot be learned: {', '.join(unseen[:10])}",
            stacklevel=3,
        )
    facts = {
        "name": source.name,
        "num_classes": len(source.class_names),
        "train": len(train),
        "val": len(val),
        "test": len(test),
        "image_size": list(size),
        "resize": resize,
        "augment": augment_name,
        "seed": seed,
        "intensity_range": None if source.intensity_range is None else list(source.intensity_range),
        "left_out": dict(source.left_out),
        "sha256": _checksum(source.train, train, val_pool, val, test_pool, test),
        **(stated or {}),
    }
    names, bounds = source.class_names, source.intensity_range
    return DataSplits(
        source.name,
        source.class_names,
        ImageSet(
            source.train, train, size, resize, augment, seed, names, bounds, widest="pgn" in augment_name.split("+")
        ),
        ImageSet(val_pool, val, size, resize, class_names=names, intensity_range=bounds),
        ImageSet(test_pool, test, size, resize, class_names=names, intensity_range=bounds),
        facts,
        locked,
    )


def _held_out(
    source: Source,
    published: Pool | None,
    left: Sequence[int],
    number: int | None,
    default: int,
    seed: int,
    part: str,
) -> tuple[Pool, list[int], Sequence[int]]:
    """Return the pool and indices of a held-out part, and the train images that remain for the other parts.

    The part is drawn from the publisher's split if there is one, else taken out of `left`.
    """
    if published is not None:
        return published, draw(published.labels, range(len(published.labels)), number, seed, part, f"num_{part}"), left
    if number is None:
        number = min(max(1, default), len(left) - len({source.train.labels[i] for i in left}))
    taken = draw(source.train.labels, left, number, seed, part, f"num_{part}", leave_one=True)
    return source.train, taken, sorted(set(left) - set(taken))


def draw(
    labels: Sequence[int],
    indices: Sequence[int],
    number: int | None,
    seed: int,
    part: str,
    argument: str,
    leave_one: bool = False,
) -> list[int]:
    """Draw `number` of `indices`, shuffled and in proportion to the classes, with each class at least once if possible.

    With `leave_one`, one index of every class stays undrawn unless `number` needs it. The order is that of
    sha256(seed, part, index), the same on every machine and version. None draws all.
    """
    if number is not None and number > len(indices):
        raise ArgumentError(argument, f"must be at most {len(indices)}, the number of images available, got {number}")
    shuffled = _shuffled(indices, seed, part)
    if number is None or number == len(indices):
        return shuffled
    by_class: dict[int, list[int]] = {}
    for i in shuffled:
        by_class.setdefault(labels[i], []).append(i)
    kept = 1 if leave_one and number <= len(indices) - len(by_class) else 0
    most = {label: len(members) - kept for label, members in by_class.items()}
    least = {label: min(most[label], 1 if number >= len(by_class) else 0) for label in by_class}
    shares = {label: number * len(members) / len(indices) for label, members in by_class.items()}
    counts = {label: min(most[label], max(least[label], int(share))) for label, share in shares.items()}
    # Distribute what whole shares leave over (largest remainder first), or take back what `least` gave too many.
    while sum(counts.values()) != number:
        if sum(counts.values()) < number:
            open_classes = [label for label in counts if counts[label] < most[label]]
            counts[max(open_classes, key=lambda label: (shares[label] - counts[label], -label))] += 1
        else:
            open_classes = [label for label in counts if counts[label] > least[label]]
            counts[max(open_classes, key=lambda label: (counts[label] - shares[label], -label))] -= 1
    taken = {i for label, members in by_class.items() for i in members[: counts[label]]}
    return [i for i in shuffled if i in taken]


def _shuffled(indices: Sequence[int], seed: int, part: str) -> list[int]:
    """Return the indices in the order of sha256(seed, part, index)."""
    return sorted(indices, key=lambda i: hashlib.sha256(f"{seed} {part} {i}".encode()).digest())


def draw_per_class(labels: Sequence[int], number: int, seed: int, part: str) -> list[int]:
    """Draw up to `number` indices of each class, in the order of `draw`; more include those of a smaller number."""
    left: dict[int, int] = {}
    taken = []
    for i in _shuffled(range(len(labels)), seed, part):
        if left.setdefault(labels[i], number) > 0:
            left[labels[i]] -= 1
            taken.append(i)
    return taken


def _checksum(
    train_pool: Pool, train: list[int], val_pool: Pool, val: list[int], test_pool: Pool, test: list[int]
) -> str:
    digest = hashlib.sha256()
    for part, pool, indices in (
        ("train", train_pool, train),
        ("val", val_pool, val),
        ("test", test_pool, test),
    ):
        for i in indices:
            digest.update(f"{part}\t{pool.keys[i]}\t{pool.labels[i]}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
