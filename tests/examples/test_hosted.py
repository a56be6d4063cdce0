"""The examples that start a host: they run side by side, since each waits for its processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("serve_and_query", "pixels_client")


@pytest.fixture(scope="module")
def printed() -> Iterator[dict[str, str]]:
    """What each example prints."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "client")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("FASTPROMPT_API_KEYS", None)
    running = {
        name: subprocess.Popen(
            [sys.executable, ROOT / "examples" / f"{name}.py"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in NAMES
    }
    try:
        said = {name: process.communicate(timeout=300) for name, process in running.items()}
        assert all(process.returncode == 0 for process in running.values()), said
        yield {name: out for name, (out, _) in said.items()}
    finally:
        for process in running.values():
            process.kill()


def test_both_adapters_answer_over_http(printed: dict[str, str]) -> None:
    lines = printed["serve_and_query"].splitlines()
    assert [line.rpartition(" ")[0] for line in lines[:2]] == ["vpt: bright", "pgn: bright"]
    assert lines[2].startswith("embedding of 64 numbers; models: ")
    assert {"vpt", "pgn"} <= set(lines[2].partition("models: ")[2].split(", "))


def test_the_client_of_an_inverted_pgn_says_what_the_model_says(printed: dict[str, str]) -> None:
    assert "16 of 16 right, 16 as the model that was trained says" in printed["pixels_client"]
