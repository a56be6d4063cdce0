"""The suite itself: it runs under pytest alone, and no method is left out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fastprompt.generators import PromptConfig, get_method, list_methods


def test_pytest_runs_the_suite_without_xdist(repository: Path) -> None:
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    one = "tests/test_suite.py::test_every_method_is_under_test"
    command = [sys.executable, "-c", code, "-q", "-p", "no:xdist", "-p", "no:cacheprovider", one]
    ran = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_method_is_under_test(configs: dict[str, PromptConfig]) -> None:
    registered = {get_method(name).config_class for name in list_methods()}
    assert {type(config) for config in configs.values()} == registered
