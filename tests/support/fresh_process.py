"""A process of its own for tests that fork and train: the threads of autograd do not survive a fork."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FRESH = "FASTPROMPT_FRESH_PROCESS"


def passed_in_a_fresh_process(request: pytest.FixtureRequest) -> bool:
    """Run this test in a process of its own and return True; in that process return False."""
    if FRESH in os.environ:
        return False
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", request.node.nodeid],
        cwd=request.config.rootpath,
        env={**environment, FRESH: "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    return True
