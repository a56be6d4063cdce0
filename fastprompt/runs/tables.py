"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns in plain text: the first flush left, the others flush right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for number, row in enumerate(cells):
        columns = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(columns).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line a run: method, trained parameters, validation and test accuracy, images per second, peak
    memory.
    """
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
