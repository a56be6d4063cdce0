"""What a release has to pass: `make release-check`, or with ONLY="dist wheel" some of it.

Each step says what it does, all steps run even if one fails, and the exit status is 1 if any did. `python
release/check.py --list` lists the steps.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEAST = (3, 10)
OLDEST_PINS = (3, 12)
"""Newest Python for which the versions of `constraints-oldest.txt` have wheels."""


class Failure(Exception):
    """A step failed; the text says why."""


@dataclass(frozen=True)
class Step:
    """One step: a word, what it does, and the function that does it, which raises `Failure`."""

    name: str
    says: str
    do: Callable[[], None]


def run(*words: str | Path, cwd: Path = ROOT) -> None:
    """Run a command, whose output is shown; raise `Failure` if it fails. Nothing of this checkout is on its path."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = subprocess.run([str(word) for word in words], cwd=cwd, env=clean).returncode
    if code:
        raise Failure(f"`{' '.join(map(str, words))}` ended with {code}")


def make(target: str) -> Callable[[], None]:
    """Return a function that makes a target, in this environment."""
    return lambda: run("make", "--no-print-directory", target, f"VENV={sys.prefix}")


def pythons(candidates: Iterable[Path]) -> dict[tuple[int, int], Path]:
    """Return the interpreters that can create an environment, by version from 3.10 on; the first of each version."""
    found: dict[tuple[int, int], Path] = {}
    code = "import ensurepip, sys, venv; print(*sys.version_info[:2])"
    for path in candidates:
        ran = subprocess.run([path, "-c", code], capture_output=True, text=True)
        if ran.returncode == 0:
            major, minor = map(int, ran.stdout.split())
            if (major, minor) >= LEAST:
                found.setdefault((major, minor), path)
    return dict(sorted(found.items()))


def installed_pythons() -> list[Path]:
    """Return the interpreters of PATH and of pyenv."""
    names = re.compile(r"python3(\.\d+)?")
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    folders += sorted((Path.home() / ".pyenv" / "versions").glob("*/bin"))
    return [
        path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if names.fullmatch(path.name)
    ]


def check_version() -> None:
    """Compare the version of package, changelog and citation, and ask git for changes and an earlier tag."""
    texts = {
        name: (ROOT / name).read_text(encoding="utf-8")
        for name in ("fastprompt/__init__.py", "CHANGELOG.md", "CITATION.cff")
    }
    version = re.search(r'^__version__ = "(.+)"$', texts["fastprompt/__init__.py"], re.MULTILINE)
    cited = re.search(r"^version: (\S+)$", texts["CITATION.cff"], re.MULTILINE)
    released = re.search(r"^## (\d\S*) - \d{4}-\d{2}-\d{2}$", texts["CHANGELOG.md"], re.MULTILINE)
    stated = {found[1] if found else None for found in (version, cited, released)}
    if len(stated) > 1 or None in stated:
        raise Failure(f"package, CITATION.cff and the newest dated entry of CHANGELOG.md state {stated}")
    pending = texts["CHANGELOG.md"].partition("## [Unreleased]")[2].partition("\n## ")[0].strip()
    if pending:
        raise Failure("CHANGELOG.md has unreleased entries: move them under a version with a date")
    changes = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    if changes.stdout.strip():
        raise Failure(f"the checkout has changes:\n{changes.stdout}")
    tags = subprocess.run(["git", "tag", "--list", f"v{stated.pop()}"], cwd=ROOT, capture_output=True, text=True)
    if tags.stdout.strip():
        raise Failure(f"the tag {tags.stdout.strip()} exists already: raise the version")


def built(pattern: str) -> Path:
    """Return the one file of `dist/` that matches."""
    found = sorted((ROOT / "dist").glob(pattern))
    if len(found) != 1:
        raise Failure(f"dist/ must hold one {pattern}, got {[path.name for path in found]}: run the step dist first")
    return found[0]


