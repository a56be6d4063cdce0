"""Runs an op's cases and checks in Triton's interpreter, see `spec`: `python bench/gates/interpret.py <op> [case ...]`.

Tolerance of every output and gradient: max|kernel − f64| ≤ 2 · max|PyTorch, same dtype − f64| + eps · max|f64|.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from spec import Case, Inputs, cast, load_spec, row_of
from torch import Tensor
from watch import Watch

from fastprompt.kernels.dispatch import interpreting
from fastprompt.kernels.tiles import as_family


def evaluate(call: Callable[[Inputs], Sequence[Tensor]], inputs: Inputs, grads: tuple[str, ...],
             cotangents: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by name; `cotangents` are the gradients of the outputs, filled on first use."""
    outputs = tuple(call(inputs))
    if not cotangents:
        generator = torch.Generator().manual_seed(1)
        cotangents += [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    if grads:
        scaled = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        torch.autograd.backward([o for o, _ in scaled], [c.to(o.dtype) for o, c in scaled])
        found |= {f"d {name}": inputs[name].grad for name in grads}
    return found


def error(found: Tensor, exact: Tensor) -> float:
    """max|found − exact|, infinite where the two are not finite in the same places."""
    found = found.double()
    if found.shape != exact.shape or not torch.equal(found.isnan(), exact.isnan()):
        return float("inf")
    if not torch.equal(found.isinf() * found.sign(), exact.isinf() * exact.sign()):
        return float("inf")
    difference = torch.where(exact.isfinite(), found - exact, torch.zeros_like(exact))
    return float(difference.abs().max()) if difference.numel() else 0.0


def same(found: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    """Assert that two tensors of one dtype and shape differ by at most `tolerance` of the largest value."""
    assert found is not None
    assert expected is not None
    assert found.dtype == expected.dtype
    worst, scale = error(found.detach(), expected.detach().double()), float(expected.detach().abs().max())
    assert worst <= tolerance * scale, f"differs by {worst}, largest value {scale}"


def compare(case: Case, dtype: torch.dtype, module: ModuleType, watch: Watch) -> list[dict[str, Any]]:
    """One row per output and gradient: error, budget, PyTorch's error."""
    generator = torch.Generator().manual_seed(0)
    drawn = case.inputs(lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64))
    rounded = cast(drawn, dtype, case.kept, ())
    cotangents: list[Tensor] = []
    peer = evaluate(case.reference, cast(rounded, dtype, case.kept, case.grads), case.grads, cotangents)
    exact = evaluate(case.reference, cast(rounded, torch.float64, (), case.grads), case.grads, cotangents)
    with as_family(case.family), watch:
        found = evaluate(lambda x: case.kernel(module, x), cast(rounded, dtype, case.kept, case.grads), case.grads,
                         cotangents)
    rows = []
    for name, value in found.items():
        scale = float(exact[name].nan_to_num(0, 0, 0).abs().max()) if exact[name].numel() else 0.0
        reference = error(peer[name], exact[name])
        budget = 2 * reference + torch.finfo(peer[name].dtype).eps * scale
        ok = error(value, exact[name]) <= budget and value.dtype == peer[name].dtype
        if case.exact and name.startswith("output"):
            ok = ok and torch.equal(value, peer[name])
        rows.append({"case": case.name, "dtype": str(dtype).split(".")[1], "tensor": name, "ok": ok,
                     "error": error(value, exact[name]), "budget": budget, "peer": reference})
    return rows


def launches_of(watch: Watch, tables: dict[str, Any], case: Case, dtype: str) -> list[dict[str, Any]]:
    """Which kernel and which row of its table ran, and its traffic."""
    return [{"case": case.name, "dtype": dtype, "kernel": launch.kernel, "grid": launch.grid,
             "row": row_of(tables[launch.kernel], launch.arguments), "distinct": launch.distinct,
             "loaded": launch.loaded} for launch in watch.launches]


def traffic(case: Case, dtype: torch.dtype, module: ModuleType, spec: ModuleType) -> list[dict[str, Any]]:
    """Distinct bytes of each launch beside the formula, with allocations that no launch of the call touches."""
    watch = Watch()
    compare(case, dtype, module, watch)
    rows = []
    used = set()
    for launch in watch.launches:
        used |= {region.start for region in launch.regions}
        twice = [region.names for region in launch.regions
                 for name in spec.LOADED_ONCE.get(launch.kernel, ())
                 if name in region.names and region.loaded > region.distinct]
        rows.append({"case": case.name, "dtype": str(dtype).split(".")[1], "kernel": launch.kernel,
                     "distinct": launch.distinct, "loaded": launch.loaded, "programs": len_grid(launch.grid),
                     "formula": spec.formula(launch.kernel, dtype.itemsize, case.sizes), "loaded_twice": twice})
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
                rows = compare(case, getattr(torch, dtype), module, watch)
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
