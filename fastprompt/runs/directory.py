"""The files of a run directory, and whether they belong to the given settings."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastprompt.arguments import ArgumentError, ArgumentPathError
from fastprompt.fetch import cache_dir
from fastprompt.files import atomic_write
from fastprompt.hub import fetch_adapter, is_repository
from fastprompt.runs.settings import RunSettings
from fastprompt.vit.source import split_local

SETTINGS_FILE, RESULTS_FILE = "run.json", "results.json"


def json_text(value: Any) -> str:
    """Format JSON for people; escape all non-ASCII text if some of it, such as a path, is not valid UTF-8."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=1) + "\n"
    return text


HOW_TO_ADAPT = "create one with `fastprompt adapt --data FOLDER --out {}`"


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    atomic_write(path, json_text(value))


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises `ValueError` naming the file if it does not hold one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(found).__name__}")
    return found


def adapter_dir(run_dir: Path) -> Path:
    """Return the directory with the adapter's two files: `run_dir` itself or its `best/`, or one of the Hub's.

    "owner/name" is a repository of the Hugging Face Hub if there is no folder `owner` here. Its adapter is fetched,
    unless it was before.

    Raises:
        ValueError: `run_dir` is a file. FileNotFoundError: there is no adapter in it. Both errors say what to type.
        FetchError, PermissionError: a repository's adapter cannot be fetched (`fastprompt.hub.read_pretrained`).
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
        repository = run_dir.as_posix()
        if is_repository(repository) and not run_dir.parent.is_dir():
            return fetch_adapter(repository)
        runs = [path.name for path in run_dir.parent.glob("*") if (path / "run.json").exists()]
        close = difflib.get_close_matches(run_dir.name, runs, n=1)
        hint = f"did you mean {run_dir.parent / close[0]}?" if close else HOW_TO_ADAPT.format(run_dir)
        raise ArgumentPathError("adapter", f"must be a directory that exists, got {run_dir}; {hint}")
    if (run_dir / "run.json").exists():
        raise ArgumentPathError(
            "adapter",
            f"must hold an adapter; the run in {run_dir} has not finished an epoch: `fastprompt adapt --config "
            f"{run_dir / 'run.json'} --out {run_dir}` resumes it",
        )
    raise ArgumentPathError(
        "adapter",
        f"must hold adapter_config.json; neither {run_dir} nor {run_dir / 'best'} does; {HOW_TO_ADAPT.format(run_dir)}",
    )


def read_settings(run_dir: Path) -> RunSettings | None:
    """Return the settings recorded for a run directory or a run's `best/`; None if there are none."""
    for candidate in (Path(run_dir), Path(run_dir).parent):
        if (candidate / SETTINGS_FILE).exists():
            return RunSettings.from_dict(read_json(candidate / SETTINGS_FILE))
    return None


def require_same_settings(settings: RunSettings, out_dir: Path, except_for: Sequence[str] = ()) -> None:
    """Raise `ValueError` if `out_dir` holds a run with different settings.

    Args:
        except_for: fields of the recipe that may differ.
    """
    run_file = out_dir / SETTINGS_FILE
    if not run_file.exists():
        return
    # A setting that an earlier version did not have had its default value there.
    defaults = RunSettings(settings.method, settings.data).to_dict() | {"method": None, "data": None}
    wanted, there = (json.loads(json.dumps(each)) for each in (settings.to_dict(), defaults))
    there |= read_json(run_file)
    for each in (wanted, there):
        each["recipe"] = {name: value for name, value in each["recipe"].items() if name not in except_for}
    different = [key for key in sorted({*wanted, *there}) if wanted.get(key) != there.get(key)]
    if different:
        said = "; ".join(f"{key}: {there.get(key)!r} there, {wanted.get(key)!r} now" for key in different)
        raise ArgumentError(
            "out",
            f"must be a new directory or hold the same run; {out_dir} holds one with different settings "
            f"({said}): choose another directory or pass --no-resume",
        )


def inputs_stamp(settings: RunSettings) -> str:
    """Return a digest of names, sizes and times of all files that a run reads.

    If the digest is unchanged, so are the inputs. A changed digest does not imply changed contents, because files may
    have been copied or touched. For a named data set or backbone it covers the cache, or the folder of torchvision's
    sets.
    """
    from fastprompt.data.shards import split_prefix

    digest = hashlib.sha256()
    data = _task_folder(settings) or settings.data_root or cache_dir()
    sets = [split_prefix(name)[1] for name in (settings.data, *settings.more_data)]
    places: list[str | Path | None] = [*sets, data, settings.class_embeddings]
    local = split_local(settings.backbone)
    places.append(settings.backbone if local is None else local[1])
    for place in places:
        path = None if place is None else Path(place).expanduser()
        digest.update(f"{place}\n".encode("utf-8", "surrogateescape"))
        if path is not None and path.exists():
            for line in _files_below(path):
                digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _task_folder(settings: RunSettings) -> Path | None:
    """Return the folder of a protocol's task, of which the data root holds others too; None for other data."""
    if ":" not in settings.data or settings.data_root is None:
        return None
    from fastprompt.protocols import named_task

    named = named_task(settings.data)
    return None if named is None else named[1].place(Path(settings.data_root).expanduser())


def _files_below(root: Path) -> Iterator[str]:
    """Yield one line per file: path, size, times and inode. Each folder is visited once, through links too."""
    folders, seen = [root], set[tuple[int, int]]()
    while folders:
        path = folders.pop()
        try:
            status = path.stat()
        except OSError as error:  # a broken link
            yield f"{path}\t{error.errno}\n"
            continue
        if not path.is_dir():
            yield f"{path}\t{status.st_size}\t{status.st_mtime_ns}\t{status.st_ctime_ns}\t{status.st_ino}\n"
        elif (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            folders += sorted(path.iterdir(), reverse=True)