def install(archive: Callable[[], Path], oldest: bool) -> Callable[[], None]:
    """Return a function that installs an archive into a new environment and runs `smoke.py` there.

    oldest: with the oldest Python found and the oldest versions allowed; else the newest Python and versions.
    """

    def do() -> None:
        file = archive()
        found = pythons(installed_pythons())
        if oldest:
            found = {version: path for version, path in found.items() if version <= OLDEST_PINS}
        if not found:
            raise Failure("no suitable Python with venv was found")
        version = min(found) if oldest else max(found)
        pins = ["-c", str(ROOT / "constraints-oldest.txt")] if oldest else []
        print(f"Python {version[0]}.{version[1]}, {found[version]}", flush=True)
        with tempfile.TemporaryDirectory(prefix="fastprompt-release-") as folder:
            python = Path(folder) / "venv" / "bin" / "python"
            run(found[version], "-m", "venv", Path(folder) / "venv")
            flags = os.environ.get("PIP_FLAGS", "").split()
            run(python, "-m", "pip", "install", "-qq", *flags, *pins, "setuptools>=77", "torch")
            run(python, "-m", "pip", "install", "-qq", *flags, *pins, "--no-build-isolation", file)
            run(python, "-m", "pip", "check")
            shutil.copy2(Path(__file__).with_name("smoke.py"), folder)
            (Path(folder) / "work").mkdir()
            run(python, Path(folder) / "smoke.py", Path(folder) / "work", cwd=Path(folder))

    return do


def wheel() -> Path:
    """Return the built wheel, which must be one for every Python."""
    return built("fastprompt-*-cp310-abi3-*.whl")


def sdist() -> Path:
    """Return the built source distribution."""
    return built("fastprompt-*.tar.gz")


STEPS = (
    Step(
        "version",
        "package, changelog and citation state one version; nothing is uncommitted, no such tag",
        check_version,
    ),
    Step("dist", "build sdist and abi3 wheel, and check them as PyPI does", make("dist")),
    Step("wheel-oldest", "install the wheel with the oldest Python and versions, and use it", install(wheel, True)),
    Step("wheel-newest", "install the wheel with the newest Python and versions, and use it", install(wheel, False)),
    Step("sdist", "build and install the sdist with the newest Python and versions, and use it", install(sdist, False)),
    Step("test", "ruff, mypy and the whole suite", make("test")),
    Step("test-long", "the slow variants that `make test` leaves out", make("test-long")),
    Step("test-oldest", "kernels and engine with the oldest versions allowed", make("test-oldest")),
    Step("gates", "every gate of the Triton kernels", make("gates")),
    Step("docs", "build the documentation; warnings are errors", make("docs")),
    Step("browser", "the client's page and the web demo in Chromium", make("browser")),
    Step("torture", "kills, full disks, flipped bits, hostile clients", make("torture")),
    Step("demo", "from one command to a report", make("demo")),
)


def check(steps: Sequence[Step]) -> int:
    """Run steps in order, print a summary, and return the number of failures."""
    results: list[tuple[Step, str, float]] = []
    for number, step in enumerate(steps, 1):
        print(f"\n[{number}/{len(steps)}] {step.name}: {step.says}", flush=True)
        began, problem = time.monotonic(), ""
        try:
            step.do()
        except (Failure, OSError) as error:
            problem = str(error) or type(error).__name__
            print(f"FAILED: {problem}", flush=True)
        results.append((step, problem, time.monotonic() - began))
    print()
    for step, problem, seconds in results:
        why = problem.partition("\n")[0]
        print(f"{'failed' if problem else 'passed'}  {step.name:<13} {seconds:6.0f} s  {why}")
    failures = sum(bool(problem) for _, problem, _ in results)
    print(f"{len(results) - failures} passed, {failures} failed")
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen steps; returns 1 if one failed."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", default=names)
    parser.add_argument("--skip", nargs="+", choices=names, metavar="STEP", default=[])
    parser.add_argument("--list", action="store_true", help="list the steps and end")
    args = parser.parse_args(arguments)
    chosen = [step for step in STEPS if step.name in args.only and step.name not in args.skip]
    if args.list:
        for step in chosen:
            print(f"{step.name:<13} {step.says}")
        return 0
    return 1 if check(chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
