"""The numbers of docs/results.md and of the plots are those of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import plots
import pytest
from table import bracket

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results.md"


@pytest.mark.parametrize(("name", "part"), [("table", 0), ("table-vit-s14-mnist5k", 1)])
def test_the_results_are_those_of_the_committed_table(name: str, part: int) -> None:
    table = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
    rows = {row["title"]: row for row in table["rows"]}
    found = re.findall(
        r"^\| ([^|]+) \| ([\d,]+) \| (0\.\d+) (?:± (0\.\d+) )?\| ?(.*?) ?\| ?(.*?) ?\|$",
        PAGE.read_text(encoding="utf-8").split("The second set is")[part],
        re.MULTILINE,
    )
    assert {title for title, *_ in found} == set(rows)
    for title, parameters, accuracy, half, difference, over_seeds in found:
        row = rows[title]
        assert int(parameters.replace(",", "")) == row["trained_parameters"]["total"]
        assert accuracy == f"{row['test_accuracy']:.4f}"
        interval = row["test_interval_over_seeds"]
        assert half == ("" if interval is None else f"{interval:.4f}")
        if row["difference_to_probe"] is None:
            assert (difference, over_seeds) == ("", "")
        else:
            low, high = row["difference_to_probe"]["image_interval"]
            assert difference == f"{row['difference_to_probe']['mean']:+.4f} [{low:+.4f}, {high:+.4f}]"
            assert over_seeds == bracket(row["difference_to_probe"]["seed_interval"])


def test_the_speeds_are_those_of_the_committed_table() -> None:
    """A row holds the medians of both jobs' rows of results/forward.md, inference first."""
    medians: dict[str, list[str]] = {}
    for name, *cells in (
        line.strip("| ").split(" | ")
        for line in (ROOT / "results" / "forward.md").read_text(encoding="utf-8").splitlines()
        if ", × |" in line
    ):
        medians.setdefault(name.removesuffix(", ×"), []).extend(cell.split(" ")[0] for cell in cells)
    found = re.findall(
        r"^\| ((?:papers' graph|rewritten), \w+ \w+) \| (.*) \|$",
        PAGE.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert {name for name, _ in found} == set(medians)
    for name, cells in found:
        assert cells.split(" | ") == medians[name]


def test_the_engines_speeds_are_those_of_the_committed_table() -> None:
    """Column by column: what the page says a method's engine is faster by is a median of results/engine.md."""
    expected: dict[str, list[str]] = {}
    rows: list[str] = []
    for line in (ROOT / "results" / "engine.md").read_text(encoding="utf-8").splitlines():
        name, *cells = line.strip("| ").split(" | ")
        if name.endswith(", prompts"):
            method, batch = name.removesuffix(", prompts").split(", batch ")
            rows = [f"{method}, {n} prompts" + (", batch 1" if batch == "1" else "") for n in cells]
        elif name.startswith("the engine in ") and ", × " in name:
            for row, cell in zip(rows, cells, strict=True):
                expected.setdefault(row, []).append(cell.split(" ")[0])
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("<!-- engine:") : text.index("<!-- /engine -->")]
    found = {
        name: [cell for cell in cells.split(" | ") if cell.strip()]
        for name, cells in re.findall(r"^\| ((?:VPT-deep|VAPT|PGN), .*?) \| (.*) \|$", table, re.MULTILINE)
    }
    assert found == expected
    assert len(found) == 8


def test_the_pixel_prompts_accuracies_are_those_of_the_committed_table() -> None:
    """A row holds accuracy as trained and as PNG on each data set of results/pixels.json."""
    rows = json.loads((ROOT / "results" / "pixels.json").read_text(encoding="utf-8"))
    titles = [row["title"] for of_data in rows.values() for row in of_data]
    expected = {title: [""] * 2 * len(rows) for title in titles}
    for i, of_data in enumerate(rows.values()):
        for row in of_data:
            png = row["pictures"].get("png")
            expected[row["title"]][2 * i : 2 * i + 2] = [
                f"{row['test_accuracy']:.3f}",
                "" if png is None else f"{png['accuracy']:.3f}",
            ]
    text = PAGE.read_text(encoding="utf-8")
    lines = text[text.index("| Test accuracy |") :].split("\n\n")[0].splitlines()[2:]
    found = {title: cells for title, *cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}
    assert found == expected


