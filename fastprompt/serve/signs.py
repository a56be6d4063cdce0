"""The signs of life that a worker gives to the web process."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any


class Signs:
    """Signs of life that a worker shows to the web process, in shared memory.

    Attributes:
        pulse: when a thread of the worker last ran; it stops with the process. turn: when the worker's loop last
            started an iteration; it also stops during a batch that never ends. Both are in seconds of
            `time.monotonic`.
        ready: whether the worker accepts requests.
    """

    def __init__(self) -> None:
        self._values: Any = multiprocessing.get_context("spawn").RawArray("d", 3)
        self.reset()

    def reset(self) -> None:
        """Reset all signs for a worker that is starting."""
        now = time.monotonic()
        self._values[:] = [now, now, 0.0]

    @property
    def pulse(self) -> float:
        return float(self._values[0])

    @property
    def turn(self) -> float:
        return float(self._values[1])

    @property
    def ready(self) -> bool:
        return bool(self._values[2])

    def beat(self) -> None:
        """Record that a thread of the worker runs."""
        self._values[0] = time.monotonic()

    def come_round(self) -> None:
        """Record that the worker's loop runs."""
        self._values[1] = time.monotonic()

    def set_ready(self) -> None:
        """Record that the worker accepts requests from now on."""
        self.come_round()
        self._values[2] = 1.0
