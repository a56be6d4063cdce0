"""How much memory the requests of all clients may take together."""

from __future__ import annotations

from types import TracebackType

from fastprompt.serve.protocol import Refused


class Budget:
    """Bytes that bodies and pictures of all requests may hold at once.

    A request may hold no more than what is then still free. So no number of clients fills the budget: the more of it
    is taken, the smaller the requests that still come in, and it is the large ones that are refused.
    """

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0


class Share:
    """What one request holds of a budget, within a `with` block."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.held = budget, 0

    def check(self, size: int) -> None:
        """Raise Refused (503), and hold nothing any more, where the request could not hold `size` bytes now."""
        if size > self.budget.size - self.budget.used - (size - self.held):
            self.resize(0)  # now, not when the request has ended: others need not be refused for its sake
            raise Refused(503, "busy", "the host holds as many bytes of requests as it can; try again later")

    def resize(self, size: int) -> None:
        """Hold `size` bytes. Raises Refused (503), and holds nothing any more, where that is too much."""
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