def test_what_training_costs_is_what_was_measured() -> None:
    """The page's rows are those of results/training.md without shares, and so are its numbers on few bits."""
    measured = (ROOT / "results" / "training.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in measured.splitlines() if line.startswith("| ")]
    text = PAGE.read_text(encoding="utf-8")
    text = text[text.index("## What training costs") : text.index("## What training keeps")]
    found = re.findall(r"^\| ((?:papers' graph|rewritten), .*?) \| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    assert sorted(found) == sorted(
        (row[0], row[1], row[3]) for row in rows if row[0].startswith(("papers'", "rewritten")) and len(row) == 6
    )
    exact, eight, two = (next(row for row in rows if row[0] == bits) for bits in ("all", "8", "2"))
    for number in (exact[2], eight[2], two[2], eight[4], two[4]):
        assert number in text


def test_costs_are_those_of_the_formulas() -> None:
    """The page's table is that of results/cost.md for 50 prompts, without what was measured beside it."""
    lines = (ROOT / "results" / "cost.md").read_text(encoding="utf-8").splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    costs = {(row[0], row[2]): [cell.split(" / ")[0] for cell in row[3:8]] for row in cells if row[1] == "50"}
    found = re.findall(
        r"^\| ([^|]+) \| (papers|rewritten|recompute) \| (\S+) GF \| (\S+) GF \| (\S+) MiB \| (\S+) \| (\S+) \|$",
        PAGE.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(found) == 12
    for name, graph, *numbers in found:
        assert numbers == costs[name, graph], (name, graph)


def test_grids_are_as_measured() -> None:
    measured = (ROOT / "results" / "grid.md").read_text(encoding="utf-8")
    ratios = re.findall(r", (\d\.\d\d) × \([^|]*\) \|$", measured, re.MULTILINE)
    assert len(ratios) == 8
    text = PAGE.read_text(encoding="utf-8")
    text = text[text.index("## Grids in one batch") : text.index("## What training keeps")]
    assert sorted([*re.findall(r"\| (\d\.\d\d) \|$", text, re.MULTILINE), "1.45", "0.90"]) == sorted(ratios)


def test_a_training_step_is_as_fast_as_measured() -> None:
    """The last row and the better of ours, of the machine with bfloat16; ours, of the one without."""
    text = PAGE.read_text(encoding="utf-8")
    text = text[text.index("## What training costs") : text.index("## Grids in one batch")]
    for name, rows in (
        ("training.md", ("rewritten, the better", "rewritten, bfloat16 compiled", "FLOPs by formula")),
        ("training-avx2.md", ("rewritten, float32 eager",)),
    ):
        measured = (ROOT / "results" / name).read_text(encoding="utf-8")
        for row in rows:
            line = next(line for line in measured.splitlines() if line.startswith(f"| {row}"))
            cells = [cell.split()[0] for cell in line.strip("| ").split(" | ")[1:]]
            said = f"{cells[0]}, {cells[1]} and {cells[2]}"
            assert said in " ".join(text.split()), (name, row)


@pytest.mark.parametrize("name", ["accuracy.svg", "speed.svg"])
def test_the_plots_show_the_committed_numbers(name: str) -> None:
    """What is drawn is in the file's description; `make plots` draws it again."""
    if name == "speed.svg":
        numbers: Any = plots.speeds((ROOT / "results" / "engine.md").read_text(encoding="utf-8"))
        assert {len(rates) for rates in numbers.values()} == {3}
        assert len(numbers) == len(plots.SPEEDS)
    else:
        numbers = plots.accuracies(json.loads((ROOT / "results" / "table.json").read_text(encoding="utf-8")))
        assert len(numbers) == 11
    tree = ElementTree.parse(ROOT / "docs" / "assets" / name)
    description = tree.find(".//{http://purl.org/dc/elements/1.1/}description")
    assert description is not None
    assert json.loads(description.text or "") == numbers


def test_the_plots_are_drawn_from_the_numbers(tmp_path: Path) -> None:
    """Byte for byte, where Matplotlib is the version that `make` installs."""
    plots.main(["--out", str(tmp_path)])
    pinned = f"matplotlib=={matplotlib.__version__};" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for name in ("accuracy.svg", "speed.svg"):
        drawn, kept = ((folder / name).read_text(encoding="utf-8") for folder in (tmp_path, ROOT / "docs" / "assets"))
        assert drawn == kept if pinned else len(drawn) > 10_000


def test_every_file_of_results_is_named_and_so_is_its_command() -> None:
    text = PAGE.read_text(encoding="utf-8")
    reports = sorted((ROOT / "results").glob("*.md"))
    assert len(reports) > 5
    assert [path.name for path in reports if f"`results/{path.name}`" not in text] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= targets


def test_torture_found_nothing_wrong() -> None:
    """The page says so."""
    lines = (ROOT / "results" / "torture.md").read_text(encoding="utf-8").splitlines()
    wrong = [line.strip("| ").split(" | ")[-1] for line in lines if line.startswith("| ")][1:]
    assert len(wrong) > 5
    assert set(wrong) == {"0"}
