"""The comparison of `fastprompt bench` as a Markdown table and as a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprompt.files import atomic_write_many
from fastprompt.report import plots
from fastprompt.report.html import figure, table, template
from fastprompt.report.ranks import LEAST_TASKS, Ranking, ranking

TABLE_FILE, PAGE_FILE = "table.md", "report.html"
NOTE = (
    "± is half the 95 % interval over seeds and images, both taken as samples (two-way analysis of variance); over "
    "seeds alone where every seed has images of its own. Means are over the tasks, which are taken as they are. "
    "Differences are on the same images with the same seeds; p is Holm's, over all rows compared with that one. A run "
    "that diverged counts as no image right. Speed and memory are of one process on this machine, no benchmark."
)


def points(value: float | None, digits: int = 1) -> str:
    """Format a share in percentage points, or a dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def with_half(estimate: Mapping[str, Any] | None, signed: bool = False) -> str:
    """Format "mean ± half the interval" in percentage points."""
    if estimate is None:
        return "–"
    mean = f"{100 * estimate['mean']:+.1f}" if signed else points(estimate["mean"])
    return mean if estimate["low"] is None else f"{mean} ± {points((estimate['high'] - estimate['low']) / 2)}"


def p_text(value: float | None) -> str:
    """Format a p-value."""
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def row_title(row: Mapping[str, Any]) -> str:
    """Return a row's title, with its number of images of each class if it has not all."""
    few = row["per_class"]
    return str(row["title"]) if few is None else f"{row['title']}, {few} per class"


def _references(summary: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for row in summary["rows"] for name in row["differences"]))


def summary_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the main table, the best mean first."""
    references = _references(summary)
    groups = list(dict.fromkeys(group for row in summary["rows"] for group in row["groups"]))
    titles = {row["name"]: row["title"] for row in summary["rows"]}
    header = ["method", "trained %", *groups, f"mean of {len(summary['tasks'])}"]
    header += [text for name in references for text in (f"minus {titles[name]}", "p")]
    header += ["images/s", "peak MiB"]
    rows = []
    for row in sorted(summary["rows"], key=lambda row: -(row["mean"] or {"mean": -1.0})["mean"]):
        cells = [row_title(row), points(row["trained_share"], 3)]
        cells += [with_half(row["groups"].get(group)) for group in groups]
        cells.append(with_half(row["mean"]))
        for name in references:
            mean = row["differences"].get(name, {}).get("mean")
            cells += [with_half(mean, signed=True), "–" if mean is None else p_text(mean["p_holm"])]
        speed, peak = row["images_per_second"], row["peak_memory_mib"]
        cells += ["–" if speed is None else f"{speed:.1f}", "–" if peak is None else f"{peak:,.0f}"]
        rows.append(cells)
    return header, rows


def task_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table by task: accuracy, and the point that the search chose."""
    header = ["task", *(row_title(row) for row in summary["rows"])]
    rows = []
    for name, title in summary["tasks"].items():
        cells = [title]
        for row in summary["rows"]:
            found = row["tasks"][name]
            notes = []
            if found["lr"] is not None:
                notes.append(f"lr {found['lr']:g}, wd {found['weight_decay']:g}")
            notes += ["edge"] * found["at_edge"] + [f"{found['diverged']} diverged"] * bool(found["diverged"])
            cells.append(with_half(found["accuracy"]) + (f" ({', '.join(notes)})" if notes else ""))
        rows.append(cells)
    return header, rows


def introduction(summary: Mapping[str, Any]) -> str:
    """Describe in two sentences what was compared."""
    how = "the authors' recipes" if summary["recipe"] == "paper" else "this library's recipes"
    return (
        f"{summary['backbone']} at {summary['image_size']} px, {how}; accuracy on {summary['split']} images in per "
        f"cent, seeds {', '.join(map(str, summary['seeds']))}. Learning rate and weight decay were chosen on "
        "validation."
    )


def ranking_of(summary: Mapping[str, Any]) -> Ranking | None:
    """Rank the rows with all training images over the tasks; None for fewer than two rows or `LEAST_TASKS` tasks."""
    rows = [row for row in summary["rows"] if row["per_class"] is None and row["mean"] is not None]
    if len(rows) < 2 or len(summary["tasks"]) < LEAST_TASKS:
        return None
    return ranking(
        {row["title"]: [row["tasks"][name]["accuracy"]["mean"] for name in summary["tasks"]] for row in rows}
    )


