"""Streams on a CPU: each thread is one, and what they do to each other is recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


class RecordedStreams:
    """A `Streams` of a CPU.

    followed: (stream, the stream that it waits for, how many tensors it keeps).
    """

    def __init__(self) -> None:
        self.followed: list[tuple[int, int, int]] = []
        self.capturing = False

    def current(self, device: Any) -> int | None:
        return None if self.capturing else threading.get_ident()

    def mark(self, stream: int) -> int:
        return stream

    def follow(self, stream: int, mark: int, tensors: Iterable[Tensor]) -> None:
        self.followed.append((stream, mark, len(list(tensors))))


def elsewhere(function: Callable[[], Any]) -> int:
    """Call a function on another stream; returns which."""
    found: list[int] = []
    failed: list[BaseException] = []

    def run() -> None:
        found.append(threading.get_ident())
        try:
            function()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]
