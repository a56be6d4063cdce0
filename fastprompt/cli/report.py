"""`fastprompt report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from fastprompt.terminal import say


@dataclass
class Report:
    """Build one self-contained HTML file from run directories."""

    runs: tyro.conf.Positional[list[Path]]
    """Run directories of `adapt`."""
    out: Path = Path("report.html")
    """HTML file to write."""
    analysis: list[Literal["information", "latent", "similarity", "domains"]] = field(default_factory=list)
    """What to compute with each run's adapter on its validation images: mutual information with the labels, KL and
    traversals of V²APT's latent units, maps of prompts and patches, and whether a generator tells data sets apart."""
    max_images: int = 500
    """Number of validation images that an analysis uses at most."""
    debug: bool = False
    """Show the traceback of an error."""


def report(command: Report) -> None:
    """Run `fastprompt report`."""
    from fastprompt.report.analysis import analyse
    from fastprompt.report.html import build_report

    found = [analyse(run, command.analysis, command.max_images) for run in command.runs] if command.analysis else None
    build_report(command.runs, command.out, analyses=found)
    say(f"written: {command.out}")
