"""Tile sizes of the Triton kernels, measured on the GPU at hand: `make tune PY=python3`.

    PYTHONPATH=.:bench:tests/kernels/gates python -m gpu.tune [--ops OP ...] [--seconds 480] [--write] [--dry-run]

A kernel's table has a row for each kind of call: a family of parts, limits on dtype and sizes. The rows and their
kinds stay as they are; what is measured is which tiles, warps and stages a row should launch with, over all cases of
the papers' sizes that it serves. So a table cannot grow, and no shape has tiles of its own. For every row of this
device's family, candidates around the present one take turns in captured graphs; the one with the smallest geometric
mean of its times over the cases wins, if it is faster than the present one by more than `GAIN`.

What was measured is printed as JSON lines. `--write` puts the winners into the kernels' sources; run `make gates`
after that. `--dry-run` takes the same way in Triton's interpreter at small sizes; its times say nothing and it writes
nothing.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from parity import cotangents_of, drawn
from spec import Case, cast, load_spec

from fastprompt.files import atomic_write
from fastprompt.kernels import launch, tiles
from fastprompt.kernels.tiles import Tiles
from gpu import OPS
from gpu.device import Call, Place, captured, place, timed
from gpu.ops import BATCHES, sized, step_of

GAIN = 0.03
"""What a row has to gain before it is replaced; less is noise."""
WARPS, STAGES = (1, 2, 4, 8), (1, 2, 3, 4)
LARGEST_TILE = 256


class Use(NamedTuple):
    """A row of a kernel's table, and the cases that launch with it."""

    kernel: str
    row: int
    cases: tuple[tuple[Case, torch.dtype], ...]


