"""Processes that are killed, and disks that fill up, at a chosen operation on files (Linux alone)."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class Child:
    """A fork that does `work` and exits with 0, or with 1 if it raised; as a context, killed at the end if it lives.

    Args:
        log: a file that takes what the fork prints, and its traceback.
    """

    def __init__(self, work: Callable[[], Any], log: Path | None = None) -> None:
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _do(work, log)

    def kill(self) -> None:
        """Send SIGKILL; to a process that has ended by itself nothing happens."""
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit code, or minus the signal that ended it."""
        if self._status is None:
            self._status = os.waitpid(self.pid, 0)[1]
        return os.waitstatus_to_exitcode(self._status)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()


def _do(work: Callable[[], Any], log: Path | None) -> NoReturn:
    status = 1
    try:
        if log is not None:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
        work()
        status = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def in_a_child(work: Callable[[], Any], log: Path | None = None) -> int:
    """Do `work` in a `Child`; how that ended."""
    return Child(work, log).wait()


def killed_after(seconds: float, work: Callable[[], Any], log: Path | None = None) -> int:
    """Do `work` in a `Child` that is killed after so many seconds; how it ended."""
    with Child(work, log) as process:
        handle = os.pidfd_open(process.pid)
        try:
            select.select([handle], [], [], seconds)  # until it ends, at the latest then
        finally:
            os.close(handle)
        process.kill()
        return process.wait()


def at_operation(number: int, directory: Path, work: Callable[[], Any], act: Callable[[str], Any]) -> int:
    """Do `work`, and `act` before the operation of that number on files below `directory`; how many there were.

    Counted are the calls of `open` and of `os` that name a path below it, and every `fsync`. What `act` raises, the
    operation raises. This process keeps the audit hook for ever: call it in a `Child`.
    """
    count, counting = 0, True

    def step(name: str) -> None:
        nonlocal count
        count += 1
        if count == number:
            act(name)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if counting and event.startswith(("os.", "open")) and any(str(directory) in str(part) for part in arguments):
            step(event)

    fsync = os.fsync
    os.fsync = lambda descriptor: (step("os.fsync"), fsync(descriptor))[1]
    sys.addaudithook(audit)
    try:
        work()
    finally:
        counting, os.fsync = False, fsync
    return count


def killed_at(number: int, directory: Path, work: Callable[[], Any], log: Path | None = None) -> int:
    """Do `work` in a fork that is killed before its operation of that number (`at_operation`); how it ended."""

    def kill(_: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return in_a_child(lambda: at_operation(number, directory, work, kill), log)


WRITES = ("os.fsync", "os.mkdir", "os.rename", "os.link", "open")


def full_from(number: int, directory: Path, work: Callable[[], Any], log: Path | None = None) -> int:
    """Do `work` in a fork whose disk is full from the write of that number below `directory` on; how it ended.

    A write is an `fsync`, a new name, or a file that is opened to be written. Files can still be read and removed.
    """

    def on_a_full_disk() -> None:
        count, fsync = 0, os.fsync

        def step(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event == "open" and not int(arguments[2]) & (os.O_WRONLY | os.O_RDWR):
                return
            count += 1
            if count >= number:
                raise OSError(errno.ENOSPC, "No space left on device", str(arguments[0]) if arguments else None)

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event in WRITES and any(str(directory) in str(part) for part in arguments):
                step(event, arguments)

        os.fsync = lambda descriptor: (step("os.fsync", ()), fsync(descriptor))[1]
        sys.addaudithook(audit)
        work()

    return in_a_child(on_a_full_disk, log)
