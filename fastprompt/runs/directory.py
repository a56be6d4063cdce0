"""A run directory: which files it holds, and whose it is."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastprompt.arguments import ArgumentError, ArgumentPathError
from fastprompt.fetch import cache_dir
from fastprompt.files import atomic_write
from fastprompt.runs.settings import RunSettings
from fastprompt.vit.source import split_local

SETTINGS_FILE, RESULTS_FILE = "run.json", "results.json"


def json_text(value: Any) -> str:
    """JSON to be read by people; escaped throughout where it holds text that UTF-8 cannot, as some paths."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=1) + "\n"
    return text


HOW_TO_ADAPT = "`fastprompt adapt --data FOLDER --out {}` makes one"


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is there whole or not at all."""
    atomic_write(path, json_text(value))


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
        raise ArgumentError(
            "adapter",
            f"must be the directory of a run or an adapter, got the file {run_dir}; it comes first, as in "
            f"`fastprompt predict runs/first photo.jpg`",
        )
    for candidate in (run_dir, run_dir / "best"):
        if (candidate / "adapter_config.json").exists():
            return candidate
    if not run_dir.exists():
        runs = [path.name for path in run_dir.parent.glob("*") if (path / "run.json").exists()]
        close = difflib.get_close_matches(run_dir.name, runs, n=1)
        hint = f"did you mean {run_dir.parent / close[0]}?" if close else HOW_TO_ADAPT.format(run_dir)
        raise ArgumentPathError("adapter", f"must be a directory that exists, got {run_dir}; {hint}")
    if (run_dir / "run.json").exists():
        raise ArgumentPathError(
            "adapter",
            f"must hold an adapter; the run in {run_dir} has not finished an epoch: `fastprompt adapt --config "
            f"{run_dir / 'run.json'} --out {run_dir}` goes on with it",
        )
    raise ArgumentPathError(
        "adapter",
        f"must hold adapter_config.json; neither {run_dir} nor {run_dir / 'best'} does; {HOW_TO_ADAPT.format(run_dir)}",
    )


def read_settings(run_dir: Path) -> RunSettings | None:
    """The settings of the run that a directory (or a run's `best/`) belongs to; None: none are recorded."""
    for candidate in (Path(run_dir), Path(run_dir).parent):
        if (candidate / SETTINGS_FILE).exists():
            return RunSettings.from_dict(read_json(candidate / SETTINGS_FILE))
    return None


def require_same_settings(settings: RunSettings, out_dir: Path) -> None:
    """Raise `ValueError` where `out_dir` holds a run with other settings."""
    run_file = out_dir / SETTINGS_FILE
    if not run_file.exists():
        return
    # A setting that the version which wrote the file did not have is the one it ran with, the default.
    defaults = RunSettings(settings.method, settings.data).to_dict() | {"method": None, "data": None}
    wanted, there = json.loads(json.dumps(settings.to_dict())), defaults | read_json(run_file)
    different = [key for key in sorted({*wanted, *there}) if wanted.get(key) != there.get(key)]
    if different:
        said = "; ".join(f"{key}: {there.get(key)!r} there, {wanted.get(key)!r} now" for key in different)
        raise ArgumentError(
            "out",
            f"must be a new directory or hold the same run; {out_dir} holds one with other settings "
            f"({said}): take another directory or --no-resume",
        )


def inputs_stamp(settings: RunSettings) -> str:
    """A digest of names, sizes and times of all files that a run reads: while it stays the same, so do its inputs.

    A digest that changed says nothing of the contents: files that were copied or touched have another one. Of a named
    data set or backbone it covers the cache, or the folder in which torchvision's sets are kept.
    """
    digest = hashlib.sha256()
    places = [settings.data, settings.data_root or cache_dir(), settings.class_embeddings]
    local = split_local(settings.backbone)
    places.append(settings.backbone if local is None else local[1])
    for place in places:
        path = None if place is None else Path(place).expanduser()
        digest.update(f"{place}\n".encode("utf-8", "surrogateescape"))
        if path is not None and path.exists():
            for line in _files_below(path):
                digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _files_below(root: Path) -> Iterator[str]:
    """A line for a file, or for each in a folder: path, size, times and number. Links to folders are followed once."""
    folders, seen = [root], set[tuple[int, int]]()
    while folders:
        path = folders.pop()
        try:
            status = path.stat()
        except OSError as error:  # a link to nowhere
            yield f"{path}\t{error.errno}\n"
            continue
        if not path.is_dir():
            yield f"{path}\t{status.st_size}\t{status.st_mtime_ns}\t{status.st_ctime_ns}\t{status.st_ino}\n"
        elif (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            folders += sorted(path.iterdir(), reverse=True)
