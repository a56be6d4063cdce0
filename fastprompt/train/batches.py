"""Checked batches of labelled images from a Dataset, an (images, labels) pair or a DataLoader."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.train.checkpoint import RandomStates, rng_state, set_rng_state
from fastprompt.train.ranks import Ranks

CHECK_ALL_UP_TO = 20_000
CHECKED_OF_MORE = 2_048
_ROWS_HASHED = 1_024
OPEN_AT_ONCE = 8
"""Sets of images, each fetched at once, among which an epoch's images are shuffled."""


def is_tensor_pair(data: Any) -> bool:
    """Whether `data` is an `(images, labels)` pair of tensors or arrays."""
    return isinstance(data, (tuple, list)) and len(data) == 2 and all(hasattr(part, "ndim") for part in data)


def as_tensor_pair(data: Any) -> tuple[Tensor, Tensor]:
    """Return the pair as tensors, without copying arrays."""
    images, labels = data
    return torch.as_tensor(images), torch.as_tensor(labels)


def num_images(data: Any, name: str) -> int:
    """Return the number of labelled images.

    Raises:
        TypeError: `data` is not a supported kind of data or has no length.
        ValueError: `data` is empty.
    """
    source = data.dataset if isinstance(data, DataLoader) else data
    if is_tensor_pair(source):
        count = len(source[0])
    elif (
        isinstance(source, IterableDataset)
        or not (hasattr(source, "__getitem__") and hasattr(source, "__len__"))
        or isinstance(source, (dict, str, Tensor))
    ):
        raise ArgumentTypeError(
            name,
            f"must be a Dataset with a length that yields (image, label), an (images, labels) pair of "
            f"tensors or a DataLoader over such a Dataset, got {type(source).__name__}",
        )
    else:
        count = len(source)
    if count == 0:
        raise ArgumentError(name, "must not be empty, got no images")
    if isinstance(data, DataLoader) and len(data) == 0:
        raise ValueError(
            f"{name} yields no batch: it has {count} images, fewer than its batch size, and drop_last is set"
        )
    return count


def check_images(images: Tensor, where: str, ndim: int) -> None:
    """Raise an error unless `images` is a uint8 or finite floating-point tensor; the backbone checks its channels."""
    if not isinstance(images, Tensor):
        raise ArgumentTypeError(where, f"must hold a torch.Tensor image, got {type(images).__name__}")
    shape = "(C, H, W)" if ndim == 3 else "(N, C, H, W)"
    if images.ndim != ndim:
        raise ArgumentError(where, f"must have images of shape {shape}, got {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ArgumentTypeError(
            where, f"must have uint8 images (raw pixels) or floating-point ones (normalised), got {images.dtype}"
        )
    if images.is_floating_point() and not torch.isfinite(images).all():
        raise ArgumentError(where, "must have finite pixels, got NaN or infinity")


def check_labels(labels: Tensor, where: str, num_classes: int, kind: str = "class") -> None:
    """Raise an error unless `labels` are what the model's outputs are compared with.

    Args:
        labels: of N images.
        num_classes: number of outputs C of the model.
        kind: "class" for (N,) class indices below C; "labels" for (N, C) zeros and ones; "values" for (N, C) finite
            floating-point numbers, or (N,) if C is 1.
    """
    if kind != "class":
        _check_rows(labels, where, num_classes, kind)
        return
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ArgumentTypeError(
            where, f"must have integer labels of shape (N,), got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        wrong = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise ArgumentError(
            where, f"must have labels from 0 to {num_classes - 1} (num_classes={num_classes}), got {wrong}"
        )


def _check_rows(labels: Tensor, where: str, num_classes: int, kind: str) -> None:
    shapes = [(len(labels), num_classes)] + [(len(labels),)] * (kind == "values" and num_classes == 1)
    got = f"{labels.dtype} of shape {tuple(labels.shape)}"
    if tuple(labels.shape) not in shapes or labels.is_complex():
        said = "(N,) or (N, 1)" if num_classes == 1 and kind == "values" else f"(N, {num_classes})"
        raise ArgumentTypeError(where, f"must have {kind} of shape {said} (num_classes={num_classes}), got {got}")
    if kind == "values" and not labels.is_floating_point():
        raise ArgumentTypeError(where, f"must have floating-point values to predict, got {got}")
    if kind == "labels" and not ((labels == 0) | (labels == 1)).all():
        raise ArgumentError(where, "must have zeros and ones as labels, got other numbers")
    if kind == "values" and not torch.isfinite(labels).all():
        raise ArgumentError(where, "must have finite values to predict, got NaN or infinity")


