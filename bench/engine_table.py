"""Write results/engine.md and the documentation's table of engines from the measurements of `bench_engine.py`.

    python bench/engine_table.py BENCHMARK.json OUT.md docs/results.md

In the page, the text between the two `engine` comments is replaced.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forward_table import cell, ratio

from fastprompt.files import atomic_write

BEGIN, END = "<!-- engine: written by `make bench-engine` -->\n", "<!-- /engine -->\n"
FLOAT32, COMPILED, OPENVINO, RUNTIME = (
    "papers' graph, float32 eager",
    "papers' graph, bfloat16 compiled",
    "papers' graph, bfloat16 OpenVINO",
    "papers' graph, float32 ONNX Runtime",
)
GOALS = {  # engine against each baseline, by number of prompts, at batch 8
    ("VPT-deep", FLOAT32): {10: 5.6, 50: 5.5, 100: 7.2},
    ("VPT-deep", COMPILED): {10: 1.3, 50: 1.5, 100: 1.75},
    ("VPT-deep", OPENVINO): {10: 1.1, 50: 1.25, 100: 1.5},
    ("VPT-deep", RUNTIME): {10: 1.1, 50: 1.3, 100: 1.55},
    ("VAPT", OPENVINO): {10: 1.08, 50: 1.2, 100: 1.38},
    ("VAPT", RUNTIME): {10: 1.08, 50: 1.25, 100: 1.4},
    ("PGN", OPENVINO): {16: 1.05},
}
CEILING = 0.88
"""Of the FLOP/s of the fastest oneDNN product, for the FLOPs that the rewritten forward executes."""


def fastest(seconds: Mapping[str, Sequence[float]], dtype: str) -> str:
    """Return the engine's backend with the lowest median in this number format."""
    return min(
        (name for name in seconds if name.startswith(f"Engine, {dtype}")),
        key=lambda name: statistics.median(seconds[name]),
    )


