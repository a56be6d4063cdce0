"""Where stages run, how they take time there, and what the device itself can do."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu.jobs import Job, NotRun, Row

Call = Callable[[], Any]
PACKAGES = ("torch", "triton", "timm", "torchvision", "numpy", "transformers")


@dataclass(frozen=True)
class Place:
    """How much is run, and on what.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        dtypes: of parity. rounds: of times, in which all ways take turns. seconds: that a way's turn takes about.
        until: when, in seconds since 1970, the stage is over.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    rounds: int
    seconds: float
    until: float

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """That times are taken in."""
        return self.dtypes[-1]


def place(dry: bool, until: float) -> Place:
    """A GPU, or with `dry` Triton's interpreter, whose bfloat16 products are wrong."""
    torch.set_float32_matmul_precision("highest")
    if dry:
        return Place("cpu", (torch.float32, torch.float16), rounds=1, seconds=0.0, until=until)
    if not torch.cuda.is_available():
        raise RuntimeError(
            "torch sees no CUDA or ROCm device; without one, `make test` runs the kernels in Triton's interpreter and "
            "`make gates` compiles them for five parts"
        )
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return Place("cuda", (torch.float32, torch.float16, torch.bfloat16), rounds=9, seconds=0.01, until=until)


def synchronize(place: Place) -> None:
    if not place.dry:
        torch.cuda.synchronize()


def captured(place: Place, calls: Sequence[Call]) -> Call:
    """One launch of all the calls, after a run that compiles and warms up; a dry run calls them."""
    if place.dry:
        return lambda: [call() for call in calls]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]

    def replay() -> list[Any]:
        graph.replay()
        return kept

    return replay


def timed(place: Place, ways: dict[str, tuple[Call, int]]) -> dict[str, dict[str, float]]:
    """Microseconds of a call, median and quartiles over interleaved rounds.

    Args:
        ways: by name, a function and how many calls it makes. Each has run before.
    """
    repeats = dict.fromkeys(ways, 1)
    if not place.dry:
        repeats = {name: max(1, round(place.seconds / max(once(place, run), 1e-6))) for name, (run, _) in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(place.rounds):
        for name, (run, count) in ways.items():
            times[name].append(once(place, run, repeats[name]) * 1e6 / repeats[name] / count)
    return {name: spread(values) for name, values in times.items()}


def measure(
    place: Place,
    ways: dict[str, Callable[[], tuple[Call, int]]],
    bound: float,
    rest: Callable[[str], Row] = lambda way: {},
) -> list[Row]:
    """Rows of the ways' times, in turns; one that cannot be prepared fails alone.

    Args:
        ways: by name, what prepares a function and says how many calls it makes.
        bound: microseconds that a call takes at least; rows hold its share of their medians.
        rest: what else the row of a way holds.
    """
    ready, rows = dict[str, tuple[Call, int]](), list[Row]()
    for name, prepare in ways.items():
        try:
            ready[name] = prepare()
        except NotRun as reason:
            rows.append({"way": name, "not run": str(reason)})
        except Exception:
            rows.append({"way": name, "failed": traceback.format_exc(limit=-8)})
    for name, found in timed(place, ready).items():
        rows.append({"way": name, "µs": found, "% of the limit": 100 * bound / found["median"], **rest(name)})
    return rows


def once(place: Place, run: Call, repeats: int = 1) -> float:
    """Seconds of so many calls, until the device is idle again."""
    if place.dry:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high}


@functools.cache
def rates(place: Place) -> tuple[float, float]:
    """This device's bytes per second of a copy, reads and writes counted, and FLOP/s of a bfloat16 product."""
    size, n = (2**10, 16) if place.dry else (2**32, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=place.device).to(torch.bfloat16) for _ in range(2))
    ways = {"copy": (lambda: target.copy_(source), 1), "product": (lambda: a @ b, 1)}
    for run, _ in ways.values():
        run()
    times = timed(place, ways)
    return 2e6 * size / times["copy"]["median"], 2e6 * n**3 / times["product"]["median"]


def l2_bytes(place: Place) -> int:
    return 0 if place.dry else torch.cuda.get_device_properties(0).L2_cache_size


def device(place: Place) -> Iterator[Job]:
    """What there is, and its rates."""

    def versions() -> dict[str, Any]:
        found: dict[str, Any] = {"python": sys.version.split()[0]}
        for name in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
        return found | {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}

    def properties() -> dict[str, Any]:
        if place.dry:
            raise NotRun("Triton's interpreter")
        found = torch.cuda.get_device_properties(0)
        return {
            "name": found.name,
            "processors": found.multi_processor_count,
            "GiB": found.total_memory / 2**30,
            "L2 MiB": found.L2_cache_size / 2**20,
        }

    def measured() -> dict[str, Any]:
        copied, multiplied = rates(place)
        return {"copy TB/s": copied / 1e12, "8192³ bfloat16 product TFLOP/s": multiplied / 1e12}

    for what, run in (("versions", versions), ("properties", properties), ("rates", measured)):
        yield Job({"what": what}, lambda run=run: {"found": "; ".join(f"{k} {_short(v)}" for k, v in run().items())})


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def on_a_stream(place: Place) -> AbstractContextManager[Any]:
    """A stream of its own that begins behind what was launched before."""
    if place.dry:
        return contextlib.nullcontext()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether they have the same bits, NaN aside."""
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(found, expected, strict=True))
