"""Write results/forward.md from the measurements of `bench_forward.py`.

python bench/forward_table.py BENCHMARK.json OUT.md"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BASELINE = "papers' graph, float32 eager"
ROWS = (
    "rewritten, float32 eager",
    "papers' graph, bfloat16 eager",
    "papers' graph, bfloat16 compiled",
    "rewritten, bfloat16 eager",
    "rewritten, bfloat16 compiled",
)
GOALS = {  # at 10, 50 and 100 prompts
    ("inference", "float32"): (2.2, 2.5, 3.1),
    ("training", "float32"): (1.9, 2.3, 3.0),
    ("inference", "bfloat16"): (4.6, 4.8, 6.0),
    ("training", "bfloat16"): (3.8, 4.4, 5.7),
}
EQUAL = {"inference": (1.0, 1.0, 1.0), "training": (1.1, 1.3, 1.55)}  # bfloat16 against bfloat16


def ratio(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float, float]:
    """Return the median over rounds of slow / fast, and the range without the lowest and the highest round."""
    ratios = sorted(s / f for s, f in zip(slow, fast, strict=True))
    return statistics.median(ratios), ratios[1], ratios[-2]


def cell(value: tuple[float, float, float], goal: float | None) -> str:
    """Format a ratio with its interval, and say whether the upper end reaches the goal."""
    text = f"{value[0]:.2f} ({value[1]:.2f}–{value[2]:.2f})"
    return text if goal is None else f"{text} {'≥' if value[2] >= goal else '**<**'} {goal:g}"


def better(seconds: Mapping[str, Sequence[float]], graph: str) -> Sequence[float]:
    """Return the rounds of the faster bfloat16 way of a graph, eager or compiled."""
    return min((seconds[f"{graph}, bfloat16 {way}"] for way in ("eager", "compiled")), key=statistics.median)


def table(benchmarks: Sequence[Mapping[str, Any]], job: str) -> list[str]:
    """Return the lines of one job's table."""
    runs = sorted(
        (b["extra_info"] for b in benchmarks if b["extra_info"]["job"] == job), key=lambda run: run["num_prompts"]
    )
    columns = [str(run["num_prompts"]) for run in runs]
    lines = [f"| {job}, prompts | {' | '.join(columns)} |", "|---|" + "---:|" * len(runs)]
    base = [run["batch"] / statistics.median(run["seconds"][BASELINE]) for run in runs]
    lines.append(f"| {BASELINE}, images/s | {' | '.join(f'{value:.1f}' for value in base)} |")
    for row in ROWS:
        graph, dtype, _ = row.replace(",", "").rsplit(" ", 2)
        goals = GOALS[job, dtype] if graph == "rewritten" else (None,) * len(runs)
        cells = [
            cell(ratio(run["seconds"][BASELINE], run["seconds"][row]), goal)
            for run, goal in zip(runs, goals, strict=True)
        ]
        lines.append(f"| {row}, × | {' | '.join(cells)} |")
    for way in ("eager", "compiled"):
        ours = f"rewritten, bfloat16 {way}"
        cells = [
            cell(ratio(better(run["seconds"], "papers' graph"), run["seconds"][ours]), goal)
            for run, goal in zip(runs, EQUAL[job], strict=True)
        ]
        lines.append(f"| {ours}, × the better of the papers' two in bfloat16 | {' | '.join(cells)} |")
    if job == "training":
        eager, lean = (f"rewritten, bfloat16 eager{way}" for way in ("", ", blocks recomputed"))
        cells = ["{:.2f} ({:.2f}–{:.2f})".format(*ratio(run["seconds"][lean], run["seconds"][eager])) for run in runs]
        lines.append(f"| {lean}: its time, × that of the same without (goal: at most 1.4) | {' | '.join(cells)} |")
    return [*lines, ""]


def main(source: Path, out: Path) -> None:
    """Write the tables."""
    report = json.loads(source.read_text())
    info = report["benchmarks"][0]["extra_info"]
    machine = report["machine_info"]["cpu"].get("brand_raw", "unknown CPU")
    flags = report["machine_info"]["cpu"].get("flags", ())
    units = ", ".join(name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags)
    lines = [
        "# VPT-deep on ViT-B/16, 224 px: the rewritten graph and the papers'",
        "",
        f"`make bench-forward` on {machine} ({units}), {info['threads']} threads, torch {info['torch']}, batch "
        f"{info['batch']}, random weights. Medians over {len(info['seconds'][BASELINE])} interleaved rounds, in "
        "brackets the rounds but the lowest and the highest. × is times as fast as the papers' graph in float32 "
        "eager, or as what the row names. Behind a ratio stands the goal: ≥ where the interval's upper end reaches "
        "it. Compiled is `torch.compile`, at inference with freezing.",
        "",
        *table(report["benchmarks"], "inference"),
        *table(report["benchmarks"], "training"),
    ]
    out.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
