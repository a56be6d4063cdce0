"""The Triton kernels without a GPU: one case of each op here, all of them in `make gates`.

The machinery is in `tests/kernels/gates`, with what it knows of each op; see `tests/kernels/gates/spec.py`.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

ROOT = Path(__file__).resolve().parents[2]
GATES = ROOT / "tests" / "kernels" / "gates"
OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/triton.py"))

Load = Callable[[str], ModuleType]


def test_every_op_with_kernels_has_a_specification() -> None:
    assert "library_prompts" in OPS
    assert [op for op in OPS if not (GATES / f"{op}.py").exists()] == []


def quick(interpreted: bool) -> dict[str, Any]:
    """What `quick.py` reports: interpreter and compiler need a process each."""
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpreted)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(GATES / "quick.py")]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout)


def test_one_case_of_each_op_matches_float64_forward_and_backward(gates: Load) -> None:
    verdict, reports = gates("verdict"), quick(interpreted=True)
    assert list(reports) == OPS
    assert {op: verdict.of_parity(report) for op, report in reports.items()} == {op: [] for op in OPS}
    assert all(report["launches"] for report in reports.values())
    assert all(report["mutations"] >= verdict.LEAST_MUTATIONS for report in reports.values())


def test_one_kernel_of_each_op_compiles(gates: Load) -> None:
    verdict, reports = gates("verdict"), quick(interpreted=False)
    assert list(reports) == OPS
    assert {op: verdict.of_code(report["builds"]) for op, report in reports.items()} == {op: [] for op in OPS}
    assert all(row["registers"] > 0 for report in reports.values() for row in report["builds"])


def test_all_gates_were_green_for_these_kernels(gates: Load) -> None:
    run = gates("run")
    results = json.loads(run.RESULTS.read_text()) if run.RESULTS.exists() else {}
    if results.get("digest") != run.digest():
        pytest.skip("results/gates.json is not of these kernels and gates: run `make gates` and commit it")
    assert list(results["ops"]) == OPS
    assert {op: found["problems"] for op, found in results["ops"].items()} == {op: [] for op in OPS}
    assert all(red for found in results["ops"].values() for red in found["mutations"].values())


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


def test_ops_work_with_triton_absent() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib, fastprompt.kernels.dispatch as d\n"
        f"for op in {OPS}:\n"
        "    importlib.import_module(f'fastprompt.kernels.{op}')\n"
        "    print(op, d.choose(op, 'cpu'), d._decide(op, 'auto', 'cuda', '').reason)"
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.splitlines() == [f"{op} reference Triton is not installed" for op in OPS], ran.stderr
