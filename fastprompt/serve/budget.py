"""Limit the memory that the requests of all clients take together."""

from __future__ import annotations

from types import TracebackType

from fastprompt.serve.protocol import Refused


class Budget:
    """Bytes that bodies and pictures of all requests may hold at once.

    A single request may hold at most as much as remains free afterwards. So no number of clients exhausts the budget:
    the fuller it is, the smaller the requests it still admits, and large requests are refused first.
    """

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0


class Share:
    """The part of a budget that one request holds, within a `with` block."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.held = budget, 0

    def check(self, size: int) -> None:
        """Raise Refused (503) and release everything held if the request cannot hold `size` bytes now."""
        if size > self.budget.size - self.budget.used - (size - self.held):
            self.resize(0)  # now, not when the request ends, so that others are not refused because of it
            raise Refused(503, "busy", "the host holds as many bytes of requests as it can; try again later")

    def resize(self, size: int) -> None:
        """Hold `size` bytes. Raises Refused (503) and releases everything held if that is too much."""
        if size > self.held:
            self.check(size)
        self.budget.used += size - self.held
        self.held = size

    def __enter__(self) -> Share:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resize(0)
