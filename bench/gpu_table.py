"""Write the documentation's table of GPU times from results/gpu.json.

    python bench/gpu_table.py GPU.json docs/results.md

The text between the two `gpu` comments of the page is replaced.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastprompt.files import atomic_write

BEGIN, END = "<!-- gpu: written by `make gpu` -->\n", "<!-- /gpu -->\n"
COLUMNS = ("triton", "eager", "compile, default", "compile, reduce-overhead", "compile, max-autotune")


def cell(times: Mapping[str, Mapping[str, float] | None], name: str) -> str:
    """Format median and quartiles."""
    if name not in times:
        return ""
    value = times[name]
    return "no time left" if value is None else f"{value['median']:.1f} ({value['low']:.1f}–{value['high']:.1f})"


def table(report: Mapping[str, Any]) -> str:
    """Return the text between the comments."""
    stack = f"torch {report['torch']}, Triton {report['triton']}"
    lines = [
        f"Measured by `make gpu` on {report['device']} ({stack}): every op and gradient is within twice PyTorch's own "
        "error of float64 in three dtypes, two runs give the same bits, and so does a replayed CUDA graph; "
        f"{report['sanitizer']}. Microseconds in bfloat16, medians and quartiles of interleaved rounds; eager and "
        "compiled is the PyTorch reference, for `prefix_attention` scaled_dot_product_attention on concatenated keys "
        "and values.",
        "",
        f"| Op, size | Batch | Job | {' | '.join(COLUMNS)} |",
        "|---|---:|---|" + "---:|" * len(COLUMNS),
    ]
    notes = []
    for op, found in report["ops"].items():
        for batch, runs in found["microseconds"].items():
            for run, job in ((run, job) for run in runs for job in ("forward", "forward and backward")):
                cells = " | ".join(cell(run[job], column) for column in COLUMNS)
                lines.append(f"| `{op}`, {run['case']} | {batch} | {job} | {cells} |")
                notes += [
                    f"`{op}`, {run['case']}, batch {batch}, {job}: {name} takes {cell(run[job], name)} µs."
                    for name in run[job]
                    if name not in COLUMNS
                ]
    return "\n".join([*lines, "", *notes, ""])


def main(source: str, page: str) -> None:
    report = json.loads(Path(source).read_text(encoding="utf-8"))
    if report["dry_run"]:
        raise SystemExit(f"{source} comes from a dry run; its times say nothing")
    text = Path(page).read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{page} has no place for the table: {BEGIN.strip()} and {END.strip()}")
    before, rest = text.split(BEGIN)
    atomic_write(page, before + BEGIN + table(report) + END + rest.split(END)[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
