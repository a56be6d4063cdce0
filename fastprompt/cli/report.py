"""`fastprompt report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from fastprompt.terminal import say


@dataclass
class Report:
    """Build one self-contained HTML file from run directories."""

    runs: tyro.conf.Positional[list[Path]]
    """Run directories of `adapt`."""
    out: Path = Path("report.html")
    """HTML file to write."""
    debug: bool = False
    """Show the traceback of an error."""


def report(command: Report) -> None:
    """Run `fastprompt report`."""
    from fastprompt.report.html import build_report

    build_report(command.runs, command.out)
    say(f"written: {command.out}")
