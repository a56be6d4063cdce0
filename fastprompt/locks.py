"""Allow one writer at a time in a directory, and record who it is."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from fastprompt.files import atomic_write, make_directory, remove_empty

LOCK_FILE, OWNER_FILE = ".lock", ".owner.json"
_SOFT_LOCK_FILE = ".lock.held"
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


class DirectoryInUse(RuntimeError):
    """Another process, or another thread of this one, is writing into the directory.

    Attributes:
        directory: the requested directory.
        owner: "host", "pid", "command" and "since" of the writing process; None if unknown.
    """

    def __init__(self, directory: Path, owner: dict[str, Any] | None) -> None:
        self.directory, self.owner = directory, owner
        who = "another process"
        if owner is not None:
            who = f"process {owner['pid']} on {owner['host']} ({owner['command']}, since {owner['since']})"
        super().__init__(f"{directory} is being written by {who}: wait for it, stop it, or choose another directory")


@contextlib.contextmanager
def directory_lock(directory: str | os.PathLike[str]) -> Iterator[bool]:
    """Hold the lock of a directory, creating the directory if it is missing; never wait for the lock.

    The kernel keeps the lock and releases it when the process ends for any reason. A lock is therefore never stale,
    reused process ids do not matter, and exactly one of several contenders gets it. `.owner.json` beside the lock
    tells the others who that is. On file systems without locks, a file with the owner's host, process id and start
    time replaces the lock; the next contender on that host removes it once the owner is gone.

    If the directory was created here and nothing was written into it, it is removed at the end.

    Yields:
        Whether the directory is writable. False on a read-only file system or without permission, where no lock can
        be held and none is needed.

    Raises:
        DirectoryInUse: somebody else holds the lock.
        OSError: the directory cannot be created.
    """
    directory = Path(directory)
    made = make_directory(directory)
    lock: BaseFileLock = FileLock(directory / LOCK_FILE)
    try:
        try:
            lock.acquire(timeout=0)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            lock = SoftFileLock(directory / _SOFT_LOCK_FILE)
            lock.acquire(timeout=0)
    except Timeout:
        raise DirectoryInUse(directory, _owner_of(directory)) from None
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
        yield False
        return
    try:
        with contextlib.suppress(OSError):  # on a full disk the lock is held without naming its owner
            atomic_write(directory / OWNER_FILE, json.dumps(_this_process()) + "\n")
        yield True
    finally:
        with contextlib.suppress(OSError):
            (directory / OWNER_FILE).unlink(missing_ok=True)
            if made and all(path.name in (LOCK_FILE, _SOFT_LOCK_FILE) for path in directory.iterdir()):
                # Unlink while holding the lock, so that others who opened the file notice that it is gone.
                (directory / LOCK_FILE).unlink(missing_ok=True)
        lock.release()
        remove_empty(made)


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process": _identity(os.getpid()),
        "command": " ".join(sys.argv)[:200],
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _owner_of(directory: Path) -> dict[str, Any] | None:
    """Return the contents of the owner's file; None if it does not exist yet or its process is gone."""
    try:
        owner = json.loads((directory / OWNER_FILE).read_text())
        here = owner["host"] == socket.gethostname()
        gone = here and owner["process"] != _identity(owner["pid"])
        return None if gone else {key: owner[key] for key in ("host", "pid", "command", "since")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _identity(pid: int) -> str | None:
    """Return boot id and start tick of a process, which no later process with the same id shares.

    Returns None if there is no such process or the system does not tell.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return f"{boot} {status.rpartition(')')[2].split()[19]}"
