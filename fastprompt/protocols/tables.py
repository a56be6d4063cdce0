"""Read a protocol's TOML file: tasks, sizes, image rule, search and seeds."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprompt.arguments import ArgumentError, ArgumentPathError, ArgumentTypeError
from fastprompt.data.augment import AUGMENTS
from fastprompt.data.images import check_choice
from fastprompt.data.splits import DataSplits
from fastprompt.protocols.splits import load_task
from fastprompt.protocols.tasks import Task, require

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Protocol:
    """A set of tasks that is evaluated in one way; `load_protocol` reads one.

    Attributes:
        name, title, paper: name on the command line, title in tables, and where it was published.
        get: how to get the data.
        published: in words, how the authors chose and trained, and where this library differs.
        seeds: seeds of the final runs.
        final_train: what the final runs train on, "train" or "train+val".
        size: side of the images in pixels.
        resize, augment: as in `fastprompt.load_data`; the augmentation is that of the training images.
        mean, std: normalisation of the pixels, for each channel.
        base_lrs, weight_decays: what the authors search, with learning rates for 256 images per step; empty if they
            published no search.
        tasks: its data sets.
    """

    name: str
    title: str
    paper: str
    get: str
    published: str
    seeds: tuple[int, ...]
    final_train: str
    size: int
    resize: str
    augment: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    base_lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        check_choice("final_train", self.final_train, ("train", "train+val"))
        check_choice("resize", self.resize, ("crop", "squash"))
        check_choice("augment", self.augment, AUGMENTS)
        require("size", self.size, int, "a positive integer")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise ArgumentError(name, f"must have three numbers, got {getattr(self, name)!r}")
        for rate in self.base_lrs:
            require("base_lrs", rate, float, "positive numbers with a decimal point")
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise ArgumentError("tasks", f"must be tasks of different names, got {names}")
        if not self.seeds:
            raise ArgumentError("seeds", "must hold at least one seed, got none")

    def task(self, name: str) -> Task:
        """Return a task by its name; raise ValueError with the nearest name if there is none."""
        for task in self.tasks:
            if task.name == name:
                return task
        names = [task.name for task in self.tasks]
        close = difflib.get_close_matches(str(name).lower(), names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ArgumentError("task", f"must be one of {self.name}'s {', '.join(names)}, got {name!r}{hint}")

    def load(
        self,
        task: str,
        root: str | os.PathLike[str],
        *,
        image_size: int | None = None,
        final: bool = False,
        per_class: int | None = None,
        seed: int = 0,
        augment: str | None = None,
        on_bad: str = "error",
    ) -> DataSplits:
        """Load one task from `root`, checked against the protocol.

        The lists are checked in full: numbers of images and classes, one name per class, every file there, none twice
        or in two splits. The images of the splits that are read are decoded once, strictly. A warning tells of images
        with the same contents in two splits.

        Args:
            task: name of a task.
            root: folder with the protocol's data.
            image_size: side in pixels; None is the protocol's.
            final: False: `.train` and `.val` are the protocol's, and `.test` is locked: reading it raises
                RuntimeError. True: `.train` is what the final runs train on (`final_train`), `.val` may be part of it
                and must not choose anything any more, and `.test` can be read once.
            per_class: at most this many training images of each class, drawn with `seed`, and as many validation
                images, so that a choice costs no more labels than the training; None is all of them.
            seed: seed of the order of images, of that draw and of the augmentation.
            augment: None is the protocol's.
            on_bad: as in `fastprompt.load_data`.

        Raises:
            ValueError, TypeError: an argument is wrong, or the data are damaged or not those of the protocol.
            FileNotFoundError: the task is not below `root`; the message says how to get it.
            FetchError: a set of torchvision is not there and cannot be downloaded.
        """
        return load_task(
            self.task(task),
            Path(root).expanduser(),
            protocol=self.name,
            get=self.get,
            resize=self.resize,
            together=self.final_train == "train+val",
            image_size=self.size if image_size is None else image_size,
            final=final,
            per_class=per_class,
            seed=seed,
            augment=self.augment if augment is None else augment,
            on_bad=on_bad,
        )

    def found(self, root: str | os.PathLike[str]) -> dict[str, Path | None]:
        """Return where each task lies below `root`, None for those that are not there. Nothing is read."""
        folder = Path(root).expanduser()
        return {task.name: task.place(folder) for task in self.tasks}


def list_protocols() -> list[str]:
    """Return the names of the protocols that `load_protocol` knows."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_protocol(name: str | os.PathLike[str]) -> Protocol:
    """Read a protocol: "vtab1k", "fgvc", "hta", "pgn12", or a TOML file of your own in the same form.

    Raises:
        TypeError, ValueError: the name is unknown, or the file is no protocol; the message names the key.
        FileNotFoundError: there is no such file.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise ArgumentTypeError("name", f"must be the name of a protocol or a TOML file, got {type(name).__name__}")
    path = Path(name).expanduser() if os.fspath(name).endswith(".toml") else FOLDER / f"{name}.toml"
    if path.parent == FOLDER and path.stem not in list_protocols():
        close = difflib.get_close_matches(str(name).lower(), list_protocols(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ArgumentError(
            "name", f"must be one of {', '.join(list_protocols())} or a .toml file, got {os.fspath(name)!r}{hint}"
        )
    if not path.is_file():
        raise ArgumentPathError("name", f"must be a file that exists, got {path}")
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ArgumentError("name", f"must be a TOML file, got {path} ({error})") from None
    try:
        return _protocol(values)
    except ArgumentError as error:
        raise type(error)(error.argument, f"{error.problem} (in {path})") from error


def named_task(name: str) -> tuple[Protocol, Task] | None:
    """Return protocol and task of a data set named "PROTOCOL:TASK", as in "vtab1k:dtd"; None for any other name.

    Raises:
        ValueError: the protocol has no such task.
    """
    protocol, colon, task = name.rpartition(":")
    if not colon or not (protocol in list_protocols() or protocol.endswith(".toml")):
        return None
    found = load_protocol(protocol)
    return found, found.task(task)


def _protocol(values: Mapping[str, Any]) -> Protocol:
    """Build a protocol from its TOML tables: [images] and [search] are part of it, [[tasks]] its tasks."""
    parts = {name: values.get(name, {}) for name in ("images", "search")}
    for name, part in parts.items():
        if not isinstance(part, Mapping):
            raise ArgumentTypeError(name, f"must be a table, got {part!r}")
    tasks = values.get("tasks")
    if not isinstance(tasks, list):
        raise ArgumentError("tasks", "must be tables [[tasks]]")
    flat = {key: value for key, value in values.items() if key not in ("images", "search", "tasks")}
    flat |= {"base_lrs": [], "weight_decays": [], **parts["images"], **parts["search"]}
    return _built(Protocol, {**flat, "tasks": tuple(_built(Task, task) for task in tasks)})


def _built(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """Build a dataclass from a table: lists become tuples, texts lose the space around them, keys are checked."""
    if not isinstance(values, Mapping):
        raise ArgumentTypeError("tasks", f"must be tables, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    what = f"task {values.get('name')!r}" if cls is Task else "the protocol"
    for key in values:
        if key not in fields:
            raise ArgumentError(key, f"is no key of {what}; known are {', '.join(fields)}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ArgumentError(name, f"is missing in {what}")
    plain = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    for key, value in plain.items():
        wanted = str(fields[key].type)
        if wanted.startswith("tuple") != isinstance(value, tuple):
            raise ArgumentTypeError(key, f"must be {'a list' if wanted.startswith('tuple') else 'one value'} in {what}")
        if wanted.startswith("str") and not isinstance(value, str):
            raise ArgumentTypeError(key, f"must be a text in {what}, got {value!r}")
    return cls(**{key: " ".join(v.split()) if isinstance(v, str) else v for key, v in plain.items()})
