"""Files that are either whole or absent, and the state a training run resumes from."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes

Content = bytes | str | Callable[[BinaryIO], Any]


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, content: Content) -> None:
    with open(path, "xb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def _second_name(path: Path, backup: Path) -> None:
    try:
        os.link(path, backup)
    except OSError:  # a file system without hard links
        shutil.copy2(path, backup)


def atomic_write_many(directory: str | os.PathLike[str], files: Mapping[str, Content]) -> None:
    """Writes several files of one directory together: all of them are replaced, or none is.

    Every file is first written in full and fsynced under a hidden temporary name, and only then are they renamed
    over the old ones, in the order given. An exception between two renames (Ctrl-C included) puts the old files back.
    Other files of the directory are left alone; the directory is made if it is missing.

    Args:
        directory: where to write.
        files: file name -> bytes, text (UTF-8), or a function that is given the open binary file.

    Raises:
        OSError: the disk is full or the place is not writable; the message names the file. Nothing has changed then.
    """
    directory = Path(directory)
    tag = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporaries = {directory / name: directory / f".{name}.{tag}.tmp" for name in files}
    backups = {directory / name: directory / f".{name}.{tag}.old.tmp" for name in files}
    existed = {path: path.exists() for path in temporaries}
    current, renaming = directory, False
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for (current, temporary), content in zip(temporaries.items(), files.values(), strict=True):
            _write_synced(temporary, content)
        if len(files) > 1:
            for current in temporaries:
                if existed[current]:
                    _second_name(current, backups[current])
        renaming = True
        for current, temporary in temporaries.items():
            os.replace(temporary, current)
    except BaseException as error:
        for path, temporary in temporaries.items():
            if renaming and len(files) > 1 and not temporary.exists():
                if existed[path]:
                    os.replace(backups[path], path)
                else:
                    path.unlink(missing_ok=True)
            temporary.unlink(missing_ok=True)
            backups[path].unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise OSError(error.errno, f"could not write {current}: {reason}; no file was changed") from error
        raise
    for backup in backups.values():
        backup.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        _sync_directory(directory)


def atomic_write(path: str | os.PathLike[str], content: Content) -> None:
    """Writes one file so that a reader sees the old content or the new, never a part.

    Temporary file in the same directory, fsync, ``os.replace``, fsync of the directory. The temporary file is removed
    on any exception, a full disk and Ctrl-C included, and the old file stays.

    Args:
        path: the file to write; its directory is made if missing.
        content: bytes, text (UTF-8), or a function that is given the open binary file and writes to it.

    Raises:
        OSError: the file could not be written; the message names it. The old content is intact.
    """
    path = Path(path)
    atomic_write_many(path.parent, {path.name: content})


def remove_stale_temporaries(directory: str | os.PathLike[str]) -> None:
    """Removes the temporary files a killed process left in ``directory`` (not in the directories below it)."""
    for path in Path(directory).glob(".*.tmp"):
        path.unlink(missing_ok=True)


def rng_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The random states of torch (CPU and every CUDA device), numpy and Python, as tensors and JSON values."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, words, gauss_next = random.getstate()
    return tensors, {
        "numpy": [kind, int(position), int(has_gauss), float(gauss)],
        "python": [version, list(words), gauss_next],
    }


def set_rng_state(tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    """Puts back what `rng_state` returned."""
    torch.set_rng_state(tensors["torch"].cpu())
    for name, state in tensors.items():
        if name.startswith("cuda.") and torch.cuda.is_available():
            index = int(name.removeprefix("cuda."))
            if index < torch.cuda.device_count():
                torch.cuda.set_rng_state(state.cpu(), index)
    kind, position, has_gauss, gauss = values["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, gauss_next = values["python"]
    random.setstate((version, tuple(words), gauss_next))


def save_state(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    """Writes tensors and JSON values into one safetensors file, atomically (the JSON sits in the file's header).

    Raises:
        OSError: the file could not be written; the old one is intact.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic_write(path, tensors_to_bytes(plain, metadata={"state": json.dumps(values)}))


def load_state(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads what `save_state` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or not a training state.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no training state at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a readable training state ({error}); delete it or start anew with "
                         "resume=False") from error
    return tensors, values


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's per-parameter state: tensors under ``<index>.<name>``, everything else as JSON values."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                values[f"{index}.{name}"] = value
    return tensors, values


def set_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor],
                        values: Mapping[str, Any]) -> None:
    """Puts back what `optimizer_state` returned, into an optimizer over the same parameters in the same order."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in (*tensors.items(), *values.items()):
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
