"""Every Triton kernel, without a GPU: interpreted, compiled for five parts, its bytes counted, its source broken.

The machinery is in `tests/kernels/gates`, with what it knows of each op; see `tests/kernels/gates/spec.py`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

ROOT = Path(__file__).resolve().parents[2]
GATES = ROOT / "tests" / "kernels" / "gates"
OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/triton.py"))
PARTS = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"]

Gate = Callable[[str, str], dict[str, Any]]


def of(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{name: row.get(name) for name in names} for row in rows]


def test_every_op_with_kernels_has_a_specification() -> None:
    assert "library_prompts" in OPS
    assert [op for op in OPS if not (GATES / f"{op}.py").exists()] == []


@pytest.mark.parametrize("op", OPS)
def test_outputs_and_gradients_match_float64(op: str, gate: Gate) -> None:
    rows = gate("interpret", op)["parity"]
    assert {row["dtype"] for row in rows} >= {"float32", "float16"}
    assert any(str(row.get("tensor")).startswith("d ") for row in rows)
    assert of([row for row in rows if not row["ok"]], "case", "dtype", "tensor", "error", "budget") == []


@pytest.mark.parametrize("op", OPS)
def test_every_row_of_every_table_runs(op: str, gate: Gate) -> None:
    report = gate("interpret", op)
    ran = {(launch["kernel"], launch["row"]) for launch in report["launches"]}
    assert ran == {(kernel, row) for kernel, count in report["rows"].items() for row in range(count)}
    assert max(report["rows"].values()) <= 4


@pytest.mark.parametrize("op", OPS)
def test_properties(op: str, gate: Gate) -> None:
    checks = gate("interpret", op)["checks"]
    assert checks
    assert {name: problem for name, problem in checks.items() if problem} == {}


@pytest.mark.parametrize("op", OPS)
def test_bytes_touched_are_those_of_the_formula(op: str, gate: Gate) -> None:
    rows = gate("interpret", op)["traffic"]
    launches = [row for row in rows if row["kernel"]]
    assert {row["kernel"] for row in launches} == set(gate("interpret", op)["rows"])
    for row in launches:
        assert 0.9 * row["formula"] <= row["distinct"] <= 1.05 * row["formula"], row
        assert row["loaded_twice"] == [], row
    assert [row for row in rows if row.get("idle")] == []


@pytest.mark.parametrize("op", OPS)
def test_broken_kernels_turn_the_gates_red(op: str, gate: Gate) -> None:
    found = gate("mutate", op)
    assert len(found) >= 10
    assert [mutation for mutation, red in found.items() if not red] == []


@pytest.mark.parametrize("op", OPS)
def test_compiles_for_every_part(op: str, gate: Gate) -> None:
    report = gate("compile", op)
    assert [row for row in report["builds"] if "error" in row] == []
    for dtype in ("float32", "float16", "bfloat16"):
        built = {(row["kernel"], row["row"], row["part"]) for row in report["builds"] if row["dtype"] == dtype}
        assert built == {tuple(row[:3]) for row in report["needed"] if row[3] == dtype}
    assert {part for _, _, part, _ in report["needed"]} == set(PARTS)


@pytest.mark.parametrize("op", OPS)
def test_machine_code(op: str, gate: Gate) -> None:
    names = ("kernel", "row", "part", "dtype", "constants", "registers", "spilled", "shared")
    builds = gate("compile", op)["builds"]
    assert of([row for row in builds if row["spilled"]], *names) == []
    assert of([row for row in builds if row["shared"] > row["shared_limit"]], *names) == []
    assert of([row for row in builds if row["dtype"] == "float32" and row["reduced"]], *names, "reduced") == []
    products = [row for row in builds if row["dtype"] != "float32" and row["dots"]]
    assert of([row for row in products if not row["matrix"]], *names) == []
    assert of([row for row in builds if not row["wide"]], *names) == []


@pytest.mark.parametrize("op", OPS)
def test_enough_programs_at_batch_32(op: str, gate: Gate) -> None:
    grids = [row for row in gate("compile", op)["grids"] if row["batch"] == 32]
    assert grids
    assert of([row for row in grids if row["programs"] < 132 and not row["few"]], "case", "kernel", "row", "grid") == []


@pytest.mark.parametrize("op", OPS)
def test_no_library_product_stands_in_for_a_kernel(op: str) -> None:
    tree = ast.parse((ROOT / "kernels" / op / "triton.py").read_text())
    host = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.decorator_list)]
    used = {
        node.attr
        for part in host
        for node in ast.walk(part)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) != "ctx"
    }
    banned = {"matmul", "mm", "bmm", "baddbmm", "einsum", "linear", "softmax", "layer_norm", "cat", "contiguous"}
    assert used & banned == set()
    assert not any(isinstance(node, ast.MatMult) for part in host for node in ast.walk(part))


@pytest.mark.parametrize("op", OPS)
def test_kernels_have_no_block_pointers_and_no_atomics(op: str) -> None:
    source = (ROOT / "kernels" / op / "triton.py").read_text()
    assert re.findall(r"make_block_ptr|tl\.advance|tl\.atomic\w*|autotune", source) == []


@pytest.mark.parametrize("op", OPS)
def test_works_with_triton_absent(op: str) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib, fastprompt.kernels.dispatch as d\n"
        f"importlib.import_module('fastprompt.kernels.{op}')\n"
        f"print(d.choose({op!r}, 'cpu')); print(d._decide({op!r}, 'auto', 'cuda', '').reason)"
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.splitlines() == ["reference", "Triton is not installed"], ran.stderr
