"""Collect benchmarks for `pytest --benchmark-only`, and print the table of ratios at the end.

Plain `pytest` runs no benchmark. The long comparisons have make targets and run if their file is named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

LONG = {"bench_engine.py", "bench_forward.py", "bench_native.py", "bench_swin.py"}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave benchmarks out of plain test runs, and the long ones out of `pytest --benchmark-only`.

    pytest does not call this for paths given on the command line.
    """
    if not config.getoption("benchmark_only", default=False):
        return True
    return True if collection_path.name in LONG else None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print every peer's time relative to ours."""
    from peers import ratio_table

    lines = ratio_table()
    if lines:
        terminalreporter.section("throughput: peers against fastprompt")
        for line in lines:
            terminalreporter.write_line(line)
