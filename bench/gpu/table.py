"""Tables of a run's report, and the documentation's: `python -m gpu.table results/gpu.json docs/results.md`.

The second replaces what stands between the two `gpu` comments of the page. A stage whose rows have a "way" is a table
with a column for each way; a cell holds the median and the quartiles of its times, then what else was measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- gpu: written by `make gpu-table` -->\n", "<!-- /gpu -->\n"
OUTCOMES = ("failed", "not run")

Record = Mapping[str, Any]


def line(stage: str, record: Record) -> str:
    """How a stage went, in one line."""
    rows, counts = record["rows"], {kind: sum(kind in row for row in record["rows"]) for kind in OUTCOMES}
    said = [f"{len(rows) - sum(counts.values())} rows", *(f"{n} {kind}" for kind, n in counts.items() if n)]
    if record["ended"]:
        said.append(record["ended"])
    return f"{stage}: {', '.join(said)}; {record['seconds']:.0f} s of {record['limit']:.0f}"


def page(report: Record) -> str:
    """Tables of all stages."""
    lines = ["# What a GPU showed" + (", in a dry run: its times say nothing" if report["dry_run"] else ""), ""]
    lines += [f"{report['system']}; {report['failures']} failures, {report['seconds']:.0f} s.", ""]
    for stage, record in report["stages"].items():
        lines += [f"## {stage.capitalize()}", "", f"{line(stage, record)}.", "", *of_stage(record), ""]
    return "\n".join(lines)


def of_stage(record: Record) -> list[str]:
    """The lines of one stage: its table, then what failed."""
    rows = record["rows"]
    lines = (pivoted(rows) if any("way" in row for row in rows) else flat(rows)) if rows else []
    failed = [row for row in rows if "failed" in row]
    if failed or record["ended"]:
        lines.append("")
    for row in failed:
        lines += [f"* **Failed**: {named(row)}", "", *indented(row["failed"]), ""]
    if record["ended"]:
        lines += [f"* **{record['ended'].capitalize()}**", "", *indented(record["log"])]
    return lines


def named(row: Record) -> str:
    """The labels of a row."""
    return ", ".join(str(value) for key, value in row.items() if key not in OUTCOMES) or "the stage itself"


def indented(text: str) -> list[str]:
    return ["      " + each for each in text.strip().splitlines()[-12:]]


def flat(rows: Iterable[Record]) -> list[str]:
    """A line for each row, a column for each key."""
    rows = [{key: value for key, value in row.items() if key != "failed"} | failure(row) for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return drawn(columns, [[written(row.get(column, "")) for column in columns] for row in rows])


def failure(row: Record) -> dict[str, str]:
    return {"not run": "**failed**"} if "failed" in row else {}


def pivoted(rows: Iterable[Record]) -> list[str]:
    """A line for each case, a column for each way; a row without a way is a line of its own."""
    labels: list[str] = []
    ways: list[str] = []
    cases: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        keys = list(row)
        names = keys[: keys.index("way")] if "way" in keys else [key for key in keys if key not in OUTCOMES]
        labels += [name for name in names if name not in labels]
        way = row.get("way", "")
        ways += [way] if way not in ways else []
        cases.setdefault(tuple(str(row.get(name, "")) for name in labels), {})[way] = cell(row, names)
    body = [
        [*case, *[""] * (len(labels) - len(case)), *[of.get(way, "") for way in ways]] for case, of in cases.items()
    ]
    return drawn([*labels, *ways], body)


def cell(row: Record, names: Iterable[str]) -> str:
    """What was measured of one way."""
    if "failed" in row:
        return "**failed**"
    if "not run" in row:
        return str(row["not run"])
    return ", ".join(
        written(value) if isinstance(value, Mapping) else f"{written(value)} {key}"
        for key, value in row.items()
        if key not in (*names, "way")
    )


def written(value: Any) -> str:
    """A number to three digits, a spread as "median (low–high)"."""
    if isinstance(value, Mapping):
        return f"{written(value['median'])} ({written(value['low'])}–{written(value['high'])})"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def drawn(head: list[str], body: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *body]
    return [f"| {' | '.join(each.replace('|', '/') for each in cells)} |" for cells in lines]


def write(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main(source: str, target: str) -> None:
    report = json.loads(Path(source).read_text(encoding="utf-8"))
    if report["dry_run"]:
        raise SystemExit(f"{source} comes from a dry run; its times say nothing")
    text = Path(target).read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{target} has no place for the tables: {BEGIN.strip()} and {END.strip()}")
    before, rest = text.split(BEGIN)
    tables = page(report).replace("\n## ", "\n### ").partition("\n\n")[2]
    write(Path(target), before + BEGIN + tables + END + rest.split(END)[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
