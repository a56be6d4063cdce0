"""Errors about arguments. Each carries the name of its argument, so that callers can rename it for their users."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class ArgumentError(ValueError):
    """An argument has a wrong value. The message is `argument` and `problem`: "epochs must be positive, got 0"."""

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(argument, problem)
        self.argument = argument
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.argument} {self.problem}"


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument has a wrong type."""


class ArgumentPathError(ArgumentError, FileNotFoundError):
    """An argument names a file or directory that does not exist or lacks required contents."""


class NotFiniteError(ArgumentError):
    """An argument leads to NaN or infinite numbers, or holds some."""


@contextlib.contextmanager
def argument_names(**names: str) -> Iterator[None]:
    """Rename arguments in the errors raised inside: with `root="data_root"`, errors about `root` name `data_root`."""
    try:
        yield
    except ArgumentError as error:
        if error.argument not in names:
            raise
        raise type(error)(names[error.argument], error.problem) from error
