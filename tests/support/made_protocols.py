"""Small made data in the layouts of the papers' protocols, and protocols of the same tasks with their sizes."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastprompt.protocols import Protocol, Task, load_protocol

SIZES = {"train": 8, "val": 4, "test": 6}
CLASSES = 2
SIDE = 32


def small(name: str, tasks: Sequence[str] | None = None, **sizes: int) -> Protocol:
    """The named protocol with its tasks, or some, at the sizes that `make_task` makes."""
    protocol = load_protocol(name)
    wanted = {**SIZES, "classes": CLASSES, **sizes}
    kept = [
        dataclasses.replace(task, **wanted, unconfirmed=(), sha256=None)
        for task in protocol.tasks
        if tasks is None or task.name in tasks
    ]
    return dataclasses.replace(protocol, tasks=tuple(kept), size=SIDE)


def write_protocol(protocol: Protocol, path: Path) -> Path:
    """Write a protocol as a TOML file."""

    def lines(values: dict[str, Any]) -> str:
        return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items() if value is not None)

    values = dataclasses.asdict(protocol)
    tasks = values.pop("tasks")
    images = {key: values.pop(key) for key in ("size", "resize", "augment", "mean", "std")}
    search = {key: values.pop(key) for key in ("base_lrs", "weight_decays")}
    text = f"{lines(values)}[images]\n{lines(images)}[search]\n{lines(search)}"
    path.write_text(text + "".join(f"[[tasks]]\n{lines(task)}" for task in tasks), encoding="utf-8")
    return path


def make_image(path: Path, label: int, number: int) -> None:
    """Write an image that no other (label, number) has; its brightness shows the label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng((label, number))
    low = 150 * label // max(1, CLASSES - 1)
    Image.fromarray(random.integers(low, low + 100, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)


def make_task(task: Task, root: Path) -> Path:
    """Make a task of a `small` protocol below `root`, as its publisher lays it out; returns its folder."""
    folder = root / task.folders[0]
    made: dict[str, list[tuple[str, int]]] = {}
    number = 0
    for split in ("train", "val", "test"):
        made[split] = []
        for i in range(getattr(task, split)):
            made[split].append((f"{split}/{number:06d}.png", i % task.classes))
            number += 1
    {"lists": _lists, "json": _json, "coop": _coop, "clevr": _clevr, "torchvision": _torchvision}[task.layout](
        task, folder, made
    )
    return folder


def _write(folder: Path, made: dict[str, list[tuple[str, int]]]) -> None:
    for entries in made.values():
        for name, label in entries:
            make_image(folder / name, label, int(Path(name).stem))


def _lists(task: Task, folder: Path, made: dict[str, list[tuple[str, int]]]) -> None:
    names = {"train": "train800", "val": "val200", "test": "test"}
    listed = {s: [(f"images/{names[s]}/{Path(n).name}", label) for n, label in e] for s, e in made.items()}
    _write(folder, listed)
    listed["both"] = listed["train"] + listed["val"]
    for split, entries in listed.items():
        text = "".join(f"{name} {label}\n" for name, label in entries)
        (folder / f"{names.get(split, 'train800val200')}.txt").write_text(text)


def _json(task: Task, folder: Path, made: dict[str, list[tuple[str, int]]]) -> None:
    _write(folder / task.images[0], made)
    for split, entries in made.items():  # the publishers' ids need not start at 0
        (folder / f"{split}.json").write_text(json.dumps({name: label + 1 for name, label in entries}))


def _coop(task: Task, folder: Path, made: dict[str, list[tuple[str, int]]]) -> None:
    assert task.file is not None
    _write(folder / task.images[0], made)
    listed = {s: [[name, label, f"class {label}"] for name, label in entries] for s, entries in made.items()}
    (folder / task.file).write_text(json.dumps(listed))


def _clevr(task: Task, folder: Path, made: dict[str, list[tuple[str, int]]]) -> None:
    assert task.file is not None
    (folder / task.file).mkdir(parents=True)
    for split, entries in (("train", made["train"] + made["val"]), ("val", made["test"])):
        listed = [(f"CLEVR_{split}_{Path(name).name}", label) for name, label in entries]
        for name, label in listed:
            number = int(name.split("_")[-1].removesuffix(".png"))
            make_image(folder / task.images[0] / split / name, label, number)
        paths = [f"clevr/CLEVR_v1.0/images/{split}/{name}" for name, _ in listed]
        np.save(folder / task.file / f"{split}_images.npy", np.array(paths))
        np.save(folder / task.file / f"{split}_labels.npy", np.array([f"count_{3 + label}" for _, label in listed]))


def _torchvision(task: Task, folder: Path, made: dict[str, list[tuple[str, int]]]) -> None:
    """CIFAR-10's pickled batches of 32 x 32 pixels; torchvision's check of their md5 is for the test to switch off."""
    assert task.torchvision == "CIFAR10"
    folder.mkdir(parents=True)
    entries = made["train"] + made["val"]
    fifth = -(-len(entries) // 5)
    batches = {f"data_batch_{i + 1}": entries[i * fifth : (i + 1) * fifth] for i in range(5)}
    for name, part in {**batches, "test_batch": made["test"]}.items():
        data = np.full((len(part), 3072), 0, dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [label for _, label in part]}))
    names = [f"class {i}" for i in range(task.classes)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
