"""Compare an op with its peers: check all against float64, time them in turn, tabulate at the end of the session.

A benchmark passes `compare` several ways to compute the same thing, ours first. All run on the same tensors and threads
and take turns in every round, so that drift of the machine cancels in the ratios. `bench/conftest.py` prints `RATIOS`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastprompt.kernels.native import level
from fastprompt.vit.linear import bfloat16_is_fast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, *([torch.bfloat16] if bfloat16_is_fast(torch.device(DEVICE)) else [])]
"""bfloat16 only if the processor or GPU multiplies it; otherwise PyTorch emulates it, which nobody would use."""
JOBS = ("forward", "forward+backward")
ROUNDS = 7
ROUND_SECONDS = 0.02  # a round repeats a call until it lasts about this long

Way = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Ratio:
    """A peer's time relative to ours: the median over rounds, and the second lowest and second highest."""

    op: str
    case: str
    peer: str
    median: float
    low: float
    high: float
    milliseconds: float


RATIOS: list[Ratio] = []


def tensor(*size: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    """Draw a random tensor on the benchmarked device."""
    return torch.randn(size, device=DEVICE, dtype=dtype, requires_grad=grad)


def compiled(way: Way) -> Way:
    """`torch.compile` of a peer for the shapes at hand, with dynamo's caches emptied first."""
    torch._dynamo.reset()
    return torch.compile(way, dynamic=False)


def _outputs(found: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _seconds(run: Callable[[], Any], repeats: int) -> float:
    _wait()
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait()
    return (time.perf_counter() - began) / repeats


def gradients(outputs: Tensor | Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of the sum of all outputs, with respect to `leaves`."""
    return list(torch.autograd.grad(sum(x.sum() for x in _outputs(outputs)), leaves))


def compare(
    benchmark: BenchmarkFixture,
    op: str,
    case: str,
    ways: dict[str, Way],
    arguments: Sequence[Tensor],
    job: str = "forward",
) -> None:
    """Check every way of computing an op against float64, then time them in turn.

    Args:
        ways: name → function of `arguments`; the first is ours, the last is plain PyTorch and serves as the oracle.
        arguments: tensors; under "forward+backward" those that require gradients get them.
        job: one of `JOBS`.

    Raises:
        AssertionError: an output or gradient is further from float64 than twice the plain way's own error; for a peer,
            than ten times, since a compiler adds up in another order.
    """
    trains = job == "forward+backward"
    oracle = list(ways.values())[-1]

    def results(way: Way, given: Sequence[Tensor]) -> list[Tensor]:
        with torch.set_grad_enabled(trains):
            outputs = _outputs(way(*given))
            return outputs + gradients(outputs, [x for x in given if x.requires_grad]) if trains else outputs

    wide = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in arguments]
    exact = results(oracle, wide)
    plain = [(a.double() - e).abs().max() for a, e in zip(results(oracle, arguments), exact, strict=True)]
    for name, way in ways.items():
        share = 2 if name == next(iter(ways)) else 10
        for found, expected, error in zip(results(way, arguments), exact, plain, strict=True):
            bound = share * error + torch.finfo(found.dtype).eps * expected.abs().max()
            worst = (found.double() - expected).abs().max()
            assert worst <= bound, f"{op}, {case}, {job}: {name} is off by {worst:.3g}, at most {bound:.3g} is allowed"
    take_turns(
        benchmark, op, f"{case}, {job}", {name: lambda way=way: results(way, arguments) for name, way in ways.items()}
    )


def take_turns(benchmark: BenchmarkFixture, op: str, case: str, runs: dict[str, Callable[[], Any]]) -> None:
    """Time all ways in turn, ours first, and record the ratio of each other way to ours."""
    repeats = {name: max(1, round(ROUND_SECONDS / max(1e-6, _seconds(run, 1)))) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            seconds[name].append(_seconds(run, repeats[name]))
    ours, *peers = runs
    for peer in peers:
        ratios = sorted(theirs / own for own, theirs in zip(seconds[ours], seconds[peer], strict=True))
        RATIOS.append(
            Ratio(
                op, case, peer, statistics.median(ratios), ratios[1], ratios[-2], 1e3 * statistics.median(seconds[ours])
            )
        )
    benchmark.extra_info |= {"seconds": seconds, "device": DEVICE, "level": level(), "threads": torch.get_num_threads()}
    benchmark.pedantic(runs[ours], rounds=3, iterations=repeats[ours])


def ratio_table() -> list[str]:
    """Return the lines of the session's table, one row per case."""
    if not RATIOS:
        return []
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU ({level()}), {torch.get_num_threads()} threads"
    lines = [f"time of the peer / time of fastprompt on {where}: median (second lowest to second highest round)"]
    cases: dict[tuple[str, str], dict[str, Ratio]] = {}
    for ratio in RATIOS:
        cases.setdefault((ratio.op, ratio.case), {})[ratio.peer] = ratio
    width = max(len(f"{op}: {case}") for op, case in cases)
    for (op, case), peers in cases.items():
        own = next(iter(peers.values())).milliseconds
        cells = [f"{peer} {r.median:.2f} ({r.low:.2f} to {r.high:.2f})" for peer, r in peers.items()]
        lines.append(f"{op + ': ' + case:<{width}}  {own:9.3f} ms   " + "   ".join(cells))
    return lines