def ranking_text(found: Ranking, summary: Mapping[str, Any]) -> str:
    """Describe a ranking in words."""
    ranks = ", ".join(f"{title} {rank:.2f}" for title, rank in found.ranks.items())
    friedman = "" if found.p is None else f"; Friedman's test that all are alike: p {p_text(found.p)}"
    return (
        f"Mean ranks over {len(summary['tasks'])} tasks, 1 is the best: {ranks}. They differ significantly from "
        f"{found.critical:.2f} on (Nemenyi, 5 %){friedman}."
    )


def markdown(summary: Mapping[str, Any]) -> str:
    """Format the comparison as Markdown."""
    lines = [f"# {summary['title']}", "", introduction(summary), ""]
    for header, rows in (summary_rows(summary), task_rows(summary)):
        lines += [_line(header), "|---|" + "---:|" * (len(header) - 1), *(_line(row) for row in rows), ""]
    if (found := ranking_of(summary)) is not None:
        lines += [ranking_text(found, summary), ""]
    return "\n".join([*lines, NOTE, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def render(summary: Mapping[str, Any]) -> str:
    """Render the page."""
    rows = [row for row in summary["rows"] if row["mean"] is not None]
    split = summary["split"]
    marks = [
        (
            row_title(row),
            int(row["trained_parameters"]),
            row["mean"]["mean"],
            row["mean"]["mean"] if row["mean"]["low"] is None else row["mean"]["low"],
            row["mean"]["mean"] if row["mean"]["high"] is None else row["mean"]["high"],
            split,
        )
        for row in rows
    ]
    figures = []
    if marks:
        said = "; ".join(f"{title} {points(mean)} % with {count:,}" for title, count, mean, *_ in marks)
        figures.append(
            figure(
                plots.accuracy_against_parameters(marks),
                f"Scatter plot of mean accuracy over trained parameters: {said}",
                "Mean accuracy over the tasks against the number of trained parameters (generator and head), 95 % "
                "intervals.",
            )
        )
    for name in _references(summary):
        shown = {row_title(row): row["differences"][name] for row in rows if name in row["differences"]}
        title = next(row["title"] for row in summary["rows"] if row["name"] == name)
        if shown:
            figures.append(
                figure(
                    plots.differences(shown, summary["tasks"], f"minus {title}"),
                    f"Differences to {title} by task and on average, for {', '.join(shown)}",
                    f"Accuracy minus that of {title} on the same images, in percentage points: each task, and the mean "
                    "with a thick line; 95 % intervals.",
                )
            )
    if (found := ranking_of(summary)) is not None:
        text = ranking_text(found, summary)
        said = f"{text} A bar joins methods that do not differ significantly."
        figures.append(figure(plots.critical_differences(found), f"Critical-difference diagram. {text}", said))
    few = sorted({row["per_class"] for row in rows if row["per_class"] is not None})
    if len(few) > 1:
        curves = {
            title: [(row["per_class"], row["mean"]) for row in rows if row["title"] == title and row["per_class"]]
            for title in dict.fromkeys(row["title"] for row in rows)
        }
        figures.append(
            figure(
                plots.low_data(curves),
                f"Line plot of mean accuracy over training images of each class: {', '.join(curves)}",
                "Mean accuracy over the tasks against the number of training images of each class, 95 % intervals.",
            )
        )
    return template("bench.html.jinja").render(
        heading=summary["title"],
        introduction=introduction(summary),
        summary=table(NOTE, *summary_rows(summary)),
        figures=figures,
        by_task=table(
            "Accuracy by task, with the learning rate and weight decay that were chosen. “Edge”: the best point "
            "still lies at an end of its grid.",
            *task_rows(summary),
        ),
    )


def build_bench_report(summary: Mapping[str, Any], out: Path) -> None:
    """Write table.md and report.html of a summary (`fastprompt.runs.bench.summarise`) into the directory `out`."""
    atomic_write_many(out, {TABLE_FILE: markdown(summary), PAGE_FILE: render(summary)})
