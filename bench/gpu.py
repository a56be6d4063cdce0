"""Measure what only a GPU can show of the Triton kernels: `make gpu` writes results/gpu.json in at most eight minutes.

For each op, outputs and gradients are compared with float64 under the gates' tolerance, in three dtypes, at the gates'
and the papers' sizes. Two runs and a CUDA graph must give the same bits. Every kernel runs under compute-sanitizer's
memory and race checkers where that is installed. Then forward, and forward with backward, are timed in bfloat16 at the
papers' sizes beside PyTorch, eager and, for the first size, under torch.compile in three modes: CUDA events, medians of
interleaved rounds. Replays of whole models come last (`bench/gpu_graphs.py`).

A mismatch ends the run with an error, as does the end of the eight minutes; nothing is written then. If time gets
short, times of compiled PyTorch are null and models are timed in fewer rounds. Parity is never cut short.

`TRITON_INTERPRET=1 python bench/gpu.py --dry-run` takes the same path without a GPU: in Triton's interpreter, at small
sizes, without a graph and with a compiler that does nothing. Its times mean nothing; it shows that a wrong kernel is
found and that the report is complete.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import gpu_graphs
import torch
import triton
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "kernels" / "gates"))

from parity import compare, cotangents_of, drawn  # noqa: E402
from spec import Case, Inputs, cast, load_spec  # noqa: E402

OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/triton.py"))
COMPILED = ("default", "reduce-overhead", "max-autotune")
SECONDS = 480
OPS_UNTIL, MODELS_UNTIL = 0.65, 0.85  # share of the seconds; what has begun by then is finished in the rest
SANITIZER_SECONDS = 90


class Bench(NamedTuple):
    """How much to run, and on which device."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    rounds: int
    calls: int

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    def cases(self, spec: ModuleType) -> list[Case]:
        """Return the cases for parity: the gates' and the papers' sizes."""
        return spec.CASES[:1] if self.dry else [*spec.CASES, *spec.at_size(32)]

    def sized(self, spec: ModuleType, batch: int) -> list[Case]:
        """Return the cases to time: the papers' sizes."""
        return spec.CASES[:1] if self.dry else spec.at_size(batch)


GPU = Bench("cuda", (torch.float32, torch.float16, torch.bfloat16), rounds=9, calls=20)
DRY = Bench("cpu", (torch.float32, torch.float16), rounds=2, calls=1)  # the interpreter's bfloat16 products are wrong


def mismatches(bench: Bench, op: str, case: Case, module: ModuleType) -> dict[str, list[dict[str, Any]]]:
    """Return error, allowed error and repeatability of each output and gradient, by dtype.

    Raises:
        SystemExit: one of them is wrong.
    """
    found = {}
    for dtype in bench.dtypes:
        rows = compare(case, dtype, module, bench.device, runs=2)
        wrong = [row for row in rows if not row["ok"]]
        if wrong:
            raise SystemExit(f"{op} is wrong: {json.dumps(wrong, indent=1)}")
        found[str(dtype).split(".")[1]] = [{key: row[key] for key in ("tensor", "error", "budget")} for row in rows]
    return found


def step_of(
    call: Callable[[Inputs], Sequence[Tensor]], inputs: Inputs, grads: tuple[str, ...], cotangents: list[Tensor]
) -> Callable[[], list[Tensor]]:
    """Run forward and backward with these gradients of the outputs; return outputs and gradients."""
    leaves = [inputs[name] for name in grads]

    def step() -> list[Tensor]:
        outputs = list(call(inputs))
        kept = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        return [*outputs, *torch.autograd.grad([o for o, _ in kept], leaves, [c for _, c in kept])]

    return step


def replayed(bench: Bench, op: str, case: Case, module: ModuleType) -> str:
    """Capture forward and backward in a CUDA graph and compare a replay with an eager run, bit for bit."""
    if bench.dry:
        return "dry run"
    inputs = cast(drawn(case, bench.device), torch.bfloat16, case.kept, case.grads)
    step = step_of(lambda x: case.kernel(module, x), inputs, case.grads, cotangents_of(case.reference(inputs)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.detach().fill_(float("nan"))
    graph.replay()
    if not all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True)):
        raise SystemExit(f"{op}: a replayed graph gives other numbers than the eager call")
    return "replays bit for bit"


