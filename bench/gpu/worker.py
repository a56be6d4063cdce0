"""Run stages in this process and write a row for each job: the command that `python -m gpu` starts.

A stage is a function of a `Place` that yields jobs, each with the labels of its row and a function that returns the
rest of the row. A job that raises `NotRun` is "not run", one that raises anything else "failed".
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from gpu.jobs import Job, NotRun, Row

STAGES = {
    "device": ("device", "device"),
    "compile": ("ops", "compiled"),
    "parity": ("ops", "parity"),
    "graphs": ("models", "graphs"),
    "ops": ("ops", "times"),
    "end to end": ("models", "inference"),
    "training": ("models", "training"),
    "mixed batches": ("models", "mixed"),
    "counters": ("profilers", "counters"),
    "sanitizer": ("profilers", "sanitizer"),
    "autotuned": ("models", "autotuned"),
}
"""Module and function of each stage."""


def jobs_of(stage: str, dry: bool, until: float) -> Iterator[Job]:
    """The jobs of a stage; importing it may fail."""
    from gpu.device import place

    module, function = STAGES[stage]
    yield from getattr(importlib.import_module(f"gpu.{module}"), function)(place(dry, until))


def rows_of(jobs: Iterator[Job], until: float) -> Iterator[Row]:
    """Run the jobs one after the other, none after `until`."""
    while True:
        labels: Row = {}
        try:
            job = next(jobs, None)
            if job is None:
                return
            labels = job.labels
            if time.time() + job.seconds > until:
                raise NotRun("no time was left")
            found = job.run()
            for row in found if isinstance(found, list) else [found]:
                yield {**labels, **row}
        except NotRun as reason:
            yield {**labels, "not run": str(reason)}
        except Exception:
            yield {**labels, "failed": traceback.format_exc(limit=-8)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="seconds since 1970")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    with given.rows.open("a", encoding="utf-8") as stream:
        for stage in given.stages:
            for row in rows_of(jobs_of(stage, given.dry_run, given.until), given.until):
                stream.write(json.dumps({"stage": stage, **row}) + "\n")
                stream.flush()
                os.fsync(stream.fileno())


if __name__ == "__main__":
    main()
