"""Run the stages: see the package. This process imports nothing but the standard library, so that it outlives them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpu import ROOT, table

PATHS = [str(ROOT / part) for part in (".", "bench", "tests/support", "tests/kernels/gates")]
MARGIN = 3.0  # seconds before its end at which a stage starts nothing more


class Stage(NamedTuple):
    """A part of a run and how long it may take."""

    name: str
    seconds: float


FIRST = (
    Stage("device", 15),
    Stage("compile", 60),
    Stage("parity", 80),
    Stage("graphs", 30),
    Stage("ops", 80),
    Stage("end to end", 130),
    Stage("training", 60),
    Stage("mixed batches", 30),
    Stage("counters", 30),
)
LONG = (Stage("sanitizer", 150), Stage("autotuned", 360))
WORKER = (sys.executable, "-m", "gpu.worker")


def run(stages: Sequence[Stage], out: Path, options: Sequence[str] = (), worker: Sequence[str] = WORKER) -> int:
    """Run the stages, write `out` as .json and .md after each, and return the number of failures.

    Args:
        options: for the worker. "--dry-run": all stages in one process, without a limit.
        worker: the command that runs stages.
    """
    began = ends = time.time()
    out.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"system": platform.platform(), "dry_run": "--dry-run" in options, "stages": {}}
    groups = [list(stages)] if report["dry_run"] else [[stage] for stage in stages]
    for group in groups:
        ends += sum(stage.seconds for stage in group)
        report["stages"] |= _run(group, float("inf") if report["dry_run"] else ends, [*worker, *options])
        report |= {"seconds": round(time.time() - began, 1), "failures": count_failures(report)}
        table.write(out.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
        table.write(out.with_suffix(".md"), table.page(report))
        for stage in group:
            print(table.line(stage.name, report["stages"][stage.name]), flush=True)
    print(f"{report['failures']} failures in {report['seconds']:.0f} s: {out.with_suffix('.md')}")
    return report["failures"]


def _run(group: Sequence[Stage], ends: float, command: Sequence[str]) -> dict[str, Any]:
    """Run the stages in one process until `ends`, and return their records, whatever becomes of it."""
    before = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*PATHS, *([before] if before else [])])}
    environment.setdefault("MKL_CBWR", "COMPATIBLE")  # PyTorch's errors, and with them budgets, as in the suite
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder, "rows"), Path(folder, "log")
        rows.touch()
        names = [stage.name for stage in group]
        began = time.time()
        with log.open("w") as stream:
            process = subprocess.Popen(
                [*command, "--rows", str(rows), "--until", str(ends - MARGIN), *names],
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(None if ends == float("inf") else max(ends - time.time(), 0.1))
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _kill(process)
        found = _read(rows)
        ended = "" if status == 0 else "it was stopped" if status is None else f"its process ended with status {status}"
        said = "" if status == 0 else log.read_text(errors="replace")[-4000:]
    seconds = round(time.time() - began, 1)
    return {
        stage.name: {
            "seconds": seconds,
            "limit": stage.seconds,
            "ended": ended,
            "log": said,
            "rows": [{k: v for k, v in row.items() if k != "stage"} for row in found if row["stage"] == stage.name],
        }
        for stage in group
    }


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started."""
    if hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.kill()
    process.wait()


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the rows that were written whole."""
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def count_failures(report: dict[str, Any]) -> int:
    """Count rows that failed or are wrong, and stages that did not end by themselves."""
    records = report["stages"].values()
    return sum(bool(record["ended"]) + sum("failed" in row for row in record["rows"]) for record in records)


def main(arguments: Sequence[str] | None = None) -> int:
    names = [stage.name for stage in (*FIRST, *LONG)]
    parser = argparse.ArgumentParser(prog="gpu", description="Measure what only a GPU can show; see bench/gpu.")
    parser.add_argument("--long", action="store_true", help="the second call: compute-sanitizer and autotuned models")
    parser.add_argument("--dry-run", action="store_true", help="the same way without a GPU, in Triton's interpreter")
    parser.add_argument("--stage", action="append", choices=names, help="only this stage; default all of the call")
    parser.add_argument("--out", type=Path, help="without suffix; default results/gpu, with --long results/gpu_long")
    given = parser.parse_args(arguments)
    if given.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--dry-run runs in Triton's interpreter: set TRITON_INTERPRET=1")
    if not given.dry_run and os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the kernels would not run on the GPU")
    stages = LONG if given.long else FIRST
    if given.stage:
        stages = tuple(stage for stage in (*FIRST, *LONG) if stage.name in given.stage)
    out = given.out or ROOT / "results" / ("gpu_long" if given.long else "gpu")
    return min(run(stages, out, ["--dry-run"] if given.dry_run else []), 1)


if __name__ == "__main__":
    sys.exit(main())
