"""The directory of a training run: the files in it, and the order in which they are written and removed.

    last.safetensors  the state: everything needed to resume, including the log so far. This file defines the run. It
                      is replaced atomically, and the files below are rebuilt from it if they are lost
    choices.json      implementations chosen by timing since the run began
    log.jsonl         one JSON object per line: start, epoch, resume, diverged, end
    recipe.json       the recipe
    best/             the adapter of the best epoch
    tensorboard/      events for TensorBoard, if it is a callback
    run.json, results.json, result.json   settings and results, added by the command line and by grids

A run directory commits as SQLite does. Commits are atomic: the state is one file under one digest, so a process killed
at any moment leaves the state before or after, and the other files are rebuilt on resume. Commits are durable: files
and their directory are synchronised, and a failing `fsync` is an error. There is one writer at a time: it holds the
directory's lock, and others are refused.

A new run removes an old one before it writes anything: first the old result, then the state, then the rest. Thus all
files belong to one run, whenever the process is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastprompt.arguments import ArgumentError
from fastprompt.files import atomic_write, remove, remove_stale_temporaries
from fastprompt.locks import directory_lock
from fastprompt.train.checkpoint import load_state, save_state

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT

STATE_FILE, CHOICES_FILE, LOG_FILE, RECIPE_FILE = "last.safetensors", "choices.json", "log.jsonl", "recipe.json"
BEST_DIRECTORY, TRACKER_DIRECTORY = "best", "tensorboard"
SETTINGS_FILE, RESULTS_FILE, GRID_RESULT_FILE = "run.json", "results.json", "result.json"
_REMOVED_IN_ORDER = (
    RESULTS_FILE,
    GRID_RESULT_FILE,
    STATE_FILE,
    CHOICES_FILE,
    BEST_DIRECTORY,
    TRACKER_DIRECTORY,
    LOG_FILE,
    RECIPE_FILE,
    SETTINGS_FILE,
)


class RunDirectory:
    """A run's directory, locked by this process. Use `open_run` to create one.

    Attributes:
        writable: False on a read-only file system, from which only finished runs can be returned.
    """

    def __init__(self, path: Path, writable: bool) -> None:
        self.path, self.writable = path, writable

    def read_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return tensors and values of the run's state, or None if no run was started here.

        Raises:
            ValueError: the file is damaged.
        """
        return load_state(self.path / STATE_FILE) if (self.path / STATE_FILE).exists() else None

    def begin(self, files: Mapping[str, str]) -> None:
        """Remove the files of an earlier run, then write the first files of the new one (name -> text)."""
        remove(self.path, _REMOVED_IN_ORDER)
        for name, text in files.items():
            atomic_write(self.path / name, text)

    def extend(self, files: Mapping[str, str]) -> None:
        """Remove the results of a run that goes on, and replace its first files."""
        remove(self.path, (RESULTS_FILE, GRID_RESULT_FILE))
        for name, text in files.items():
            atomic_write(self.path / name, text)

    def commit(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Replace the state."""
        save_state(self.path / STATE_FILE, tensors, values)

    def write_log(self, events: list[dict[str, Any]]) -> None:
        """Replace the log."""
        atomic_write(self.path / LOG_FILE, "".join(json.dumps(event) + "\n" for event in events))

    def read_log(self) -> list[dict[str, Any]]:
        """Return the rows of the log up to the first invalid one."""
        events: list[dict[str, Any]] = []
        with contextlib.suppress(OSError, ValueError):
            for line in (self.path / LOG_FILE).read_text(encoding="utf-8").splitlines():
                events.append(json.loads(line))
        return events

    def write_choices(self, run: str, choices: Mapping[str, str]) -> None:
        """Replace the choices of the run named `run`."""
        record = {"run": run, "choices": dict(choices)}
        atomic_write(self.path / CHOICES_FILE, json.dumps({**record, "sha256": _digest(record)}, indent=1) + "\n")

    def read_choices(self, run: str) -> dict[str, str]:
        """Return the choices of the run named `run`; {} if none were written.

        Raises:
            ValueError: the file is damaged or belongs to another run.
        """
        path = self.path / CHOICES_FILE
        if not path.exists():
            return {}
        try:
            record = json.loads(path.read_bytes())
            if record.pop("sha256") != _digest(record):
                raise ValueError("its contents do not match the sha256 saved with it")
            if record["run"] != run:
                raise ValueError("it belongs to another run")
            return record["choices"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} cannot be used, it is damaged or was copied here ({error}): restore it from a copy, start "
                "over with resume=False (--no-resume), or remove it to resume with new choices, which may change the "
                "last bits of the result"
            ) from error

    def write_best(self, model: PromptedViT) -> None:
        """Save the model's adapter as the best."""
        model.save_pretrained(self.path / BEST_DIRECTORY)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def open_run(path: str | os.PathLike[str]) -> Iterator[RunDirectory]:
    """Lock a run's directory, creating it if necessary and removing temporary files of killed processes.

    If the directory was created here and nothing was written into it, it is removed at the end.

    Raises:
        ValueError: `path` is a file.
        DirectoryInUse: another process writes there; the message says which.
        OSError: the directory cannot be created.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ArgumentError("out_dir", f"must be a directory, got the file {path}")
    with directory_lock(path) as writable:
        if writable:
            for directory in (path, path / BEST_DIRECTORY):
                remove_stale_temporaries(directory)
        yield RunDirectory(path, writable)