def alone(bench: Bench, *options: str) -> list[str]:
    """Return the command that launches kernels in a process of their own, see `launch`."""
    return [sys.executable, __file__, "--launch-only", *options, *(["--dry-run"] if bench.dry else [])]


def warmed(bench: Bench, ops: Sequence[str]) -> None:
    """Compile all kernels into Triton's cache, in one process per op and dtype: in turn it takes minutes."""
    names = [str(dtype).split(".")[1] for dtype in bench.dtypes]
    running = [
        subprocess.Popen(alone(bench, "--op", op, "--dtype", name), stderr=subprocess.PIPE, text=True)
        for op in ops
        for name in names
    ]
    problems = [process.communicate()[1] for process in running]
    for process, problem in zip(running, problems, strict=True):
        if process.returncode:
            raise SystemExit(f"{process.args}:\n{problem[-4000:]}")


def sanitized(bench: Bench) -> str:
    """Run every kernel once under compute-sanitizer, if it is installed; both checkers run at the same time."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "compute-sanitizer is not installed"
    running = {
        checker: subprocess.Popen(
            [tool, "--tool", checker, "--error-exitcode", "1", *alone(bench)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for checker in ("memcheck", "racecheck")
    }
    said, ends = [], time.monotonic() + SANITIZER_SECONDS
    try:
        for checker, process in running.items():
            try:
                printed = process.communicate(timeout=max(ends - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                said.append(f"{checker} did not finish in {SANITIZER_SECONDS} s")
                continue
            if process.returncode:
                raise SystemExit(f"compute-sanitizer, {checker}:\n{printed[0][-4000:]}{printed[1][-4000:]}")
            said.append(f"{checker} found nothing")
    finally:
        for process in running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return "compute-sanitizer: " + ", ".join(said)


def launch(bench: Bench, ops: Sequence[str], dtype: str | None) -> None:
    """Run the kernels forward and backward: the small cases in float16, or all cases of `mismatches` in `dtype`."""
    for op in ops:
        spec = load_spec(op)
        module = importlib.import_module(spec.MODULE)
        for case in bench.cases(spec) if bench.dry or dtype else spec.CASES:
            inputs = cast(drawn(case, bench.device), getattr(torch, dtype or "float16"), case.kept, case.grads)
            outputs = [o for o in case.kernel(module, inputs) if o.requires_grad]
            if case.grads:
                torch.autograd.grad(outputs, [inputs[name] for name in case.grads], outputs)


def timed(bench: Bench, steps: dict[str, Callable[[], Any]], deadline: float) -> dict[str, dict[str, float] | None]:
    """Return microseconds per call, median and quartiles over interleaved rounds; None if no time was left."""
    times: dict[str, list[float]] = {}
    for name, step in steps.items():
        if name.startswith("compile") and time.monotonic() > deadline:
            continue
        times[name] = []
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            step()
    for _ in range(bench.rounds):
        for name in times:
            began = _now(bench)
            for _ in range(bench.calls):
                torch.compiler.cudagraph_mark_step_begin()
                steps[name]()
            times[name].append(_since(began) / bench.calls)
    found: dict[str, dict[str, float] | None] = dict.fromkeys(steps)
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        found[name] = {"median": median, "low": low, "high": high}
    return found


def _now(bench: Bench) -> float | torch.cuda.Event:
    if bench.dry:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _since(began: float | torch.cuda.Event) -> float:
    """Return microseconds since `_now`."""
    if isinstance(began, float):
        return (time.perf_counter() - began) * 1e6
    end = torch.cuda.Event(enable_timing=True)
    end.record()
    end.synchronize()
    return began.elapsed_time(end) * 1000


def speed(bench: Bench, case: Case, module: ModuleType, modes: Sequence[str], deadline: float) -> dict[str, Any]:
    """Time the kernels, eager PyTorch, and its compiler in some modes."""
    inputs = cast(drawn(case, bench.device), torch.float16 if bench.dry else torch.bfloat16, case.kept, case.grads)
    calls: dict[str, Callable[[Inputs], Any]] = {"triton": lambda x: case.kernel(module, x), "eager": case.reference}
    torch._dynamo.reset()
    for mode in modes:
        options: dict[str, Any] = {"backend": "eager"} if bench.dry else {"mode": mode}
        calls[f"compile, {mode}"] = torch.compile(case.reference, **options)
    forward = {name: (lambda call=call: call(inputs)) for name, call in calls.items()} | case.rivals(inputs)
    cotangents = cotangents_of(case.reference(inputs))
    both = {name: step_of(call, inputs, case.grads, cotangents) for name, call in calls.items()}
    with torch.no_grad():
        found = {"case": case.name, "forward": timed(bench, forward, deadline)}
    return found | {"forward and backward": timed(bench, both, deadline)}


def measure(bench: Bench, ops: Sequence[str], began: float, seconds: float) -> dict[str, Any]:
    """Return the report; raise SystemExit on a mismatch.

    Args:
        began, seconds: start of the time allowed, by `time.monotonic`, and its length.
    """
    name = "Triton's interpreter" if bench.dry else torch.cuda.get_device_name()
    report: dict[str, Any] = {
        "device": name,
        "dry_run": bench.dry,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "python": sys.version.split()[0],
        "ops": {op: {} for op in ops},
    }
    if not bench.dry:
        warmed(bench, ops)
        print(f"compiled, {time.monotonic() - began:.0f} s", flush=True)
    with ThreadPoolExecutor(1) as pool:
        sanitizer = pool.submit(sanitized, bench)
        for op, found in report["ops"].items():
            spec = load_spec(op)
            module = importlib.import_module(spec.MODULE)
            found["parity"] = {case.name: mismatches(bench, op, case, module) for case in bench.cases(spec)}
            found["graph"] = replayed(bench, op, bench.sized(spec, 32)[0], module)
            print(f"{op}: parity, determinism and graph hold, {time.monotonic() - began:.0f} s", flush=True)
        report["sanitizer"] = sanitizer.result()
    print(f"{report['sanitizer']}, {time.monotonic() - began:.0f} s", flush=True)
    for i, (op, found) in enumerate(report["ops"].items()):
        spec = load_spec(op)
        module, now = importlib.import_module(spec.MODULE), time.monotonic()
        deadline = now + (began + OPS_UNTIL * seconds - now) / (len(ops) - i)
        found["microseconds"] = {
            str(batch): [
                speed(bench, case, module, COMPILED if i == 0 and batch > 1 else (), deadline)
                for i, case in enumerate(bench.sized(spec, batch))
            ]
            for batch in (1, 32)
        }
        print(f"{op}: timed, {time.monotonic() - began:.0f} s", flush=True)
    if not bench.dry:
        report["graphs"] = gpu_graphs.measure(deadline=began + MODELS_UNTIL * seconds)
    return report | {"seconds": round(time.monotonic() - began, 1)}


def main(*options: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="the same way in Triton's interpreter, at small sizes")
    parser.add_argument("--launch-only", action="store_true", help="only launch the kernels, for compute-sanitizer")
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; default all")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="with --launch-only: in this dtype, the papers' sizes too",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu.json")
    parser.add_argument("--seconds", type=float, help=f"that it may take; default {SECONDS}, dry without end")
    parser.add_argument(
        "--began", type=float, default=time.time(), help="when they began, as `date +%%s` prints it; default now"
    )
    arguments = parser.parse_args(options)
    if arguments.dry_run:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise SystemExit("--dry-run runs in Triton's interpreter: set TRITON_INTERPRET=1")
    elif not torch.cuda.is_available():
        raise SystemExit(
            "make gpu needs a CUDA or ROCm device and torch sees none; without one, `make test` runs the "
            "kernels in Triton's interpreter and compiles them for five parts"
        )
    elif os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set: the kernels would not run on the GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    bench = DRY if arguments.dry_run else GPU
    if arguments.launch_only:
        launch(bench, arguments.op or OPS, arguments.dtype)
        return
    began = time.monotonic() - (time.time() - arguments.began)
    seconds = arguments.seconds or (math.inf if bench.dry else SECONDS)
    if seconds < math.inf:
        faulthandler.dump_traceback_later(max(began + seconds - time.monotonic(), 0.1), exit=True)
    report = measure(bench, arguments.op or OPS, began, seconds)
    faulthandler.cancel_dump_traceback_later()
    temporary = arguments.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
