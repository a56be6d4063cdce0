"""What is printed to people: text of files and hosts never reaches a terminal raw."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

_KEPT = "\n\t\u200c\u200d"
"""Line ends and tabs, and the joiners inside of emoji and of some scripts' words."""


def printable(text: str) -> str:
    r"""`text`, with each character that a terminal would obey or not show written as in Python: \x1b, \u202e."""
    return "".join(
        letter if letter.isprintable() or letter in _KEPT else letter.encode("unicode_escape").decode()
        for letter in text
    )


def say(text: str, file: TextIO | None = None) -> None:
    """Print `printable` text at once, on standard output if no `file` is given. All commands print by this."""
    print(printable(text), file=sys.stdout if file is None else file, flush=True)


def printable_json(value: Any) -> str:
    """Indented JSON of exactly `value`, in which characters that a terminal would obey are escaped."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return "".join(letter if letter.isprintable() or letter == "\n" else json.dumps(letter)[1:-1] for letter in text)


@contextlib.contextmanager
def printable_warnings() -> Iterator[None]:
    """Within it, warnings, which name files, are printed as `printable` text."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda *arguments, **options: printable(usual(*arguments, **options))
    try:
        yield
    finally:
        warnings.formatwarning = usual
