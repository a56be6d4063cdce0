"""A run directory: which files it holds, and whose it is."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprompt.runs.settings import RunSettings

if TYPE_CHECKING:
    pass


HOW_TO_ADAPT = "`fastprompt adapt --data FOLDER --out {}` makes one"


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is there whole or not at all."""
    from fastprompt.files import atomic_write

    atomic_write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `ValueError` naming the file where it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not a JSON object")
    return found


def adapter_dir(run_dir: Path) -> Path:
    """The directory with the adapter's two files: the one given, or its `best/`.

    Raises:
        ValueError: `run_dir` is a file. FileNotFoundError: there is no adapter in it. Both say what to type.
    """
    run_dir = Path(run_dir)
    if run_dir.is_file():
        raise ValueError(
            f"adapter: must be the directory of a run or an adapter, got the file {run_dir}; it comes first, as in "
            f"`fastprompt predict runs/first photo.jpg`"
        )
    for candidate in (run_dir, run_dir / "best"):
        if (candidate / "adapter_config.json").exists():
            return candidate
    if not run_dir.exists():
        runs = [path.name for path in run_dir.parent.glob("*") if (path / "run.json").exists()]
        close = difflib.get_close_matches(run_dir.name, runs, n=1)
        hint = f"did you mean {run_dir.parent / close[0]}?" if close else HOW_TO_ADAPT.format(run_dir)
        raise FileNotFoundError(f"adapter: {run_dir} does not exist; {hint}")
    if (run_dir / "run.json").exists():
        raise FileNotFoundError(
            f"adapter: the run in {run_dir} has not finished an epoch; `fastprompt adapt --config "
            f"{run_dir / 'run.json'} --out {run_dir}` goes on with it"
        )
    raise FileNotFoundError(
        f"adapter: neither {run_dir} nor {run_dir / 'best'} holds adapter_config.json; {HOW_TO_ADAPT.format(run_dir)}"
    )


def read_settings(run_dir: Path) -> RunSettings | None:
    """The settings of the run that a directory (or a run's `best/`) belongs to; None: none are recorded."""
    for candidate in (Path(run_dir), Path(run_dir).parent):
        if (candidate / "run.json").exists():
            return RunSettings.from_dict(read_json(candidate / "run.json"))
    return None


def finished_results(settings: RunSettings, out_dir: Path, resume: bool) -> dict[str, Any] | None:
    """The results of a run with these settings that is already finished in `out_dir`; None: there is none.

    Raises `ValueError` where `out_dir` is a file, or holds a run with other settings and `resume` is set.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"out: {out_dir} is a file, a directory is needed")
    wanted = json.loads(json.dumps(settings.to_dict()))
    run_file, result_file = out_dir / "run.json", out_dir / "results.json"
    if resume and run_file.exists():
        there = {"on_bad": "error", **read_json(run_file)}  # runs from before there was a choice
        different = [k for k in sorted({*wanted, *there}) if wanted.get(k) != there.get(k)]
        if different:
            said = "; ".join(f"{k}: {there.get(k)!r} there, {wanted.get(k)!r} now" for k in different)
            raise ValueError(
                f"out: {out_dir} holds a run with other settings ({said}); take another directory or --no-resume"
            )
        if result_file.exists():
            return read_json(result_file)
    return None


@contextlib.contextmanager
def claimed(settings: RunSettings, out_dir: Path) -> Iterator[None]:
    """`out_dir` is these settings' from here on, unless wrong input ends the run before it wrote anything."""
    made = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    write_json(out_dir / "run.json", settings.to_dict())
    (out_dir / "results.json").unlink(missing_ok=True)
    try:
        yield
    except (ValueError, TypeError):
        if [path.name for path in out_dir.iterdir()] == ["run.json"]:
            (out_dir / "run.json").unlink()
            if made:
                out_dir.rmdir()
        raise