def indices_to_read(count: int) -> range:
    """Return the indices to read before training: all of up to 20,000 items, else about 2,048 evenly spaced ones."""
    return range(0, count, 1 if count <= CHECK_ALL_UP_TO else count // CHECKED_OF_MORE)


def read_item(data: Any, index: int, seed: int | None = None) -> Any:
    """Return `data[index]` with all random generators seeded, by the index or `seed`, for random transforms."""
    seed = index if seed is None else seed
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    return data[index]


def feed(digest: Any, value: Any) -> bool:
    """Update a hash with a value or the contents of a container; return False if part of it cannot be hashed."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    elif isinstance(value, Image):
        digest.update(f"{value.mode}{value.size}".encode())
        digest.update(value.tobytes())
    elif isinstance(value, (bool, int, float, str, bytes, range, np.generic, type(None))):
        digest.update(f"{type(value).__name__}{value!r}".encode("utf-8", "surrogatepass"))
    elif isinstance(value, (list, tuple)):
        digest.update(f"{type(value).__name__}{len(value)}".encode())
        return all(feed(digest, part) for part in value)
    elif isinstance(value, dict):
        digest.update(f"dict{len(value)}".encode())
        return all(feed(digest, key) and feed(digest, part) for key, part in value.items())
    else:
        return False
    return True


def check_data(data: Any, name: str, num_classes: int, digest: Any = None, kind: str = "class") -> Tensor:
    """Check the data before training on it.

    Tensors are checked in full. All items of a Dataset are read if there are at most 20,000, else about 2,048 evenly
    spaced ones; the others are checked in their batches. A DataLoader with its own collate function is not read here.

    Args:
        data: see `Batches`.
        name: the name of the data in messages.
        num_classes, kind: as in `check_labels`.
        digest: a `hashlib` hash to update with the images that are read. A pair of tensors and a Dataset of the same
            images give the same bytes. Random transforms then draw from fixed seeds (`read_item`).

    Returns:
        The labels that were read, (N,) int64, or as they are if `kind` is not "class".

    Raises:
        TypeError, ValueError: the data are empty, have a wrong shape or dtype, NaN or infinite pixels, images of
            different sizes, or labels that are not classes of the model.
    """
    count = num_images(data, name)
    if isinstance(data, DataLoader):
        if data.collate_fn is not default_collate:
            return torch.empty(0, dtype=torch.int64)
        data = data.dataset
    if is_tensor_pair(data):
        images, labels = as_tensor_pair(data)
        check_images(images, name, 4)
        check_labels(labels, name, num_classes, kind)
        if len(labels) != count:
            raise ArgumentError(name, f"must have one label per image, got {count} images and {len(labels)} labels")
        if digest is not None:
            digest.update(f"{images.dtype}{tuple(images.shape[1:])}".encode())
            for rows in images.split(_ROWS_HASHED):
                digest.update(rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return labels.to("cpu", torch.int64) if kind == "class" else labels.cpu()
    found: list[Any] = []
    first: Tensor | None = None
    for index in indices_to_read(count):
        item = data[index] if digest is None else read_item(data, index)
        where = f"{name}[{index}]"
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise ArgumentTypeError(where, f"must be an (image, label) pair, got {type(item).__name__}")
        image, label = item
        check_images(image, where, 3)
        if first is None:
            first = image
            if digest is not None:
                digest.update(f"{image.dtype}{tuple(image.shape)}".encode())
        if image.shape != first.shape or image.dtype != first.dtype:
            raise ArgumentError(
                where,
                f"must have the shape and dtype of {name}[0], {tuple(first.shape)} {first.dtype}, got "
                f"{tuple(image.shape)} {image.dtype}",
            )
        if digest is not None:
            digest.update(image.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        if kind != "class":
            row = torch.as_tensor(label)
            check_labels(row[None], where, num_classes, kind)
            found.append(row)
            continue
        if isinstance(label, bool) or not (
            isinstance(label, (int, np.integer))
            or (isinstance(label, Tensor) and label.ndim == 0 and not label.is_floating_point())
        ):
            raise ArgumentTypeError(where, f"must have an integer label, got {type(label).__name__} {label!r}")
        if not 0 <= int(label) < num_classes:
            raise ArgumentError(
                where, f"must have a label from 0 to {num_classes - 1} (num_classes={num_classes}), got {int(label)}"
            )
        found.append(int(label))
    return torch.tensor(found) if kind == "class" else torch.stack(found)


def split_indices(indices: Tensor, batch_size: int, merge_single: bool) -> list[list[int]]:
    """Split `indices` into consecutive batches; with `merge_single`, append a last batch of one to the one before."""
    batches = [part.tolist() for part in indices.split(batch_size)]
    if merge_single and len(batches) > 1 and len(batches[-1]) == 1 and batch_size > 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def num_batches(data: Any, batch_size: int, name: str, merge_single: bool) -> int:
    """Return the number of batches in one epoch of `Batches`."""
    if isinstance(data, DataLoader):
        return len(data)
    return len(split_indices(torch.arange(num_images(data, name)), batch_size, merge_single))


class _Seeded(Dataset[Any]):
    """A Dataset in a worker: what its transforms draw depends on the seed and the place in the epoch alone.

    An epoch can thus be taken up in the middle, by any number of workers.
    """

    def __init__(self, data: Any, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, place: tuple[int, int]) -> Any:
        position, index = place
        return read_item(self.data, index, (self.seed * 1_000_003 + position) % 2**63)


class Batches:
    """(images, labels) batches of one data source, on the model's device.

    Args:
        data: a map-style Dataset yielding (image (C, H, W), label), an (images (N, C, H, W), labels (N,))
            pair of tensors, or a DataLoader (used with its own batch size, order and workers).
        batch_size: images per batch; ignored for a DataLoader.
        name: the name of the data in messages.
        num_classes, kind: labels of every batch are checked against them (`check_labels`).
        device: device of the batches.
        seed: None keeps the order; otherwise epoch e is shuffled by a generator seeded with (seed, e), so that any
            epoch can be repeated alone. A DataLoader's own generator is seeded in the same way.
        merge_single: append a last batch of one image to the one before. A DataLoader's batch of one image after a
            larger batch is dropped instead.
        num_workers: number of processes that load a Dataset.
        weights: (N,) relative probabilities with which images are drawn, with replacement; None takes each image once.
        ranks: processes that share each batch; `epoch` yields this one's part, which may be empty.

    Raises:
        ValueError: several processes share a DataLoader, whose batches only it knows.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        *,
        name: str,
        num_classes: int,
        kind: str = "class",
        device: torch.device | str = "cpu",
        seed: int | None = None,
        merge_single: bool = False,
        num_workers: int = 0,
        weights: Tensor | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = Ranks() if ranks is None else ranks
        if self.ranks.size > 1 and isinstance(data, DataLoader):
            raise ArgumentError(name, "must be a Dataset or a pair of tensors with several processes, got a DataLoader")
        self.data, self.batch_size, self.name, self.num_classes = data, batch_size, name, num_classes
        self.kind, self.weights = kind, weights
        self.device, self.seed, self.merge_single = torch.device(device), seed, merge_single
        self.num_workers = num_workers
        self.num_images = num_images(data, name)

    def __len__(self) -> int:
        """Number of batches in one epoch."""
        return num_batches(self.data, self.batch_size, self.name, self.merge_single)

    def epoch(
        self, epoch: int = 0, skip: int = 0, started_with: RandomStates | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the data once, after calling `set_epoch` on datasets that have it.

        Args:
            epoch: counted from 0.
            skip: number of batches to leave out at the beginning. A DataLoader reads them, all others do not.
            started_with: random states before the first batch, with which a DataLoader reads what is left out; then
                the current ones are restored.

        Yields:
            images (B, C, H, W), uint8 or floating point, and labels (B,) int64, or float32 of other kinds.
        """
        replayed = isinstance(self.data, DataLoader)
        largest, left = 0, skip if replayed else 0
        now = rng_state() if left else None
        if left and started_with is not None:
            set_rng_state(*started_with)
        for images, labels in self._raw(epoch, 0 if replayed else skip):
            largest = max(largest, len(labels))
            if self.merge_single and replayed and len(labels) == 1 < largest:
                continue
            if left:
                left -= 1
                if not left and now is not None:
                    set_rng_state(*now)
                continue
            if labels.device.type == "cpu":
                check_labels(labels, f"a batch of {self.name}", self.num_classes, self.kind)
            # On a GPU, looking at the pixels would wait for it.
            if not is_tensor_pair(self.data) and images.is_floating_point() and images.device.type == "cpu":
                if not torch.isfinite(images).all():
                    raise ValueError(f"a batch of {self.name} must have finite pixels, got NaN or infinity")
            yield (
                images.to(self.device, non_blocking=True),
                labels.to(self.device, torch.int64 if self.kind == "class" else torch.float32, non_blocking=True),
            )

    def _raw(self, epoch: int, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        epoch_seed = (0 if self.seed is None else self.seed) * 1_000_003 % 2**40 + epoch
        generator = torch.Generator().manual_seed(epoch_seed)
        source = self.data.dataset if isinstance(self.data, DataLoader) else self.data
        if hasattr(source, "set_epoch"):
            source.set_epoch(epoch)
        if isinstance(self.data, DataLoader):
            for holder in (self.data, self.data.sampler):
                own = getattr(holder, "generator", None)
                if own is not None and self.seed is not None:
                    own.manual_seed(epoch_seed)
            if hasattr(self.data.sampler, "set_epoch"):
                self.data.sampler.set_epoch(epoch)
            for batch in self.data:
                if not is_tensor_pair(batch):
                    raise TypeError(
                        f"{self.name} must be a DataLoader that yields (images, labels) tensors, "
                        f"got batches of {type(batch).__name__}"
                    )
                check_images(batch[0], f"a batch of {self.name}", 4)
                yield batch[0], batch[1]
            return
        order = self._order(generator).tolist()
        places = split_indices(torch.arange(self.num_images), self.batch_size, self.merge_single)[skip:]
        own = [self.ranks.share(batch) for batch in places]
        batches = [[order[place] for place in batch] for batch in own]
        if is_tensor_pair(self.data):
            images, labels = as_tensor_pair(self.data)
            for batch in batches:
                index = torch.tensor(batch, dtype=torch.int64)
                yield images[index.to(images.device)], labels[index.to(labels.device)]
            return
        data: Any = self.data
        read: list[Any] = [batch for batch in batches if batch]
        if self.num_workers:
            data = _Seeded(self.data, epoch_seed)
            read = [[(place, order[place]) for place in batch] for batch in own if batch]
        loader = DataLoader(
            data,
            batch_sampler=read,
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            generator=generator,
        )
        yield from loader
        if len(read) < len(batches):  # of the last batch, other processes have all images
            first, label = self.data[0]
            yield torch.as_tensor(first)[None][:0], torch.as_tensor(label)[None][:0]

    def _order(self, generator: torch.Generator) -> Tensor:
        """Return the indices of an epoch's images, (N,) int64."""
        if self.weights is not None:
            return torch.multinomial(self.weights, self.num_images, replacement=True, generator=generator)
        if self.seed is None:
            return torch.arange(self.num_images)
        together = getattr(self.data, "together", None)
        if together is not None:
            return local_order(torch.tensor(together), generator)
        return torch.randperm(self.num_images, generator=generator)


def local_order(together: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random order (N,) of images that are fetched `together`, of which only a few such sets are open at once.

    The sets come in random order. Among `OPEN_AT_ONCE` of them the images are shuffled; then the next ones follow.

    Args:
        together: (N,) int64, the number of each image's set.
    """
    numbers, of_image = together.unique(return_inverse=True)
    place = torch.randperm(len(numbers), generator=generator)[of_image] // OPEN_AT_ONCE  # (N,)
    shuffled = torch.randperm(len(together), generator=generator)
    return shuffled[place[shuffled].argsort(stable=True)]


def grouped(batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of `size` consecutive items; the last may be shorter. Nothing is read ahead of its list."""
    while group := list(itertools.islice(batches, size)):
        yield group
