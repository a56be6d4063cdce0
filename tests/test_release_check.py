"""The release check counts failures, goes on after one, and knows only steps that are there."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("release_check", ROOT / "release" / "check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def steps(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the steps by three, of which the second fails; returns the list of those that ran."""
    ran: list[str] = []

    def does(name: str, problem: str = "") -> Callable[[], None]:
        def do() -> None:
            ran.append(name)
            if problem:
                raise check.Failure(problem)

        return do

    three = [("one", ""), ("two", "no disk\nmore"), ("three", "")]
    made = tuple(check.Step(name, f"do {name}", does(name, problem)) for name, problem in three)
    monkeypatch.setattr(check, "STEPS", made)
    return ran


def test_all_steps_run_and_failures_count(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = steps(check, monkeypatch)
    assert check.main([]) == 1
    assert ran == ["one", "two", "three"]
    said = capsys.readouterr().out
    assert "[2/3] two: do two\nFAILED: no disk" in said
    assert re.search(r"^failed  two +0 s  no disk$", said, re.MULTILINE)
    assert said.endswith("2 passed, 1 failed\n")
    ran.clear()
    assert check.main(["--skip", "two"]) == 0
    assert ran == ["one", "three"]
    ran.clear()
    assert check.main(["--only", "three"]) == 0
    assert ran == ["three"]
    with pytest.raises(SystemExit):
        check.main(["--only", "four"])


def test_commands_fail_as_steps_and_see_nothing_of_the_checkout(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    check.run(sys.executable, "-c", "import os, sys; sys.exit('PYTHONPATH' in os.environ)", cwd=tmp_path)
    with pytest.raises(check.Failure, match="ended with 3"):
        check.run(sys.executable, "-c", "raise SystemExit(3)", cwd=tmp_path)


def test_targets_are_in_the_makefile(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[str] = []
    monkeypatch.setattr(check, "run", lambda *words, **_: targets.append(words[2]))
    made = [step for step in check.STEPS if step.do.__qualname__.startswith("make.")]
    for step in made:
        step.do()
    known = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(targets) >= 6
    assert set(targets) <= set(known)
    assert "release-check" in known


def test_interpreters_are_found_by_version(check: ModuleType, tmp_path: Path) -> None:
    for name, prints in (("a", "3 13"), ("b", "3 9"), ("c", "3 10"), ("d", "3 13")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {prints}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "e").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "e").chmod(0o755)
    found = check.pythons([tmp_path / name for name in "abcde"])
    assert found == {(3, 10): tmp_path / "c", (3, 13): tmp_path / "a"}
    assert list(found) == [(3, 10), (3, 13)]


def test_a_wheel_for_one_python_is_refused(check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "ROOT", tmp_path)
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "fastprompt-1-cp311-cp311-linux_x86_64.whl").touch()
    with pytest.raises(check.Failure, match="abi3"):
        check.wheel()
    (tmp_path / "dist" / "fastprompt-1-cp310-abi3-linux_x86_64.whl").touch()
    assert check.wheel().name == "fastprompt-1-cp310-abi3-linux_x86_64.whl"


def test_versions_that_differ_are_named(check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "ROOT", tmp_path)
    (tmp_path / "fastprompt").mkdir()
    (tmp_path / "fastprompt" / "__init__.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / "CITATION.cff").write_text("version: 1.2.0\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n## 1.1.0 - 2026-01-01\n")
    with pytest.raises(check.Failure, match=r"1\.1\.0"):
        check.check_version()
    (tmp_path / "CHANGELOG.md").write_text("# C\n\n## [Unreleased]\n\n* more\n\n## 1.2.0 - 2026-01-01\n")
    with pytest.raises(check.Failure, match="unreleased entries"):
        check.check_version()
