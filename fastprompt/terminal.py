"""Safe terminal output: text from files and hosts never reaches a terminal unescaped."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

_KEPT = "\n\t\u200c\u200d"
"""Line ends, tabs, and the joiners used inside emoji and in the words of some scripts."""


def printable(text: str) -> str:
    r"""Escape control and invisible characters in `text` as in Python: \x1b, \u202e."""
    return "".join(
        letter if letter.isprintable() or letter in _KEPT else letter.encode("unicode_escape").decode()
        for letter in text
    )


def say(text: str, file: TextIO | None = None) -> None:
    """Print `printable` text and flush; to standard output if no `file` is given. All commands print through this."""
    print(printable(text), file=sys.stdout if file is None else file, flush=True)


def printable_json(value: Any) -> str:
    """Format `value` as indented JSON with control characters escaped."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return "".join(letter if letter.isprintable() or letter == "\n" else json.dumps(letter)[1:-1] for letter in text)


@contextlib.contextmanager
def printable_warnings() -> Iterator[None]:
    """Context in which warnings, which may name files, are printed as `printable` text."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda *arguments, **options: printable(usual(*arguments, **options))
    try:
        yield
    finally:
        warnings.formatwarning = usual
