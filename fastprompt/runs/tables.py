"""Tables as plain text and as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from tabulate import tabulate


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a plain-text table with the first column aligned left, the others right, and cells unchanged."""
    alignment = ["left", *["right"] * (len(header) - 1)]
    return tabulate(rows, header, tablefmt="simple", colalign=alignment, headersalign=alignment, disable_numparse=True)


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Format one line per run: method, trained parameters, accuracies, images per second and peak memory."""
    rows = [
        [
            r["title"],
            f"{r['trained_parameters']['total']:,}",
            f"{r['validation']['accuracy']:.4f}",
            "–" if r["test"] is None else f"{r['test']['accuracy']:.4f}",
            f"{r['images_per_second']:.1f}",
            f"{r['peak_memory_mib']:,.0f}",
        ]
        for r in results
    ]
    return text_table(["method", "trained parameters", "val accuracy", "test accuracy", "img/s", "peak MiB"], rows)


def grid_table(runs: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Format one line per run of a grid, by name: accuracies, loss and best epoch; None for one that diverged."""
    rows = [
        [name, "diverged", *4 * ["–"]]
        if r is None
        else [
            name,
            f"{r['validation']['accuracy']:.4f}",
            f"{r['validation']['loss']:.4f}",
            "–" if r["test"] is None else f"{r['test']['accuracy']:.4f}",
            str(r["best_epoch"]),
            f"{r['images_per_second']:.1f}",
        ]
        for name, r in runs.items()
    ]
    return text_table(["run", "val accuracy", "val loss", "test accuracy", "best epoch", "img/s"], rows)


def spreadsheet_text(text: str) -> str:
    """Escape `text` so that a spreadsheet shows it and does not run it as a formula.

    An apostrophe is put before text that begins with =, +, -, @ (or their wide forms), a tab or a line end, which a
    spreadsheet would read as a formula. Numbers are unchanged.
    """
    formula = text.lstrip(" ").startswith(_FORMULAS) and not re.fullmatch(r"[+-]?[0-9]+([.,][0-9]+)?", text)
    return f"'{text}" if formula else text


_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def csv_table(header: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
    """Format comma-separated values: text through `spreadsheet_text`, numbers with six decimals.

    All text of a row is quoted if any of it contains a line end, semicolon, tab or bar, because some locales separate
    cells by these.
    """
    stream = io.StringIO()
    plain = csv.writer(stream, lineterminator="\n")
    quoted = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    for row in (header, *rows):
        cells = [spreadsheet_text(cell) if isinstance(cell, str) else Decimal(f"{cell:.6f}") for cell in row]
        separated = any(isinstance(cell, str) and re.search(r"[;\t|\r\n]", cell) for cell in cells)
        (quoted if separated else plain).writerow(cells)
    return stream.getvalue()
