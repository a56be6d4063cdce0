"""Atomic and durable file operations."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

Content = bytes | str | Callable[[BinaryIO], Any]
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""Errors of `fsync` on a directory if the file system does not support it."""


def _sync_directory(directory: Path) -> None:
    """Make the file names in `directory` survive a power failure."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except PermissionError:  # a directory may be writable but not readable
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise OSError(
                error.errno,
                f"could not make the files written into {directory} durable: {error.strerror}; they may be lost in a "
                "power failure",
            ) from error
    finally:
        os.close(descriptor)


def make_directory(directory: str | os.PathLike[str]) -> list[Path]:
    """Create a directory and its missing parents durably.

    Returns:
        The directories that were created, innermost first.
    """
    directory = Path(directory)
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path in missing:
            _sync_directory(path.parent)
    except BaseException:
        remove_empty(missing)
        raise
    return missing


def remove_empty(directories: Iterable[Path]) -> None:
    """Remove the empty ones of the given directories, for example unused ones from `make_directory`."""
    for path in directories:
        with contextlib.suppress(OSError):
            path.rmdir()


def remove(directory: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Remove files and folders of a directory durably, in the given order; ignore missing ones.

    Raises:
        OSError: one of them could not be removed; those before it are gone.
    """
    directory, removed = Path(directory), False
    for name in names:
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink()
        else:
            continue
        removed = True
    if removed:
        _sync_directory(directory)


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
    """Write several files of one directory together: either all of them are replaced or none.

    Every file is first written in full and fsynced under a hidden temporary name. Then all files are renamed over the
    old ones, in the given order. An exception between two renames (including Ctrl-C) restores the old files. Other
    files of the directory are left alone; the directory is created if it is missing.

    Args:
        directory: where to write.
        files: file name -> bytes, text (UTF-8), or a function that takes the open binary file.

    Raises:
        OSError: the disk is full or the directory is not writable; the message names the file, and nothing has
            changed. Or the directory could not be synchronised after the files were replaced; the message says so.
    """
    directory = Path(directory)
    tag = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporaries = {directory / name: directory / f".{name}.{tag}.tmp" for name in files}
    backups = {directory / name: directory / f".{name}.{tag}.old.tmp" for name in files}
    existed = {path: path.exists() for path in temporaries}
    current, renaming, made = directory, False, list[Path]()
    try:
        made = make_directory(directory)
        for name, content in files.items():
            current = directory / name
            _write_synced(temporaries[current], content)
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
            for leftover in (temporary, backups[path]):
                with contextlib.suppress(OSError):
                    leftover.unlink()
        remove_empty(made)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise OSError(error.errno, f"could not write {current}: {reason}; no file was changed") from error
        raise
    for backup in backups.values():
        backup.unlink(missing_ok=True)
    _sync_directory(directory)


def atomic_write(path: str | os.PathLike[str], content: Content) -> None:
    """Write one file so that readers see either the old or the new content, never a part.

    The content goes into a temporary file in the same directory, followed by fsync, `os.replace` and fsync of the
    directory. On any exception, including a full disk and Ctrl-C, the temporary file is removed and the old file stays.

    Args:
        path: the file to write; its directory is created if missing.
        content: bytes, text (UTF-8), or a function that takes the open binary file and writes to it.

    Raises:
        OSError: the file could not be written; the message names it. The old content is intact.
    """
    path = Path(path)
    atomic_write_many(path.parent, {path.name: content})


def remove_stale_temporaries(directory: str | os.PathLike[str]) -> None:
    """Remove the temporary files that a killed process left in `directory`, but not in its subdirectories."""
    for path in Path(directory).glob(".*.tmp"):
        path.unlink(missing_ok=True)


def parse_json(content: bytes | str, path: str | os.PathLike[str]) -> Any:
    """Parse JSON from a file that may be damaged or malicious.

    Raises:
        ValueError: the content is not UTF-8 or not JSON, repeats a key of an object, holds a number that is not finite
            or an integer beyond 64 bits, or is nested too deeply; the message names `path`.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        return json.loads(
            text, object_pairs_hook=_object, parse_float=_finite, parse_int=_integer, parse_constant=_finite
        )
    except RecursionError:
        raise ValueError(f"{path} is corrupted: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is corrupted: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"a key occurs twice: {key[:40]!r}")
        found[key] = value
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"a number is not finite: {text[:40]}")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"an integer is too large: {text[:40]}")
    return int(text)