def candidates(present: Tiles) -> list[Tiles]:
    """The present row first, then those that differ from it in one tile size by a factor of two, or in the launch."""
    found = [present]
    for name, size in present.sizes.items():
        for other in (size // 2, size * 2):
            if 1 <= other <= LARGEST_TILE:
                found.append(present._replace(sizes={**present.sizes, name: other}))
    for warps, stages in itertools.product(WARPS, STAGES):
        near = abs(math.log2(warps / present.num_warps)) <= 1 and abs(stages - present.num_stages) <= 1
        if near and (warps, stages) != (present.num_warps, present.num_stages):
            found.append(present._replace(num_warps=warps, num_stages=stages))
    return found


def uses(here: Place, op: str, module: ModuleType) -> list[Use]:
    """The rows of this device's part that the papers' sizes launch with."""
    found: dict[tuple[str, int], list[tuple[Case, torch.dtype]]] = {}
    names = {id(table): kernel for kernel, table in module.TABLES.items()}

    for batch, dtype in itertools.product(BATCHES[:1] if here.dry else BATCHES, here.dtypes):
        for case in sized(here, op, batch):
            picked: list[tuple[str, int]] = []

            def pick(table: tuple[Tiles, ...], device: torch.device, **sizes: int) -> Tiles:
                row = tiles.pick(table, device, **sizes)
                picked.append((names[id(table)], next(i for i, x in enumerate(table) if x is row)))  # noqa: B023
                return row

            with mock.patch.object(module, "pick", pick):
                run(here, module, case, dtype)()
            for use in dict.fromkeys(picked):
                found.setdefault(use, []).append((case, dtype))
    return [Use(kernel, row, tuple(cases)) for (kernel, row), cases in found.items()]


def run(here: Place, module: ModuleType, case: Case, dtype: torch.dtype) -> Call:
    """The case's forward, with its backward where it has one."""
    inputs = cast(drawn(case, here.device), dtype, case.kept, case.grads)
    if not case.grads:
        return lambda: case.kernel(module, inputs)
    cotangents = cotangents_of(list(case.reference(inputs)))
    return step_of(lambda x: case.kernel(module, x), inputs, case.grads, cotangents)


def microseconds(here: Place, module: ModuleType, use: Use, tried: Sequence[Tiles]) -> dict[int, float]:
    """Geometric mean of the times over the cases, by position of the candidate; without those that do not run."""
    table, logs = module.TABLES[use.kernel], dict[int, list[float]]()
    for case, dtype in use.cases:
        ready: dict[str, tuple[Call, int]] = {}
        for i, row in enumerate(tried):
            other = (*table[: use.row], row, *table[use.row + 1 :])
            with mock.patch.dict(module.TABLES, {use.kernel: other}), mock.patch.dict(launch._remembered, clear=True):
                try:
                    ready[str(i)] = captured(here, [run(here, module, case, dtype)]), 1
                    ready[str(i)][0]()
                except Exception as error:  # more registers or shared memory than there are, a product of too few rows
                    ready.pop(str(i), None)
                    if i == 0:
                        raise
                    report({"kernel": use.kernel, "row": use.row, "candidate": options(row), "failed": _line(error)})
        for i, found in timed(here, ready).items():
            logs.setdefault(int(i), []).append(math.log(found["median"]))
    return {i: math.exp(sum(of) / len(of)) for i, of in logs.items() if len(of) == len(use.cases)}


def best(times: Mapping[int, float]) -> int:
    """The candidate to launch with: the present one, number 0, unless another is faster by more than `GAIN`."""
    first = min(times, key=lambda i: times[i])
    return first if times[first] < (1 - GAIN) * times[0] else 0


def options(row: Tiles) -> dict[str, int]:
    return dict(row.options)


def rewritten(source: str, kernel: str, row: int, new: Tiles) -> str:
    """A kernels' source with other tiles in a row of a table; families and limits stay.

    Raises:
        LookupError: there is no such row.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and [ast.unparse(x) for x in node.targets] == ["TABLES"]:
            tables = ast.literal_eval(ast.unparse(_keys(node.value)))
            if kernel in tables and isinstance(node.value, ast.Dict):
                rows = node.value.values[tables.index(kernel)]
                if isinstance(rows, ast.Tuple) and row < len(rows.elts):
                    return _replaced(source, rows.elts[row], new)
    raise LookupError(f"no row {row} of {kernel} in this source")


def _keys(value: ast.expr) -> ast.List:
    return ast.List([key for key in value.keys if key is not None] if isinstance(value, ast.Dict) else [], ast.Load())


def _replaced(source: str, call: ast.expr, new: Tiles) -> str:
    """`source` with another call of `Tiles` at the place of this one."""
    assert isinstance(call, ast.Call)
    kept = [x for x in call.keywords if x.arg in ("families", "limits")]
    parts = ["{" + ", ".join(f'"{name}": {size}' for name, size in new.sizes.items()) + "}"]
    defaults = Tiles({})
    for name in ("num_warps", "num_stages"):
        if getattr(new, name) != getattr(defaults, name):
            parts.append(f"{name}={getattr(new, name)}")
    lines = source.splitlines(keepends=True)
    parts += [f"{x.arg}={ast.get_source_segment(source, x.value)}" for x in kept]

    def offset(line: int, column: int) -> int:  # ast counts columns in bytes
        before = lines[line - 1].encode()[:column].decode()
        return sum(map(len, lines[: line - 1])) + len(before)

    assert call.end_lineno is not None
    assert call.end_col_offset is not None
    begin, end = offset(call.lineno, call.col_offset), offset(call.end_lineno, call.end_col_offset)
    return source[:begin] + f"Tiles({', '.join(parts)})" + source[end:]


def tuned(here: Place, ops: Sequence[str]) -> Iterator[tuple[str, Use, Tiles]]:
    """The winners (op, row, tiles) of the rows that gain something, until the time is over."""
    for op in ops:
        module = importlib.import_module(load_spec(op).MODULE)
        for use in uses(here, op, module):
            if time.time() > here.until:
                report({"op": op, "kernel": use.kernel, "row": use.row, "not run": "the time is over"})
                continue
            tried = candidates(module.TABLES[use.kernel][use.row])
            times = microseconds(here, module, use, tried[:2] if here.dry else tried)
            chosen = best(times)
            row: dict[str, Any] = {"op": op, "kernel": use.kernel, "row": use.row, "cases": len(use.cases)}
            row |= {"µs": {json.dumps(options(tried[i])): round(value, 3) for i, value in times.items()}}
            report(row | {"chosen": options(tried[chosen]), "gain": round(1 - times[chosen] / times[0], 3)})
            if chosen:
                yield op, use, tried[chosen]


def report(row: Mapping[str, Any]) -> None:
    print(json.dumps(row, ensure_ascii=False), flush=True)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, help="ops to tune (all)")
    parser.add_argument("--seconds", type=float, default=480, help="after which no other row is begun")
    parser.add_argument("--write", action="store_true", help="put the winners into the kernels' sources")
    parser.add_argument("--dry-run", action="store_true", help="in Triton's interpreter, at small sizes")
    given = parser.parse_args(arguments)
    if given.dry_run and given.write:
        parser.error("--write needs times, which a dry run does not take")
    here, count = place(given.dry_run, time.time() + given.seconds), 0
    for op, use, new in tuned(here, given.ops):
        count += 1
        if given.write:
            path = Path(importlib.import_module(load_spec(op).MODULE).__file__ or "").resolve()
            atomic_write(path, rewritten(path.read_text(), use.kernel, use.row, new))
    report({"rows that gain": count, "written": bool(given.write and count)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
