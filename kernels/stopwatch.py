"""What was chosen because it was the faster: kept for a run, taken up again by its continuation, or done without.

Two implementations of an op differ in their last bits. Which of them wins a measurement depends on what else the
machine does in that moment, so a computation that has to end in the same bits in another process needs the choices
of the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Choices:
    """The implementation chosen for each call that was measured.

    Args:
        made: signature of a call (its text) → name of the implementation; grows as choices are made.
        measure: False: nothing is measured, what is not in `made` takes the choice that needs no measurement.
        on_choice: called after a choice was added to `made` and before it has any effect.
    """

    def __init__(
        self, made: dict[str, str] | None = None, measure: bool = True, on_choice: Callable[[], None] | None = None
    ) -> None:
        self.made = {} if made is None else made
        self.measure, self.on_choice = measure, on_choice
        self._by_key: dict[Hashable, str] = {}

    def recall(self, key: Hashable) -> str | None:
        """What was chosen for calls with this signature; None: nothing yet."""
        if key not in self._by_key:
            name = self.made.get(str(key))
            if name is None:
                return None
            self._by_key[key] = name
        return self._by_key[key]

    def note(self, key: Hashable, name: str) -> None:
        """Keep a choice."""
        self._by_key[key] = self.made[str(key)] = name
        if self.on_choice is not None:
            self.on_choice()


_current: ContextVar[Choices | None] = ContextVar("fastprompt_choices", default=None)


@contextmanager
def kept(choices: Choices) -> Iterator[None]:
    """Within this context (and this thread), choose as `choices` says and keep in it what is chosen."""
    token = _current.set(choices)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Choices | None:
    """The `Choices` of this context."""
    return _current.get()


def decide(key: Hashable, measure: Callable[[], str], unmeasured: str) -> str:
    """The implementation for calls with the signature `key`.

    Args:
        measure: names the faster; it remembers for the process what it found.
        unmeasured: the choice where measurements are switched off.
    """
    choices = _current.get()
    if choices is None:
        return measure()
    name = choices.recall(key)
    if name is None:
        if not choices.measure:
            return unmeasured
        name = measure()
        choices.note(key, name)
    return name
