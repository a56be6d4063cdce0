"""The signs of life that a worker gives to the web process."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any


class Signs:
    """What a worker lets the web process see, in memory that both have.

    Attributes:
        pulse: when a thread of the worker last ran; it stops with the process. turn: when its loop last came round; it
            stops with a batch that never ends, too. Both in seconds of `time.monotonic`.
        ready: the worker takes requests.
    """

    def __init__(self) -> None:
        self._values: Any = multiprocessing.get_context("spawn").RawArray("d", 3)
        self.reset()

    def reset(self) -> None:
        """As of a worker that begins now."""
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
        """A thread of the worker runs."""
        self._values[0] = time.monotonic()

    def come_round(self) -> None:
        """The worker's loop runs."""
        self._values[1] = time.monotonic()

    def set_ready(self) -> None:
        """The worker takes requests from now on."""
        self.come_round()
        self._values[2] = 1.0
