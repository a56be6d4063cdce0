"""Draw the two plots of README and documentation from committed results: `python experiments/plots.py`, `make plots`.

* `accuracy.svg`: test accuracy against trained parameters with intervals, from results/table.json (`make table`);
* `speed.svg`: images per second against the number of prompts, from results/engine.md (`make bench-engine`).

Each file's description holds the plotted numbers, for readers who cannot see the picture and for the test that compares
them with the results.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fastprompt.files import atomic_write
from fastprompt.report.plots import COLOURS, MARKERS, new_figure, plain

ROOT = Path(__file__).resolve().parents[1]
SPEEDS = {
    "papers' graph, float32 eager": ("papers' graph, float32 eager", COLOURS[0], "--"),
    "Engine, float32 eager": ("rewritten graph, float32 eager", COLOURS[0], "-"),
    "papers' graph, bfloat16 compiled": ("papers' graph, bfloat16 compiled", COLOURS[1], "--"),
    "Engine, bfloat16 compile": ("fp.Engine, bfloat16", COLOURS[1], "-"),
}
"""Rows of results/engine.md to draw: label, colour, line style. Colours denote dtypes, line styles graphs."""

GROUPS = {
    "prompts from the image": ("PGN", "VAPT", "V²APT"),
    "the same prompts for all images": ("VPT-deep", "VPT-shallow", "VQT", "Free prompts", "Pixel prompt"),
    "no prompts": ("Linear probe (L-BFGS)", "Linear probe (SGD)", "Full fine-tuning"),
}
"""Methods of results/table.json, grouped by colour."""
LEFT = ("VPT-shallow", "Free prompts", "Full fine-tuning", "Linear probe (L-BFGS)", "Linear probe (SGD)")
"""Names placed to the left of their points because there is no room on the right."""


def accuracies(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return title, trained parameters, test accuracy and half width of its interval over seeds, by parameters.

    The pixel prompt and the two probes are included.
    """
    rows = [
        {
            "method": row["title"],
            "parameters": row["trained_parameters"]["total"],
            "accuracy": round(row["test_accuracy"], 4),
            "interval": round(row["test_interval_over_seeds"] or 0.0, 4),
        }
        for row in table["rows"]
    ]
    return sorted(rows, key=lambda row: (row["parameters"], row["method"]))


def speeds(report: str) -> dict[str, dict[str, float]]:
    """Return label → prompts → images per second, for VPT-deep at batch 8."""
    lines = report.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| VPT-deep, batch 8, prompts |"))
    prompts = [cell.strip() for cell in lines[start].strip("|").split("|")[1:]]
    found = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if name.removesuffix(", ms") in SPEEDS:
            label = SPEEDS[name.removesuffix(", ms")][0]
            found[label] = {n: round(8000 / float(ms), 2) for n, ms in zip(prompts, cells, strict=True)}
    return found


def draw_accuracies(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot accuracy over parameters, with names beside points and colours for what the prompts depend on."""
    figure = new_figure(7.2, 3.8)
    axes = figure.subplots()
    for colour, marker, (group, methods) in zip(COLOURS, MARKERS, GROUPS.items(), strict=False):
        members = [row for row in rows if row["method"] in methods]
        axes.errorbar(
            *([row[key] for row in members] for key in ("parameters", "accuracy", "interval")),
            color=colour,
            marker=marker,
            markersize=7,
            linestyle="none",
            elinewidth=1,
            capsize=3,
            label=group,
        )
        for row in members:
            side = "right" if row["method"] in LEFT else "left"
            axes.annotate(
                row["method"],
                (row["parameters"], row["accuracy"]),
                (-8 if side == "right" else 8, 3),
                textcoords="offset points",
                ha=side,
                fontsize=8,
                color=colour,
            )
    axes.set_xscale("log")
    axes.set_xlim(left=4e2)
    axes.set_xlabel("trained parameters, head included")
    axes.set_ylabel("test accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    plain(axes)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def draw_speeds(found: Mapping[str, Mapping[str, float]]) -> Figure:
    """Plot images per second over the number of prompts."""
    figure = new_figure(7.2, 3.8)
    axes = figure.subplots()
    for (label, colour, line), marker in zip(SPEEDS.values(), MARKERS, strict=False):
        prompts, rates = zip(*((int(n), rate) for n, rate in found[label].items()), strict=True)
        axes.plot(prompts, rates, line, color=colour, marker=marker, markersize=6, label=label)
    axes.set_xlabel("prompts per block")
    axes.set_ylabel("images/s")
    axes.set_ylim(bottom=0)
    axes.set_xticks([int(n) for n in next(iter(found.values()))])
    plain(axes)
    axes.legend(fontsize=8, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def to_svg(figure: Figure, numbers: Any) -> str:
    """Return the figure as reproducible SVG, with the numbers as its description."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "fastprompt"}):
        metadata = {"Date": None, "Creator": None, "Description": json.dumps(numbers, ensure_ascii=False)}
        figure.savefig(buffer, format="svg", metadata=metadata)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw both plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "assets", help="folder of the two files")
    out = parser.parse_args(arguments).out
    rows = accuracies(json.loads((ROOT / "results" / "table.json").read_text(encoding="utf-8")))
    found = speeds((ROOT / "results" / "engine.md").read_text(encoding="utf-8"))
    atomic_write(out / "accuracy.svg", to_svg(draw_accuracies(rows), rows))
    atomic_write(out / "speed.svg", to_svg(draw_speeds(found), found))


if __name__ == "__main__":
    main()
