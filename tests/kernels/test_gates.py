"""The gates' own rules: what they call a problem, and when their results are of this tree."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Load = Callable[[str], ModuleType]
PARTS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = ("float32", "float16", "bfloat16")


def interpreted() -> dict[str, Any]:
    """A report without a problem: one kernel with two rows."""
    launch = {"kernel": "k", "case": "a", "formula": 100, "distinct": 100, "loaded_twice": []}
    return {
        "parity": [
            {"case": "a", "dtype": dtype, "tensor": tensor, "ok": True, "error": 0.0, "budget": 1.0}
            for dtype in ("float32", "float16")
            for tensor in ("output 0", "d x")
        ],
        "launches": [{"kernel": "k", "row": 0}, {"kernel": "k", "row": 1}],
        "rows": {"k": 2},
        "checks": {"check_registration": ""},
        "traffic": [launch, {"kernel": "", "case": "a", "idle": 0}],
    }


def compiled() -> dict[str, Any]:
    """A report without a problem: one row for every part and dtype."""
    build = {"kernel": "k", "row": 0, "spilled": 0, "shared": 9, "shared_limit": 10, "reduced": [], "dots": 1}
    build |= {"constants": {}, "registers": 8, "matrix": 2, "wide": 3}
    return {
        "builds": [{**build, "part": part, "dtype": dtype} for part in PARTS for dtype in DTYPES],
        "needed": [["k", 0, part, dtype] for part in PARTS for dtype in DTYPES],
        "grids": [{"case": "a", "kernel": "k", "row": 0, "batch": 32, "grid": [132], "programs": 132, "few": ""}],
    }


def test_reports_without_a_problem_are_green(gates: Load) -> None:
    verdict = gates("verdict")
    assert verdict.of_interpreter(interpreted()) == []
    assert verdict.of_compiler(compiled()) == []
    assert verdict.of_mutations({f"mutation {i}": "check_x" for i in range(10)}) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda r: r["parity"][3].update(ok=False), "wrong: case a, dtype float16, tensor d x"),
        (lambda r: r["parity"].__delitem__(slice(2, None)), "no case in float16"),
        (lambda r: [row.update(tensor="output 0") for row in r["parity"]], "no gradient is compared"),
        (lambda r: r["launches"].pop(), "row 1 of k did not run"),
        (lambda r: r["rows"].update(k=5), "k has 5 rows"),
        (lambda r: r["checks"].update(check_registration="Traceback"), "check_registration: Traceback"),
        (lambda r: r["checks"].clear(), "no checks"),
        (lambda r: r["traffic"].pop(0), "no bytes of k were counted"),
        (lambda r: r["traffic"][0].update(distinct=106), "bytes: kernel k, case a, distinct 106, formula 100"),
        (lambda r: r["traffic"][0].update(distinct=89), "bytes: kernel k, case a, distinct 89, formula 100"),
        (lambda r: r["traffic"][0].update(loaded_twice=[["tokens"]]), "loaded twice: kernel k"),
        (lambda r: r["traffic"][1].update(idle=4), "idle bytes: case a, idle 4"),
    ],
)  # fmt: skip
def test_what_the_interpreter_finds_wrong_is_a_problem(gates: Load, change: Callable[[Any], Any], problem: str) -> None:
    report = interpreted()
    change(report)
    found = gates("verdict").of_interpreter(report)
    assert any(each.startswith(problem) for each in found), found


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda r: r["builds"].pop(), "not built: ('k', 0, 'gfx942', 'bfloat16')"),
        (lambda r: r["builds"][0].update(error="no"), "not compiled: kernel k, row 0, part sm_80"),
        (lambda r: r["needed"].pop(), "built and in no table: ('k', 0, 'gfx942', 'bfloat16')"),
        (lambda r: r["needed"].__delitem__(slice(3, 6)), "no build for sm_90"),
        (lambda r: r["builds"][0].update(spilled=8), "spills: kernel k"),
        (lambda r: r["builds"][0].update(shared=11), "shared memory: kernel k"),
        (lambda r: r["builds"][0].update(reduced=[".TF32"]), "float32 products in fewer bits: kernel k"),
        (lambda r: r["builds"][1].update(matrix=0), "no matrix instruction: kernel k"),
        (lambda r: r["builds"][1].update(wide=0), "no access of 16 bytes: kernel k"),
        (lambda r: r["grids"][0].update(programs=131), "few programs: case a"),
        (lambda r: r["grids"][0].update(batch=1), "no grid at batch 32"),
    ],
)
def test_what_the_compiler_finds_wrong_is_a_problem(gates: Load, change: Callable[[Any], Any], problem: str) -> None:
    report = compiled()
    change(report)
    found = gates("verdict").of_compiler(report)
    assert any(each.startswith(problem) for each in found), found


def test_what_a_rule_does_not_ask_is_no_problem(gates: Load) -> None:
    report = compiled()
    report["builds"][0].update(matrix=0)  # float32 has no matrix instructions
    report["builds"][1].update(dots=0, matrix=0, reduced=[".TF32"])
    report["grids"][0].update(programs=1, few="its shape allows no more")
    assert gates("verdict").of_compiler(report) == []


def test_a_mutation_that_survives_and_too_few_of_them_are_problems(gates: Load) -> None:
    verdict, found = gates("verdict"), {f"mutation {i}": "check_x" for i in range(10)}
    assert verdict.of_mutations(found | {"eps forgotten": ""}) == ["survived: eps forgotten"]
    assert verdict.of_mutations({"one": "check_x"}) == ["1 mutations, 10 are needed"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with one kernel and one gate."""
    for name in ("kernels/op/triton.py", "tests/kernels/gates/op.py", "tests/kernels/test_op.py"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(name)
    return tmp_path / "tree"


def test_the_digest_is_of_contents_wherever_and_whenever_they_lie(gates: Load, tree: Path, tmp_path: Path) -> None:
    run = gates("run")
    digest = run.digest(tree)
    shutil.copytree(tree, tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere" / "kernels/op/triton.py", (1, 1))
    (tmp_path / "elsewhere" / "kernels/_native.abi3.so").write_bytes(b"built here")
    (tmp_path / "elsewhere" / "kernels/op/native.py").write_text("no Triton")
    (tmp_path / "elsewhere" / "tests/kernels/test_op.py").write_text("another test")
    assert run.digest(tmp_path / "elsewhere") == digest


@pytest.mark.parametrize("name", ["kernels/op/triton.py", "tests/kernels/gates/op.py", "kernels/op/more.py"])
def test_a_change_of_kernels_or_gates_changes_the_digest(gates: Load, tree: Path, name: str) -> None:
    run = gates("run")
    digest = run.digest(tree)
    (tree / name).write_text("changed")
    assert run.digest(tree) != digest


def test_a_file_under_another_name_changes_the_digest(gates: Load, tree: Path) -> None:
    run = gates("run")
    digest = run.digest(tree)
    (tree / "kernels/op/triton.py").rename(tree / "kernels/op/other.py")
    assert run.digest(tree) != digest


def test_the_gates_run_where_results_are_of_other_kernels_or_red(
    gates: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, ran = gates("run"), list[tuple[str, str]]()
    mutations = {f"mutation {i}": "check_x" for i in range(10)}
    reports = {"interpret": interpreted(), "compile": compiled(), "mutate": mutations}

    def gate(script: str, op: str) -> Any:
        ran.append((script, op))
        return copy.deepcopy(reports[script])

    for name, value in {
        "gate": gate,
        "RESULTS": tmp_path / "gates.json",
        "ops": lambda: ["op"],
        "digest": lambda: digests[-1],
    }.items():
        monkeypatch.setattr(run, name, value)
    everything = [("interpret", "op"), ("compile", "op"), ("mutate", "op")]
    digests = ["first"]

    def main() -> tuple[int, list[tuple[str, str]], str]:
        ran.clear()
        return run.main(["--if-changed"]), list(ran), capsys.readouterr().out

    mutations["eps forgotten"] = ""
    red = (1, everything, "op: survived: eps forgotten\n")
    assert main() == red
    assert main() == red  # what was red runs again
    assert json.loads((tmp_path / "gates.json").read_text())["ops"]["op"]["problems"] == ["survived: eps forgotten"]
    mutations["eps forgotten"] = "odd sizes"
    assert main() == (0, everything, "1 ops, all gates green\n")
    assert main() == (0, [], "results/gates.json is of these kernels and gates\n")
    digests.append("second")
    assert main() == (0, everything, "1 ops, all gates green\n")
    assert json.loads((tmp_path / "gates.json").read_text())["digest"] == "second"
