"""The directory of a training run: which files it holds, and in which order they come and go.

    last.safetensors  the state: all that is needed to go on, and the rows of the log up to here. The run is what this
                      file says; it is replaced as one, and what follows is made again from it where it was lost
    choices.json      implementations that were chosen by stopwatch since the run began
    log.jsonl         one JSON object a line: start, epoch, resume, diverged, end
    recipe.json       the recipe
    best/             the adapter of the best epoch
    run.json, results.json, result.json   what the command line and grids add: what was asked for, what came out

Its commits keep what SQLite's do. They are atomic: the state is replaced as one file under one digest, a process that
is killed at any moment leaves the state before or after, and other files are made whole when the run goes on. They are
durable: files and their directory are synchronised, and an `fsync` that fails is an error. One process writes at a
time: it holds the directory's lock, and others are refused.

A new run takes an old one away before it writes anything: its result first, then its state, then the rest. So whenever
the process is killed, all files belong to one run.
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
BEST_DIRECTORY = "best"
SETTINGS_FILE, RESULTS_FILE, GRID_RESULT_FILE = "run.json", "results.json", "result.json"
_REMOVED_IN_ORDER = (
    RESULTS_FILE,
    GRID_RESULT_FILE,
    STATE_FILE,
    CHOICES_FILE,
    BEST_DIRECTORY,
    LOG_FILE,
    RECIPE_FILE,
    SETTINGS_FILE,
)


class RunDirectory:
    """A run's directory, whose lock this process holds; made by `open_run`.

    Attributes:
        writable: False on a read-only file system, where nothing but a finished run can be returned.
    """

    def __init__(self, path: Path, writable: bool) -> None:
        self.path, self.writable = path, writable

    def read_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and values of the run's state; None: no run was begun here.

        Raises:
            ValueError: the file is damaged.
        """
        return load_state(self.path / STATE_FILE) if (self.path / STATE_FILE).exists() else None

    def begin(self, files: Mapping[str, str]) -> None:
        """Take away what an earlier run left, and write the new run's first files, by name."""
        remove(self.path, _REMOVED_IN_ORDER)
        for name, text in files.items():
            atomic_write(self.path / name, text)

    def commit(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Replace the state."""
        save_state(self.path / STATE_FILE, tensors, values)

    def write_log(self, events: list[dict[str, Any]]) -> None:
        """Replace the log."""
        atomic_write(self.path / LOG_FILE, "".join(json.dumps(event) + "\n" for event in events))

    def read_log(self) -> list[dict[str, Any]]:
        """The rows of the log up to the first that is none."""
        events: list[dict[str, Any]] = []
        with contextlib.suppress(OSError, ValueError):
            for line in (self.path / LOG_FILE).read_text(encoding="utf-8").splitlines():
                events.append(json.loads(line))
        return events

    def write_choices(self, run: str, choices: Mapping[str, str]) -> None:
        """Replace the choices of the run with the name `run`."""
        record = {"run": run, "choices": dict(choices)}
        atomic_write(self.path / CHOICES_FILE, json.dumps({**record, "sha256": _digest(record)}, indent=1) + "\n")

    def read_choices(self, run: str) -> dict[str, str]:
        """The choices that this run made; {}: none were written.

        Raises:
            ValueError: the file is damaged or of another run.
        """
        path = self.path / CHOICES_FILE
        if not path.exists():
            return {}
        try:
            record = json.loads(path.read_bytes())
            if record.pop("sha256") != _digest(record):
                raise ValueError("its sha256 is not the one that was saved with it")
            if record["run"] != run:
                raise ValueError("it is of another run")
            return record["choices"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} cannot be used, it is damaged or was copied here ({error}): put a copy of it back, start anew "
                "with resume=False (--no-resume), or remove it to go on with choices that are made again and may lead "
                "to other last bits"
            ) from error

    def write_best(self, model: PromptedViT) -> None:
        """Save the model's adapter as the best."""
        model.save_pretrained(self.path / BEST_DIRECTORY)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def open_run(path: str | os.PathLike[str]) -> Iterator[RunDirectory]:
    """Hold a run's directory, made if it is missing, without the temporary files of a process that was killed in it.

    A directory that was made here and in which nothing was written is removed at the end.

    Raises:
        ValueError: `path` is a file.
        DirectoryInUse: another process writes there; the message says which.
        OSError: the directory cannot be made.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ArgumentError("out_dir", f"must be a directory, {path} is a file")
    with directory_lock(path) as writable:
        if writable:
            for directory in (path, path / BEST_DIRECTORY):
                remove_stale_temporaries(directory)
        yield RunDirectory(path, writable)
