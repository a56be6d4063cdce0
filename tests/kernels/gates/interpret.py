"""Run an op's cases and checks in Triton's interpreter: `python tests/kernels/gates/interpret.py <op> [case ...]`."""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from parity import compare
from spec import Case, load_spec, row_of
from watch import Watch

from fastprompt.kernels.dispatch import interpreting
from fastprompt.kernels.tiles import as_family


@contextmanager
def watched(case: Case, watch: Watch) -> Iterator[None]:
    """Within this context kernels are launched as on the case's part, and watched."""
    with as_family(case.family), watch:
        yield


def launches_of(watch: Watch, tables: dict[str, Any], case: Case, dtype: str) -> list[dict[str, Any]]:
    """Which kernel and which row of its table ran, and its traffic."""
    return [
        {
            "case": case.name,
            "dtype": dtype,
            "kernel": launch.kernel,
            "grid": launch.grid,
            "row": row_of(tables[launch.kernel], launch.arguments),
            "distinct": launch.distinct,
            "loaded": launch.loaded,
        }
        for launch in watch.launches
    ]


def traffic(case: Case, dtype: torch.dtype, module: ModuleType, spec: ModuleType) -> list[dict[str, Any]]:
    """Distinct bytes of each launch beside the formula, with allocations that no launch of the call touches."""
    watch = Watch()
    compare(case, dtype, module, within=watched(case, watch))
    rows = []
    used = set()
    for launch in watch.launches:
        used |= {region.start for region in launch.regions}
        twice = [
            region.names
            for region in launch.regions
            for name in spec.LOADED_ONCE.get(launch.kernel, ())
            if name in region.names and region.loaded > region.distinct
        ]
        rows.append(
            {
                "case": case.name,
                "dtype": str(dtype).split(".")[1],
                "kernel": launch.kernel,
                "distinct": launch.distinct,
                "loaded": launch.loaded,
                "programs": len_grid(launch.grid),
                "formula": spec.formula(launch.kernel, dtype.itemsize, case.sizes),
                "loaded_twice": twice,
            }
        )
    idle = sum(size for address, size in watch.allocated.items() if address not in used)
    return rows + [{"case": case.name, "dtype": str(dtype).split(".")[1], "kernel": "", "idle": idle}]


def len_grid(grid: tuple[int, ...]) -> int:
    """Programs of a grid."""
    count = 1
    for n in grid:
        count *= n
    return count


def failures(spec: ModuleType, module: ModuleType, stop_early: bool, names: Sequence[str] = ()) -> dict[str, Any]:
    """Parity of the cases and results of the checks, all of them or up to the first that is red."""
    report: dict[str, Any] = {"parity": [], "launches": [], "checks": {}, "seconds": {}}
    for case in spec.CASES:
        if names and case.name not in names:
            continue
        began = time.perf_counter()
        for dtype in case.dtypes:
            watch = Watch()
            try:
                rows = compare(case, getattr(torch, dtype), module, within=watched(case, watch))
                report["launches"] += launches_of(watch, module.TABLES, case, dtype)
            except Exception:
                rows = [{"case": case.name, "dtype": dtype, "ok": False, "error": traceback.format_exc(limit=-6)}]
            report["parity"] += rows
            if stop_early and not all(row["ok"] for row in rows):
                return report
        report["seconds"][case.name] = round(time.perf_counter() - began, 2)
    for check in spec.CHECKS:
        if names and check.__name__ not in names:
            continue
        began = time.perf_counter()
        try:
            torch.manual_seed(0)
            with Watch():
                check(module)
            report["checks"][check.__name__] = ""
        except Exception:
            report["checks"][check.__name__] = traceback.format_exc(limit=-6)
            if stop_early:
                return report
        report["seconds"][check.__name__] = round(time.perf_counter() - began, 2)
    return report


def main(op: str, *names: str) -> None:
    if not interpreting():
        raise SystemExit("set TRITON_INTERPRET=1: kernels are decorated for the interpreter or the compiler, not both")
    torch.set_num_threads(1)
    spec = load_spec(op)
    module = importlib.import_module(spec.MODULE)
    report = failures(spec, module, stop_early=False, names=names)
    report["rows"] = {kernel: len(table) for kernel, table in module.TABLES.items()}
    report["traffic"] = []
    for case in spec.TRAFFIC:
        if not names or case.name in names:
            report["traffic"] += [r for d in case.dtypes for r in traffic(case, getattr(torch, d), module, spec)]
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
