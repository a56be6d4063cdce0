"""SIGTERM: a run writes a checkpoint and ends with exit code 143."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM

_requested = False
_polls = 0


class Terminated(SystemExit):
    """The process was asked to end; its exit code is 143.

    Attributes:
        saved: whether a run wrote a checkpoint for it.
    """

    def __init__(self, saved: bool) -> None:
        super().__init__(EXIT_CODE)
        self.saved = saved


def _handle(signum: int, frame: FrameType | None) -> None:
    global _requested
    if _requested or not _polls:  # nobody would look, or the one who should has not
        raise Terminated(saved=False)
    _requested = True


@contextlib.contextmanager
def sigterm_handled() -> Iterator[None]:
    """Context in which SIGTERM raises `Terminated`, at the next step of a run that looks for it, else at once.

    Signals can be handled in the main thread only; elsewhere this does nothing.
    """
    global _requested
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _handle)
    try:
        yield
    finally:
        _requested = False
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def polling() -> Iterator[None]:
    """Context of code that calls `requested` often, and then ends by itself."""
    global _polls
    _polls += 1
    try:
        yield
    finally:
        _polls -= 1


def requested() -> bool:
    """Whether SIGTERM has arrived in `sigterm_handled`."""
    return _requested
