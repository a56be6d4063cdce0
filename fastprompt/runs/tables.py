"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns in plain text: the first flush left, the others flush right, cells as they are written."""
    alignment = ["left", *["right"] * (len(header) - 1)]
    return tabulate(rows, header, tablefmt="simple", colalign=alignment, headersalign=alignment, disable_numparse=True)


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line for each run: method, trained parameters, accuracies, images per second and peak memory."""
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
