"""Pack the records of a table's runs: `python experiments/records.py pack RUNS RECORDS`, and `unpack RECORDS RUNS`.

A run directory holds settings and results as JSON (`FILES`), beside its adapter and state. For the runs of a table,
only the JSON is kept under version control, in two files:

* `RECORDS.jsonl`, one sorted line per run: `{"run": "pgn/lr0.01-seed0", "files": {"run.json": {...}, ...}}`;
* `RECORDS.npz`, the long lists of numbers in it, which have one number per image or library token; equal lists are kept
  once. `{"vector": NAME}` replaces the list in the line.

Packing is lossless: unpacked files equal the packed ones byte for byte. `make table` and `make pixels` unpack the runs
that have no run directory, continue from there, and pack the results.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastprompt.files import atomic_write_many
from fastprompt.runs.directory import read_json

FILES = ("run.json", "results.json", "diverged.json", "pictures.json")
FINISHED = {"results.json", "diverged.json"}
"""A finished run has one of these; other runs are left out."""
LONG = 32
"""Minimum length of a list that is kept as a vector."""


def pack(runs: Path, records: Path) -> list[str]:
    """Write the JSON of the finished runs below `runs` to `records`.jsonl and `records`.npz; return the runs' names.

    Raises:
        ValueError: a file could not be restored exactly. Nothing is written.
    """
    vectors: dict[str, np.ndarray] = {}
    lines, names = [], []
    for directory in sorted({path.parent for name in FINISHED for path in runs.rglob(name)}):
        files = {}
        for name in FILES:
            path = directory / name
            if path.exists():
                files[name] = without_vectors(read_json(path), vectors)
                if path.read_text(encoding="utf-8") != as_written(with_vectors(files[name], vectors)):
                    raise ValueError(f"{path} could not be restored exactly: `write_json` did not write it")
        names.append(directory.relative_to(runs).as_posix())
        lines.append(json.dumps({"run": names[-1], "files": files}, ensure_ascii=False, separators=(",", ":")) + "\n")
    packed = io.BytesIO()
    np.savez_compressed(packed, **dict(sorted(vectors.items())))
    atomic_write_many(
        records.parent, {f"{records.name}.npz": packed.getvalue(), f"{records.name}.jsonl": "".join(lines)}
    )
    return names


def unpack(records: Path, runs: Path) -> list[str]:
    """Write the missing run directories below `runs` and return their names.

    An existing directory is left alone whatever it holds, because a run may be in progress in it.

    Raises:
        FileNotFoundError: there are no such records.
        ValueError: a record names a vector that does not exist.
    """
    with np.load(records.with_name(f"{records.name}.npz")) as stored:
        vectors = {name: stored[name] for name in stored.files}
    missing: dict[str, dict[str, Any]] = {}
    for line in records.with_name(f"{records.name}.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if not (runs / record["run"]).exists():
            missing[record["run"]] = {name: with_vectors(value, vectors) for name, value in record["files"].items()}
    for run, files in missing.items():
        atomic_write_many(runs / run, {name: as_written(value) for name, value in files.items()})
    return list(missing)


def as_written(value: Any) -> str:
    """Return the text that `write_json` writes."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def without_vectors(value: Any, vectors: dict[str, np.ndarray]) -> Any:
    """Move the long lists of numbers in `value` to `vectors`, named by the digests of their contents."""
    if isinstance(value, dict):
        return {key: without_vectors(item, vectors) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    vector = vector_of(value)
    if vector is None:
        return [without_vectors(item, vectors) for item in value]
    name = hashlib.sha256(f"{vector.dtype} ".encode() + vector.tobytes()).hexdigest()[:16]
    vectors[name] = vector
    return {"vector": name}


def vector_of(value: list[Any]) -> np.ndarray | None:
    """Convert a long list of integers or floats to the narrowest exact array; return None for other lists."""
    kinds = {type(item) for item in value}
    if len(value) < LONG:
        return None
    if kinds == {float}:
        return np.array(value, dtype=np.float64)
    for dtype in (np.uint8, np.int16, np.int32, np.int64) if kinds == {int} else ():
        if np.iinfo(dtype).min <= min(value) and max(value) <= np.iinfo(dtype).max:
            return np.array(value, dtype=dtype)
    return None


def with_vectors(value: Any, vectors: dict[str, np.ndarray]) -> Any:
    """The inverse of `without_vectors`."""
    if isinstance(value, list):
        return [with_vectors(item, vectors) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {"vector"}:
        return {key: with_vectors(item, vectors) for key, item in value.items()}
    if value["vector"] not in vectors:
        raise ValueError(f"records must hold the vector {value['vector']!r}")
    return vectors[value["vector"]].tolist()


def main(arguments: Sequence[str] | None = None) -> int:
    """Pack or unpack, and print the number of runs."""
    p = argparse.ArgumentParser(prog="experiments/records.py", description=(__doc__ or "").split("\n")[0])
    p.add_argument("action", choices=["pack", "unpack"])
    p.add_argument("source", type=Path, help="run directories, or records without their suffix")
    p.add_argument("target", type=Path, help="records without their suffix, or parent of the run directories")
    args = p.parse_args(arguments)
    try:
        done = (pack if args.action == "pack" else unpack)(args.source, args.target)
    except (OSError, ValueError) as error:
        print(f"records: error: {error}", file=sys.stderr)
        return 1
    print(f"{len(done)} runs {args.action}ed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