def one_adapter(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of one method's table at one batch size."""
    method, batch = runs[0]["method"], runs[0]["batch"]
    columns = [str(run["num_prompts"]) for run in runs]
    lines = [f"| {method}, batch {batch}, prompts | {' | '.join(columns)} |", "|---|" + "---:|" * len(runs)]
    for name in runs[0]["seconds"]:
        cells = [f"{1000 * statistics.median(run['seconds'][name]):.1f}" for run in runs]
        lines.append(f"| {name}, ms | {' | '.join(cells)} |")
    for name in (FLOAT32, COMPILED, OPENVINO, RUNTIME):
        if name not in runs[0]["seconds"]:
            continue
        dtype, cells = "float32" if name == RUNTIME else "bfloat16", []
        for run in runs:
            ours = fastest(run["seconds"], dtype)
            goal = GOALS.get((method, name), {}).get(run["num_prompts"]) if batch == 8 else 1.0
            cells.append(f"{cell(ratio(run['seconds'][name], run['seconds'][ours]), goal)}, {ours.split()[-1]}")
        lines.append(f"| the engine in {dtype}, × {name} | {' | '.join(cells)} |")
    cells = []
    for run in runs:
        ours = run["seconds"][fastest(run["seconds"], "bfloat16")]
        ceiling = [max(rates.values()) for rates in run["product_rates"]]
        parts = sorted(run["flops"] / (rate * s) for rate, s in zip(ceiling, ours, strict=True))
        goal = f" {'≥' if parts[-2] >= CEILING else '**<**'} {CEILING:.0%}" if batch == 8 else ""
        cells.append(
            f"{statistics.median(parts):.0%} ({parts[1]:.0%}–{parts[-2]:.0%}) of "
            f"{statistics.median(ceiling) / 1e12:.2f} TFLOP/s{goal}"
        )
    lines.append(f"| the engine in bfloat16, of the fastest product of a block's Linears | {' | '.join(cells)} |")
    return [*lines, ""]


def many_adapters(run: Mapping[str, Any]) -> list[str]:
    """Return the lines of one mixture."""
    what = "VPT-deep with 50 prompts" if run["mixture"] == "VPT-deep" else "four methods in turn"
    mixed = run["seconds"]["32 adapters"]
    lines = [f"| 32 images over 32 adapters, {what} | ms | time of the mixed batch, × this |", "|---|---:|---:|"]
    for name, seconds in run["seconds"].items():
        value = "" if name == "32 adapters" else "{:.3f} ({:.3f}–{:.3f})".format(*ratio(mixed, seconds))
        lines.append(f"| {name} | {1000 * statistics.median(seconds):.0f} | {value} |")
    return [*lines, ""]


def medians(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the page's lines: the engine's fastest backend against each baseline, and the mixed batch."""
    baselines = (FLOAT32, COMPILED, OPENVINO, RUNTIME)
    lines = [
        f"| times as fast as the papers' graph in | {' | '.join(name.split(', ')[1] for name in baselines)} |",
        "|---|" + "---:|" * len(baselines),
    ]
    for run in runs:
        if run["job"] == "one adapter":
            seconds, cells = run["seconds"], []
            for name in baselines:
                ours = seconds[fastest(seconds, "float32" if name == RUNTIME else "bfloat16")]
                cells.append(f"{ratio(seconds[name], ours)[0]:.2f}" if name in seconds else "")
            batch = ", batch 1" if run["batch"] == 1 else ""
            lines.append(f"| {run['method']}, {run['num_prompts']} prompts{batch} | {' | '.join(cells)} |")
    for run in runs:
        if run["job"] == "many adapters" and run["mixture"] == "VPT-deep":
            seconds = run["seconds"]
            times = ratio(seconds["32 adapters"], seconds["one adapter, its own engine"])[0]
            lines += [
                "",
                "32 images of 32 adapters in one batch, VPT-deep with 50 prompts each, take "
                f"{times:.2f} times as long as 32 images of one adapter in its own engine.",
            ]
    return lines


def replace_part(text: str, lines: Sequence[str]) -> str:
    """Return the page with `lines` between its two comments."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"the page has no place for the table: {BEGIN.strip()} and {END.strip()}")
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END)[1]


def main(source: Path, out: Path, page: Path) -> None:
    """Write the tables."""
    report = json.loads(source.read_text())
    runs = [benchmark["extra_info"] for benchmark in report["benchmarks"]]
    machine = report["machine_info"]["cpu"].get("brand_raw", "unknown CPU")
    flags = report["machine_info"]["cpu"].get("flags", ())
    units = ", ".join(name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags)
    single = [run for run in runs if run["job"] == "one adapter"]
    rounds = len(next(iter(single[0]["seconds"].values())))
    lines = [
        "# `fp.Engine` on ViT-B/16, 224 px, and the papers' graph in other engines",
        "",
        f"`make bench-engine` on {machine} ({units}), {runs[0]['threads']} threads, torch {runs[0]['torch']}, random "
        f"weights. Medians over {rounds} interleaved rounds; × is times as fast, in brackets the rounds but the lowest "
        "and the highest, behind it the goal (≥ where the interval's upper end reaches it) and the backend that was "
        'the engine\'s fastest in that number format, which is the one `backend="auto"` takes.',
        "",
    ]
    for method, batch in dict.fromkeys((run["method"], run["batch"]) for run in single):
        lines += one_adapter([run for run in single if (run["method"], run["batch"]) == (method, batch)])
    for run in runs:
        if run["job"] == "many adapters":
            lines += many_adapters(run)
        if run["job"] == "memory":
            lines += [
                f"200 VPT-deep adapters of 50 prompts, in bfloat16: the process grew by "
                f"{run['bytes'] / 2**20:.0f} MiB (goal: less than 1024).",
                "",
            ]
    atomic_write(out, "\n".join(lines))
    atomic_write(page, replace_part(page.read_text(encoding="utf-8"), medians(runs)))
    print("\n".join(lines))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
