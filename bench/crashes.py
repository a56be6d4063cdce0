"""Kill processes and fill disks at a chosen file operation (Linux only)."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class Child:
    """A fork that runs `work` and exits with 0, or with 1 if it raised.

    The context manager kills it at the end, with what it has started: a loader's processes may outlive it.

    Args:
        log: the file that receives the fork's output and traceback.
    """

    def __init__(self, work: Callable[[], Any], log: Path | None = None) -> None:
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _do(work, log)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; do nothing if the process has ended."""
        if self._status is None:
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Return the exit code, or the negative number of the signal that ended the process."""
        if self._status is None:
            self._status = os.waitpid(self.pid, 0)[1]
        return os.waitstatus_to_exitcode(self._status)

    def wait_until(self, moment: float, otherwise: int) -> int:
        """Return what `wait` does, or `otherwise` if the process still runs at this `time.monotonic()`."""
        if self._status is None:
            handle = os.pidfd_open(self.pid)
            try:
                ended = select.select([handle], [], [], max(0.0, moment - time.monotonic()))[0]
            finally:
                os.close(handle)
            if not ended:
                return otherwise
        return self.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def _do(work: Callable[[], Any], log: Path | None) -> NoReturn:
    status = 1
    os.setpgid(0, 0)
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
    """Run `work` in a `Child`; return how it ended."""
    with Child(work, log) as process:
        return process.wait()


def killed_after(seconds: float, work: Callable[[], Any], log: Path | None = None) -> int:
    """Run `work` in a `Child` that is killed after that many seconds; return how it ended."""
    with Child(work, log) as process:
        handle = os.pidfd_open(process.pid)
        try:
            select.select([handle], [], [], seconds)  # returns early if it ends
        finally:
            os.close(handle)
        process.kill()
        return process.wait()


def at_operation(number: int, directory: Path, work: Callable[[], Any], act: Callable[[str], Any]) -> int:
    """Run `work`, calling `act` before the file operation of that number below `directory`; return how many there were.

    Calls of `open` and of `os` that name a path below it count, and every `fsync`. If `act` raises, so does the
    operation. The process keeps the audit hook forever: call this in a `Child`.
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
    """Run `work` in a fork that is killed before its operation of that number (`at_operation`); return how it ended."""

    def kill(_: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return in_a_child(lambda: at_operation(number, directory, work, kill), log)


WRITES = ("os.fsync", "os.mkdir", "os.rename", "os.link", "open")


def full_from(number: int, directory: Path, work: Callable[[], Any], log: Path | None = None) -> int:
    """Run `work` in a fork whose disk is full from the write of that number below `directory`; return how it ended.

    A write is an `fsync`, a new name, or opening a file for writing. Files can still be read and removed.
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
