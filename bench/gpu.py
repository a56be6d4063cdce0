"""What only a GPU can show of the Triton kernels, into results/gpu.json: `make gpu`.

Per op and dtype, at the papers' sizes: parity with float64 under the tolerance of the gates, outputs and gradients; the
same bits in two runs; time of forward and of forward with backward beside PyTorch's own (eager, torch.compile in its
default mode, reduce-overhead and max-autotune), by CUDA events, medians of interleaved rounds. Where compute-sanitizer
is installed, every kernel runs once under its memory and its race checker. Any mismatch ends the run with an error.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gpu_graphs
import torch
import triton

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench" / "gates"))

from spec import Case, Inputs, cast, load_spec  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COMPILED = ("default", "reduce-overhead", "max-autotune")
ROUNDS, CALLS = 9, 20


def drawn(case: Case, dtype: torch.dtype) -> Inputs:
    """The case's inputs on the GPU, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    inputs = case.inputs(lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64))
    moved = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    return cast(moved, dtype, case.kept, case.grads)


def run(call: Callable[[Inputs], Any], inputs: Inputs, grads: tuple[str, ...]) -> list[torch.Tensor]:
    """Outputs and gradients, for gradients of the outputs that are the same at every call."""
    outputs = list(call(inputs))
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    if grads:
        kept = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        leaves = [inputs[name] for name in grads]
        outputs += torch.autograd.grad([o for o, _ in kept], leaves, [c for _, c in kept])
    return [o.detach() for o in outputs]


def parity(case: Case, dtype: torch.dtype, module: ModuleType) -> list[dict[str, float]]:
    """Error and budget of each output and gradient; two runs must agree bit for bit."""
    rounded = drawn(case, dtype)
    inputs = cast(rounded, torch.float64, (), case.grads)
    exact = run(case.reference, inputs, case.grads)
    peer = run(case.reference, drawn(case, dtype), case.grads)
    found, again = (run(lambda x: case.kernel(module, x), drawn(case, dtype), case.grads) for _ in range(2))
    rows = []
    for i, (f, a, p, e) in enumerate(zip(found, again, peer, exact, strict=True)):
        if not torch.equal(f, a):
            raise SystemExit(f"{case.name}, {dtype}, tensor {i}: two runs differ, {(f != a).sum()} elements")
        error, reference = (float((t.double() - e).abs().max()) for t in (f, p))
        budget = 2 * reference + torch.finfo(p.dtype).eps * float(e.abs().max())
        if not error <= budget:
            raise SystemExit(f"{case.name}, {dtype}, tensor {i}: error {error} is above {budget}")
        rows.append({"error": error, "budget": budget})
    return rows


def timed(steps: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """Microseconds per call, median and quartiles over interleaved rounds."""
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(CALLS):
                step()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1000 / CALLS)
    found = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        found[name] = {"median": median, "low": low, "high": high}
    return found


def speed(case: Case, dtype: torch.dtype, module: ModuleType) -> dict[str, Any]:
    """Times of the kernels, eager PyTorch and its compilers."""
    inputs = drawn(case, dtype)
    calls: dict[str, Callable[[Inputs], Any]] = {"triton": lambda x: case.kernel(module, x), "eager": case.reference}
    for mode in COMPILED:
        torch._dynamo.reset()
        calls[f"compile, {mode}"] = torch.compile(case.reference, mode=mode)
    forward = {name: (lambda call=call: call(inputs)) for name, call in calls.items()}
    both = {name: (lambda call=call: run(call, inputs, case.grads)) for name, call in calls.items()}
    with torch.no_grad():
        found = {"forward": timed(forward)}
    return found | {"forward and backward": timed(both)}


def sanitize(op: str) -> str:
    """Every kernel once under compute-sanitizer, where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "compute-sanitizer is not installed"
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "1", sys.executable, __file__, "--parity", op]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
        if ran.returncode:
            raise SystemExit(f"compute-sanitizer {check} of {op}:\n{ran.stdout[-4000:]}{ran.stderr[-4000:]}")
    return "memcheck and racecheck found nothing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parity", metavar="OP", help="only the small cases of one op, in float16 and without times")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("make gpu needs a CUDA or ROCm device and torch sees none; without one, `make test` runs the "
                         "kernels in Triton's interpreter and compiles them for five parts")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set: the kernels would not run on the GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if arguments.parity:
        spec = load_spec(arguments.parity)
        for case in spec.CASES:
            parity(case, torch.float16, importlib.import_module(spec.MODULE))
        return
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                              "triton": triton.__version__, "cuda": torch.version.cuda, "rocm": torch.version.hip,
                              "ops": {}}
    for op in sorted(path.parent.name for path in (ROOT / "kernels").glob("*/triton.py")):
        spec = load_spec(op)
        module = importlib.import_module(spec.MODULE)
        found: dict[str, Any] = {"sanitizer": sanitize(op), "parity": {}, "microseconds": {}}
        for case in [*spec.CASES, *spec.at_size(32)]:
            for dtype in DTYPES:
                found["parity"][f"{case.name}, {dtype}"] = parity(case, dtype, module)
        for batch in (1, 32):
            case = spec.at_size(batch)[0]
            found["microseconds"][f"{case.name}, batch {batch}"] = speed(case, torch.bfloat16, module)
        report["ops"][op] = found
        print(f"{op}: parity and determinism hold", flush=True)
    report["graphs"] = gpu_graphs.measure()
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
