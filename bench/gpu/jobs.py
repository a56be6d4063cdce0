"""What a stage yields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Row = dict[str, Any]


class NotRun(Exception):
    """Why a job cannot run here, which is not its failure."""


class Job(NamedTuple):
    """One row, or several: `run` returns what they hold besides the labels. seconds: that must be left to begin it."""

    labels: Row
    run: Callable[[], Row | list[Row]]
    seconds: float = 0.0
