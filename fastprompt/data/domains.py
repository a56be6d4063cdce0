"""Several data sets as the domains of one: a union of their labels or a head for each, and how often each is drawn."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from fastprompt.adapters import Preprocessing
from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.data.images import check_choice
from fastprompt.data.splits import DataSplits, ImageSet
from fastprompt.domains import LABELS, Domains

SAMPLINGS = ("proportional", "balanced")


class DomainSet(Dataset[tuple[torch.Tensor, int]]):
    """The images of several `ImageSet`s, each a domain, with labels of one label space.

    `labels`, and `domain_of`, the domain of each image, are those of the current epoch. With balanced sampling, an
    epoch is as long as all images together and has equally many of each domain (the first ones may have one more):
    a random part of large domains, small ones several times over. It depends on (seed, epoch) only; call
    `set_epoch(e)` before each epoch.

    Args:
        parts: the images of each domain.
        maps: of each domain, the label of each of its own labels.
        class_names: one name per label.
        domains: the domains, in the order of `parts`.
        sampling: "proportional" has every image once.
        seed: of balanced sampling.
    """

    def __init__(
        self,
        parts: Sequence[ImageSet],
        maps: Sequence[Sequence[int]],
        class_names: Sequence[str],
        domains: Domains,
        sampling: str = "proportional",
        seed: int = 0,
    ) -> None:
        self.parts, self.maps = list(parts), [list(each) for each in maps]
        self.class_names, self.domains = list(class_names), domains
        self.sampling, self.seed = sampling, seed
        self._length = sum(len(part) for part in self.parts)
        self._index: list[tuple[int, int]] = []
        self.set_epoch(0)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of all resized images."""
        return sum(part.decoded_bytes for part in self.parts)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the resized images that are kept in memory once they have been read."""
        return sum(part.kept_bytes for part in self.parts)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that draws the images and seeds their augmentations. Call it before each epoch."""
        for part in self.parts:
            part.set_epoch(epoch)
        if self.sampling == "proportional":
            self._index = [(number, i) for number, part in enumerate(self.parts) for i in range(len(part))]
            return
        count = len(self.parts)
        self._index = []
        for number, part in enumerate(self.parts):
            wanted = self._length // count + (number < self._length % count)
            drawn: list[int] = []
            while len(drawn) < wanted:
                key = hashlib.sha256(f"{self.seed} {epoch} {number} {len(drawn)}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
                drawn += torch.randperm(len(part), generator=generator).tolist()
            self._index += [(number, i) for i in drawn[:wanted]]

    @property
    def labels(self) -> list[int]:
        """The label of each image, without decoding anything."""
        return [self.maps[number][self.parts[number].labels[i]] for number, i in self._index]

    @property
    def domain_of(self) -> list[str]:
        """The domain of each image."""
        return [self.domains.names[number] for number, _ in self._index]

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing that turns image files into these pixels, the same for all domains."""
        return self.parts[0].preprocessing

    def of(self, domain: str) -> DomainSet:
        """Return the images of one domain, each once, with the labels of all."""
        number = self.domains.index(domain)
        return DomainSet([self.parts[number]], [self.maps[number]], self.class_names, self.domains)

    def identity(self) -> dict[str, Any]:
        """Return what identifies these images to a training run, as JSON values; see `ImageSet.identity`."""
        parts = [part.identity() for part in self.parts]
        digest = hashlib.sha256("".join(part["files"] for part in parts).encode()).hexdigest()
        own = [{key: value for key, value in part.items() if key != "files"} for part in parts]
        return {"parts": own, "sampling": self.sampling, "sampling_seed": self.seed, "files": digest}

    def __len__(self) -> int:
        return len(self._index)

    def file_of(self, index: int) -> str | None:
        """Return the path of an image's file; None if it is not a file of its own."""
        number, i = self._index[index]
        return self.parts[number].file_of(i)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        number, i = self._index[index]
        image, label = self.parts[number][i]
        return image, self.maps[number][label]


def load_domains(names: Any, load: Callable[[Any], DataSplits], labels: str, sampling: str, seed: int) -> DataSplits:
    """Load several data sets with `load` and join them; see `fastprompt.load_data`.

    Raises:
        TypeError, ValueError: fewer than two sets, two of one name, or sets whose images are read differently.
    """
    check_choice("labels", labels, LABELS)
    check_choice("sampling", sampling, SAMPLINGS)
    named = _named(names)
    splits = {name: load(source) for name, source in named.items()}
    ranges = {data.intensity_range for data in splits.values()} - {None}
    if len(ranges) > 1:
        raise ArgumentError(
            "intensity_range",
            f"must be given as one (low, high) for all domains, whose images suggest {' and '.join(map(str, ranges))}",
        )
    class_names, maps = _label_space({name: data.class_names for name, data in splits.items()}, labels)
    domains = Domains(tuple(splits), tuple(tuple(each) for each in maps), labels)
    parts: dict[str, list[ImageSet]] = {
        "train": [data.train for data in splits.values()],
        "val": [data.val for data in splits.values()],
        "test": [data._test for data in splits.values()],
    }
    made: dict[str, Any] = {
        part: DomainSet(sets, maps, class_names, domains, sampling if part == "train" else "proportional", seed)
        for part, sets in parts.items()
    }
    summaries = {name: data.summary() for name, data in splits.items()}
    first = next(iter(summaries.values()))
    facts = {
        "name": " + ".join(splits),
        "num_classes": len(class_names),
        **{part: len(made[part]) for part in parts},
        **{key: first[key] for key in ("image_size", "resize", "augment", "seed")},
        "intensity_range": next((list(each) for each in ranges if each is not None), None),
        "labels": labels,
        "sampling": sampling,
        "left_out": {f"{name}: {why}": n for name, facts in summaries.items() for why, n in facts["left_out"].items()},
        "sha256": hashlib.sha256("".join(facts["sha256"] for facts in summaries.values()).encode()).hexdigest(),
        "domains": summaries,
    }
    return DataSplits(facts["name"], class_names, made["train"], made["val"], made["test"], facts)


def _named(names: Any) -> dict[str, Any]:
    """Return domain name -> data set. A folder is named after itself."""
    if isinstance(names, Mapping):
        named = dict(names)
    elif isinstance(names, Sequence):
        named = {}
        for source in names:
            path = isinstance(source, os.PathLike) or (isinstance(source, str) and os.sep in source)
            name = Path(source).name if path else str(source)
            if name in named:
                raise ArgumentError(
                    "name", f"must have a name for each domain, as {{'a': ..., 'b': ...}}: two are {name!r}"
                )
            named[name] = source
    else:
        raise ArgumentTypeError("name", f"must be a data set or a list of them, got {type(names).__name__}")
    if len(named) < 2 or not all(isinstance(name, str) and name for name in named):
        raise ArgumentError("name", f"must be two data sets or more, got {list(named)}")
    return named


def _label_space(class_names: Mapping[str, Sequence[str]], labels: str) -> tuple[list[str], list[list[int]]]:
    """Return one name per label, and the label of each domain's own labels.

    In a union, classes of one name are one class. With heads per domain, a class is called "domain: class".
    """
    found: list[str] = []
    maps: list[list[int]] = []
    for domain, names in class_names.items():
        mine = []
        for name in names:
            called = name if labels == "union" else f"{domain}: {name}"
            if called not in found:
                found.append(called)
            mine.append(found.index(called))
        maps.append(mine)
    return found, maps
