"""Stages that watch the kernels with the vendor's tools: hardware counters, memory errors and races."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

from gpu import OPS
from gpu.device import Place
from gpu.jobs import Job, NotRun, Row

LARGEST = (
    ("prefix_attention", "_prefix_attention_fwd"),
    ("prefix_attention", "_prefix_attention_bwd_tokens"),
    ("adaptive_prompts", "_adaptive_prompts_mix"),
)
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "DRAM",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of DRAM's peak",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "% of the processors' peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% of warps active",
}
CHECKERS = ("memcheck", "racecheck")
REFUSED = re.compile(r"not supported|LibraryNotLoaded|ERR_NVGPUCTRPERM|permission|Failed to initialize", re.IGNORECASE)
"""What the tools say where a virtual device or its driver does not let them in."""


def counters(place: Place) -> Iterator[Job]:
    """Counters of the largest kernels at the papers' size, in bfloat16."""
    for op, kernel in LARGEST:
        yield Job({"kernel": kernel}, lambda op=op, kernel=kernel: counted(place, op, kernel))


def counted(place: Place, op: str, kernel: str) -> Row:
    command = [*tool("ncu"), "--clock-control", "none", "--csv", "--metrics", ",".join(METRICS)]
    command += ["--kernel-name", f"regex:^{kernel}$", *launched(op, "bfloat16", "large")]
    ran = subprocess.run(command, capture_output=True, text=True)
    table = ran.stdout[ran.stdout.find('"ID"') :]
    rows = list(csv.DictReader(table.splitlines())) if '"ID"' in ran.stdout else []
    if ran.returncode or not rows:
        raise problem(ran.stdout + ran.stderr)
    last = [row for row in rows if row["ID"] == rows[-1]["ID"]]
    return {
        METRICS[row["Metric Name"]]: f"{row['Metric Value']} {row['Metric Unit'].strip('%')}".strip() for row in last
    }


def sanitizer(place: Place) -> Iterator[Job]:
    """Every kernel in the gates' sizes under each checker; both at the same time."""
    running: dict[str, subprocess.Popen[str]] = {}

    def check(checker: str) -> Row:
        found = tool("compute-sanitizer")
        for name in CHECKERS if not running else ():
            command = [*found, "--tool", name, "--error-exitcode", "7", *launched(",".join(OPS), "float16", "small")]
            running[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            printed = running[checker].communicate(timeout=max(place.until - time.time(), 0.1))[0]
        except subprocess.TimeoutExpired:
            raise NotRun("it did not finish") from None
        if running[checker].returncode == 0:
            return {"found": "nothing"}
        raise problem(printed)

    for checker in CHECKERS:
        yield Job({"checker": checker}, lambda checker=checker: check(checker))


def tool(name: str) -> list[str]:
    """The command, if it is installed."""
    found = shutil.which(name)
    if found is None:
        raise NotRun(f"{name} is not installed")
    return [found]


def launched(ops: str, dtype: str, which: str) -> list[str]:
    """The command that launches the kernels of some ops and nothing else."""
    return [sys.executable, "-m", "gpu.ops", ops, dtype, which]


def problem(printed: str) -> Exception:
    """What a tool's output means: that it cannot run here, or that something is wrong."""
    refused = REFUSED.search(printed)
    if refused:
        line = next(line for line in printed.splitlines() if refused.group() in line)
        return NotRun(line.strip())
    return AssertionError(printed[-6000:])
