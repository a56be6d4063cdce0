"""Optional packages and the extras that install them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needed(extra: str, by: str) -> Iterator[None]:
    """Context in which to import the packages of `extra`.

    Args:
        extra: an extra of pyproject.toml.
        by: what needs the packages, as the subject of a sentence.

    Raises:
        ImportError: a package is missing; the message names it and the command that installs it.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or str(error)).split(".")[0]
        raise ImportError(
            f"{by} needs the package {package}: pip install 'fastprompt[{extra}]'", name=error.name
        ) from error
