"""Run the gates in processes of their own: Triton's interpreter and its compiler do not share one."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def run_gate(script: str, op: str) -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "0" if script == "compile" else "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "kernels" / "gates" / f"{script}.py"), op]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout)


@pytest.fixture
def gate() -> Callable[[str, str], dict[str, Any]]:
    """`gate("interpret" | "mutate" | "compile", op)`: what the script reports, run once per session."""
    return run_gate
