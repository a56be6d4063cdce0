from __future__ import annotations

import csv
import io

import pytest

from fastprompt.runs.tables import csv_table, spreadsheet_text

FORMULAS = [
    '=HYPERLINK("http://x","y")',
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    " =1",
    "＝1+1",
    "+",
    "-",
    "-1-1",
    "+1e5",
]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_text_behind_an_apostrophe(text: str) -> None:
    assert spreadsheet_text(text) == f"'{text}"
    [header, row] = list(csv.reader(io.StringIO(csv_table([text], [[text]]), newline="")))
    assert header == row == [f"'{text}"]


@pytest.mark.parametrize("text", ["", "cat", "3", "-3", "+3", "-3.5", "-3,5", "a=b", "a-b", "1-1", "p(=x)", "'=1"])
def test_other_text_and_numbers_stay(text: str) -> None:
    assert spreadsheet_text(text) == text


def test_numbers_have_six_decimals_and_no_quotes() -> None:
    table = csv_table(["file", "p"], [["a.png", 0.25], ["b;=1.png", -1.5]])
    assert table == 'file,p\na.png,0.250000\n"b;=1.png",-1.500000\n'


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_no_cell_begins_within_a_text(separator: str) -> None:
    text = f"a{separator}=1+1"
    for delimiter in ",;\t|":
        cells = [
            cell
            for row in csv.reader(io.StringIO(csv_table(["h"], [[text, 0.5]]), newline=""), delimiter=delimiter)
            for cell in row
        ]
        assert not any(cell.startswith("=") for cell in cells)
    assert list(csv.reader(io.StringIO(csv_table(["h"], [[text]]), newline="")))[1] == [text]
