"""The tool that measures tile sizes: what it tries, chooses and writes, and its way through a dry run."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

from gpu import OPS

from fastprompt.kernels.tiles import Tiles

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The tool, which imports modules of the gates."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "kernels" / "gates"))
    yield importlib.import_module("gpu.tune")
    for name in set(sys.modules) - before:
        if name.startswith("gpu.") or name in ("parity", "spec"):
            del sys.modules[name]


def test_candidates_differ_from_the_present_row_in_one_thing(tune: ModuleType) -> None:
    present = Tiles({"BLOCK": 4, "BLOCK_D": 256}, num_warps=4, num_stages=1, limits={"D": 512})
    found = tune.candidates(present)
    assert found[0] == present
    assert len(set(map(str, found))) == len(found)
    sizes = [row.sizes for row in found if row.sizes != present.sizes]
    assert sizes == [{"BLOCK": 2, "BLOCK_D": 256}, {"BLOCK": 8, "BLOCK_D": 256}, {"BLOCK": 4, "BLOCK_D": 128}]
    launches = {(row.num_warps, row.num_stages) for row in found if row.sizes == present.sizes}
    assert launches == {(warps, stages) for warps in (2, 4, 8) for stages in (1, 2)}
    assert {str(row.limits) for row in found} == {str(present.limits)}


def test_a_small_gain_replaces_nothing(tune: ModuleType) -> None:
    assert tune.best({0: 10.0, 1: 9.8, 2: 12.0}) == 0
    assert tune.best({0: 10.0, 1: 9.8, 2: 9.0}) == 2
    assert tune.best({0: 10.0}) == 0


@pytest.mark.parametrize("op", OPS)
def test_a_row_is_rewritten_in_its_place(op: str, tune: ModuleType) -> None:
    path = ROOT / "kernels" / op / "triton.py"
    tables = importlib.import_module(f"fastprompt.kernels.{op}.triton").TABLES
    for kernel, table in tables.items():
        for i, row in enumerate(table):
            new = row._replace(sizes=dict.fromkeys(row.sizes, 32), num_warps=2, num_stages=4)
            source = tune.rewritten(path.read_text(), kernel, i, new)
            names: dict[str, object] = {}
            text = source[source.index("TABLES = {") : source.index("\n}\n") + 3]
            exec(text, {"Tiles": Tiles}, names)
            assert names["TABLES"] == {**tables, kernel: (*table[:i], new, *table[i + 1 :])}
            assert source.replace(text, "") == path.read_text().replace(_tables(path.read_text()), "")
            assert tune.rewritten(source, kernel, i, row).count("Tiles(") == path.read_text().count("Tiles(")
    with pytest.raises(LookupError, match="no row 9 of"):
        tune.rewritten(path.read_text(), next(iter(tables)), 9, Tiles({}))


def _tables(source: str) -> str:
    return source[source.index("TABLES = {") : source.index("\n}\n") + 3]


def test_a_dry_run_measures_every_row_that_its_cases_use_and_writes_nothing() -> None:
    paths = os.pathsep.join(str(ROOT / part) for part in ("bench", ".", "tests/kernels/gates"))
    settings = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    before = (ROOT / "kernels" / "add_norm" / "triton.py").read_bytes()
    command = [sys.executable, "-W", "ignore", "-m", "gpu.tune", "--dry-run", "--ops", "add_norm"]
    ran = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    *rows, last = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [(row["kernel"], row["row"], len(row["µs"])) for row in rows] == [
        ("_add_norm_fwd", 0, 2),
        ("_add_norm_bwd", 0, 2),
    ]
    assert last["written"] is False
    assert (ROOT / "kernels" / "add_norm" / "triton.py").read_bytes() == before
    refused = subprocess.run([*command, "--write"], env={**os.environ, **settings}, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--write needs times" in refused.stderr
