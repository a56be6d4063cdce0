"""`pytest --benchmark-only` runs the throughput comparisons and nothing else; plain `pytest` runs none of them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import peers
import pytest
import torch


def collected(repository: Path, *arguments: str) -> set[str]:
    """Files of the tests that pytest would run from the root, started outside the pytest that runs this test."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-P", "-m", "pytest", "--collect-only", "-q", *arguments]
    ran = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert ran.returncode in (0, 5), ran.stdout + ran.stderr
    return {line.partition("::")[0] for line in ran.stdout.splitlines() if "::" in line}


def test_benchmark_only_collects_a_comparison_of_every_op_and_no_test(repository: Path) -> None:
    ops = {path.parent.name for path in (repository / "kernels").glob("*/reference.py")}
    found = collected(repository, "--benchmark-only")
    assert {f"bench/bench_{op}.py" for op in ops} | {"bench/bench_throughput.py"} <= found
    assert not [path for path in found if path.startswith("tests/")]
    assert "bench/bench_engine.py" not in found


def test_plain_pytest_runs_no_benchmark_and_a_named_long_one_is_found(repository: Path) -> None:
    assert collected(repository, "bench") == set()
    assert collected(repository, "bench/bench_swin.py", "--benchmark-only") == {"bench/bench_swin.py"}


class Recorder:
    """Stands in for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, object] = {}

    def pedantic(self, run: object, **_: object) -> None:
        assert callable(run)
        run()


def test_a_wrong_way_is_refused_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "RATIOS", [])
    x = torch.randn(3, 4, requires_grad=True)
    benchmark: object = Recorder()
    with pytest.raises(AssertionError, match="op, case, forward: fastprompt is off by"):
        peers.compare(benchmark, "op", "case", {"fastprompt": lambda x: 1.01 * x.exp(), "eager": torch.exp}, [x])
    gradient = {"fastprompt": lambda x: x.exp() + 0.1 * (x - x.detach()), "eager": torch.exp}
    with pytest.raises(AssertionError, match="fastprompt is off by"):
        peers.compare(benchmark, "op", "case", gradient, [x], "forward+backward")
    assert peers.ratio_table() == []


def test_a_peer_may_add_up_in_another_order_but_not_compute_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "RATIOS", [])
    benchmark: object = Recorder()
    x = torch.linspace(0, 1, 12)
    error = (x.exp().double() - x.double().exp()).abs().max()
    for times, fails in ((5, False), (30, True)):
        ways = {
            "fastprompt": torch.exp,
            "compiled": lambda x, by=times * error: x.double().exp().add(by).to(x.dtype),
            "eager": torch.exp,
        }
        with pytest.raises(AssertionError, match="compiled is off by") if fails else contextlib.nullcontext():
            peers.compare(benchmark, "op", "case", ways, [x])


def test_the_table_has_every_peer_in_units_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "RATIOS", [])
    durations = {"fastprompt": 1.0, "eager": 3.0, "compiled": 2.0}
    runs = {name: lambda name=name: name for name in durations}
    monkeypatch.setattr(peers, "_seconds", lambda run, repeats: durations[run()])
    peers.take_turns(Recorder(), "op", "case", runs)  # type: ignore[arg-type]
    table = "\n".join(peers.ratio_table())
    for cell in ("op: case", "eager 3.00 (3.00 to 3.00)", "compiled 2.00 (2.00 to 2.00)"):
        assert cell in table
