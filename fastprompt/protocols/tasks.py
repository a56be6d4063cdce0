"""One data set of a protocol."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprompt.arguments import ArgumentError
from fastprompt.data.images import check_choice

LAYOUTS = ("lists", "json", "coop", "clevr", "torchvision")
VAL_FROM = ("listed", "last", "drawn")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Task:
    """One data set of a protocol.

    Attributes:
        name, title, group: name on the command line, title in tables, and the group that its accuracy counts in.
        layout: how its publisher lists the images: "lists" (train800.txt, ...), "json" (VPT's {path: class}), "coop"
            (split_zhou_*.json), "clevr" (PGN's .npy lists) or "torchvision".
        folders: where it may lie below the data root, the first that exists counts; for torchvision's sets a file or
            folder that shows that the set is there.
        classes: number of classes.
        train, val, test: number of images of each split.
        unconfirmed: those of the three numbers that come from memory, not from a publisher's file; data that differ
            give a warning there, elsewhere an error.
        file: the publisher's list, for the layouts "coop" and "clevr".
        images: folders below the task's folder that the listed paths may start from.
        torchvision: name of torchvision's class.
        val_from: where the validation images come from: "listed" by the publisher, the "last" fifth of the training
            images, or a fifth of them "drawn" by class, the same for every seed.
        sha256: of `file`, where its publisher's is known.
    """

    name: str
    title: str
    layout: str
    folders: tuple[str, ...]
    classes: int
    train: int
    val: int
    test: int
    group: str = ""
    unconfirmed: tuple[str, ...] = ()
    file: str | None = None
    images: tuple[str, ...] = (".",)
    torchvision: str | None = None
    val_from: str = "listed"
    sha256: str | None = None

    def __post_init__(self) -> None:
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("val_from", self.val_from, VAL_FROM)
        for name in ("classes", *SPLITS):
            require(name, getattr(self, name), int, "a positive integer")
        for name in self.unconfirmed:
            check_choice("unconfirmed", name, SPLITS)
        for field, layouts in (("file", ("coop", "clevr")), ("torchvision", ("torchvision",))):
            if (getattr(self, field) is not None) != (self.layout in layouts):
                raise ArgumentError(field, f"must be given for the layouts {', '.join(layouts)} and for no other")

    def place(self, root: Path) -> Path | None:
        """Return the first of `folders` that exists below `root`; None if there is none."""
        return next((root / folder for folder in self.folders if (root / folder).exists()), None)


def require(name: str, value: Any, kind: type[int] | type[float], what: str) -> None:
    """Raise ValueError unless `value` is of `kind` and positive; the error says that `name` must be `what`."""
    if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:
        raise ArgumentError(name, f"must be {what}, got {value!r}")
