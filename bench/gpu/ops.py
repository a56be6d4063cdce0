"""Stages of the ops: do all kernels compile, are they right, and how fast are they.

The gates' cases and their tolerance, from `tests/kernels/gates`: at most twice PyTorch's own error in the same dtype.
"""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from cost import FORMULAS
from parity import compare, cotangents_of, drawn
from spec import Case, Inputs, cast, load_spec
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastprompt.kernels.prefix_attention import reference
from gpu import OPS
from gpu.device import Call, Place, captured, l2_bytes, measure, on_a_stream, place, rates, same, synchronize
from gpu.jobs import Job, NotRun, Row

TINY = {  # sizes of the case of a dry run, by position as the gates' `case` takes them
    "adaptive_prompts": (2, 3, 2, 16, 2),
    "add_norm": (2, 3, 16),
    "library_prompts": (2, 2, 5, 16),
    "prefix_attention": (2, 1, 2, 3, 2, 16),
    "vae_prompts": (2, 2, 1, 1, 16, 3, 4),
}
BATCHES = (32, 1)
COMPILED = ("default", "max-autotune-no-cudagraphs")
COMPILE_SECONDS = 30.0
MOST_COPIES = 32  # of a case's inputs, rotated so that none of them is still in the L2
TURNS = 4  # of each stream or thread
VENDORS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def small(place: Place, op: str) -> list[Case]:
    """The gates' cases; a smaller one in a dry run."""
    spec = load_spec(op)
    return [spec.case("tiny", *TINY[op])] if place.dry else spec.CASES


def sized(place: Place, op: str, batch: int) -> list[Case]:
    """The papers' sizes; the small one in a dry run."""
    return small(place, op) if place.dry else load_spec(op).at_size(batch)


def module_of(op: str) -> Any:
    return importlib.import_module(load_spec(op).MODULE)


def step_of(
    call: Callable[[Inputs], Sequence[Tensor]], inputs: Inputs, grads: tuple[str, ...], cotangents: list[Tensor]
) -> Callable[[], list[Tensor]]:
    """One forward with backward, for these gradients of the outputs; returns outputs and gradients."""
    leaves = [inputs[name] for name in grads]

    def step() -> list[Tensor]:
        outputs = list(call(inputs))
        kept = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        return [*outputs, *torch.autograd.grad([o for o, _ in kept], leaves, [c for _, c in kept])]

    return step


def compiled(place: Place) -> Iterator[Job]:
    """Compile all kernels into Triton's cache, a process for each op and dtype at the same time."""
    names = [str(dtype).split(".")[1] for dtype in place.dtypes]
    if place.dry:
        for op in OPS:
            yield Job({"op": op, "dtype": names[0]}, lambda op=op: launch(place, op, names[0]))
        return
    began = time.monotonic()
    running = {
        (op, name): subprocess.Popen(
            [sys.executable, "-m", "gpu.ops", op, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for op in OPS
        for name in names
    }

    def wait(process: subprocess.Popen[str]) -> Row:
        try:
            printed = process.communicate(timeout=max(place.until - time.time(), 0.1))[0]
        except subprocess.TimeoutExpired:
            process.kill()
            raise NotRun("it did not finish; later stages compile the rest") from None
        if process.returncode:
            raise RuntimeError(printed[-4000:])
        return {"seconds": time.monotonic() - began}

    for (op, name), process in running.items():
        yield Job({"op": op, "dtype": name}, lambda process=process: wait(process))


def launch(place: Place, op: str, dtype: str, cases: Sequence[Case] | None = None) -> Row:
    """Run forward and backward of an op's kernels, without looking at what they compute; by default all cases."""
    module, began = module_of(op), time.monotonic()
    if cases is None:
        cases = [*small(place, op), *([] if place.dry else sized(place, op, 32))]
    for case in cases:
        inputs = cast(drawn(case, place.device), getattr(torch, dtype), case.kept, case.grads)
        outputs = [o for o in case.kernel(module, inputs) if o.requires_grad]
        if case.grads:
            torch.autograd.grad(outputs, [inputs[name] for name in case.grads], outputs)
    synchronize(place)
    return {"seconds": time.monotonic() - began}


def parity(place: Place) -> Iterator[Job]:
    """Every op against float64, the same bits twice, then in a graph, on streams and in threads; then whole models."""
    for op in OPS:
        for case in [*small(place, op), *([] if place.dry else sized(place, op, 32))]:
            for dtype in place.dtypes:
                labels = {"op": op, "case": case.name, "dtype": str(dtype).split(".")[1]}
                yield Job(labels, lambda op=op, case=case, dtype=dtype: against_float64(place, op, case, dtype))
    for op in ["library_prompts"] if place.dry else OPS:
        case = sized(place, op, 32)[0]
        for how, run in (("replayed", replayed), ("two streams", on_streams), ("two threads", in_threads)):
            labels = {"op": op, "case": case.name, "dtype": str(place.dtype).split(".")[1], "how": how}
            yield Job(labels, lambda run=run, op=op, case=case: run(place, op, case))
    from gpu import models

    yield from models.replays(place)


def against_float64(place: Place, op: str, case: Case, dtype: torch.dtype) -> Row:
    """The tensor that is nearest to its budget."""
    rows = compare(case, dtype, module_of(op), place.device, runs=2)
    wrong = [f"{row['tensor']}: {row}" for row in rows if not row["ok"]]
    if wrong:
        raise AssertionError("wrong, or not the same bits twice:\n" + "\n".join(wrong))
    shares = {row["tensor"]: row["error"] / row["budget"] if row["budget"] else 0.0 for row in rows}
    return {
        "tensors": len(rows),
        "worst": max(shares, key=lambda name: shares[name]),
        "of budget": max(shares.values()),
    }


def stepper(place: Place, op: str, case: Case) -> Callable[[], list[Tensor]]:
    """Forward and backward of the kernels on inputs of its own."""
    module, inputs = module_of(op), cast(drawn(case, place.device), place.dtype, case.kept, case.grads)
    return step_of(lambda x: case.kernel(module, x), inputs, case.grads, cotangents_of(case.reference(inputs)))


def replayed(place: Place, op: str, case: Case) -> Row:
    """What a replay leaves, beside an eager call."""
    step = stepper(place, op, case)
    expected = [x.detach().clone() for x in step()]
    replay = captured(place, [step])
    (found,) = replay()
    if not place.dry:
        for x in found:
            x.detach().fill_(float("nan"))
        replay()
        synchronize(place)
    return bits(found, expected)


def on_streams(place: Place, op: str, case: Case) -> Row:
    """Calls on two streams at the same time."""
    steps = [stepper(place, op, case) for _ in range(1 if place.dry else 2)]
    expected, found = [x.detach().clone() for x in steps[0]()], []
    synchronize(place)
    streams = [on_a_stream(place) for _ in steps]
    for _ in range(1 if place.dry else TURNS):
        for step, stream in zip(steps, streams, strict=True):
            with stream:
                found += step()
    synchronize(place)
    return bits(found, expected * (len(found) // len(expected)))


def in_threads(place: Place, op: str, case: Case) -> Row:
    """Calls of two threads, each on a stream of its own; the interpreter takes one thread."""
    expected, found = [x.detach().clone() for x in stepper(place, op, case)()], []
    failed: list[Exception] = []
    synchronize(place)

    def work() -> None:
        try:
            with on_a_stream(place):
                step = stepper(place, op, case)
                own = [x for _ in range(1 if place.dry else TURNS) for x in step()]
            synchronize(place)
            found.extend(own)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(1 if place.dry else 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return bits(found, expected * (len(found) // len(expected)))


def bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Row:
    if not same(found, expected):
        raise AssertionError("other bits than those of one call alone")
    return {"tensors": len(found), "worst": "the same bits"}


def times(place: Place) -> Iterator[Job]:
    """Times of all ops at the papers' sizes beside eager peers, then, where time is left, beside compiled ones."""
    batches = BATCHES[:1] if place.dry else BATCHES
    cases = [(op, batch, case) for batch in batches for op in OPS for case in sized(place, op, batch)]
    for peers, seconds, note in ((eager_ways, 0.0, ""), (compiled_ways, 2 * COMPILE_SECONDS, ", beside compilers")):
        for op, batch, case in cases:
            if seconds and place.dry and op != "library_prompts":
                continue
            for job in ("forward", "forward and backward") if case.grads else ("forward",):
                yield Job(
                    {"op": op, "case": case.name, "batch": batch, "job": job + note},
                    lambda op=op, case=case, job=job, peers=peers: beside(place, op, case, job, peers(place, op, case)),
                    0.0 if place.dry else seconds,
                )


Way = Callable[[Inputs], Sequence[Tensor]]


def eager_ways(place: Place, op: str, case: Case) -> dict[str, Way]:
    """The reference and, for attention, the vendors' kernels on concatenated keys and values."""
    ways: dict[str, Way] = {"eager": case.reference}
    if op == "prefix_attention" and not case.sizes["W"]:
        vendors = {} if place.dry else VENDORS
        ways |= {f"cat + {name}": lambda x, kind=kind: concatenated(x, kind) for name, kind in vendors.items()}
    return ways


def compiled_ways(place: Place, op: str, case: Case) -> dict[str, Way]:
    torch._dynamo.reset()
    modes = (
        {"compiled": {"backend": "eager"}} if place.dry else {f"compiled, {mode}": {"mode": mode} for mode in COMPILED}
    )
    return {name: torch.compile(case.reference, dynamic=False, **options) for name, options in modes.items()}


def concatenated(x: Inputs, vendor: SDPBackend) -> tuple[Tensor]:
    """The inputs of an attention case through one of PyTorch's kernels."""
    prefix = x["prefix"].permute(2, 0, 3, 1, 4).unbind(0) if "prefix" in x else (x.get("prefix_k"), x.get("prefix_v"))
    q, k, v = reference.unpacked(x["q"], x.get("k"), x.get("v"))
    with sdpa_kernel(vendor):
        k, v = reference.with_prefix(prefix[0], k), reference.with_prefix(prefix[1], v)
        return (F.scaled_dot_product_attention(q, k, v),)


def beside(place: Place, op: str, case: Case, job: str, peers: dict[str, Way]) -> list[Row]:
    """Times of the kernels and their peers, with shares of what copies and products of this device allow."""
    module, trains = module_of(op), job != "forward"
    first = cast(drawn(case, place.device), place.dtype, case.kept, case.grads)
    with torch.set_grad_enabled(trains), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        outputs = list(case.reference(first))
        cotangents = cotangents_of(outputs)
        if trains:
            step_of(case.reference, first, case.grads, cotangents)()
    forward, backward = nbytes(first.values()) + nbytes(outputs), 0
    if trains:  # reads inputs and outputs again, and gradients of outputs; writes gradients of inputs
        backward = forward + nbytes(cotangents) + nbytes(first[name] for name in case.grads)
    copied, multiplied = rates(place)
    bound = 1e6 * max((forward + backward) / copied, counter.get_total_flops() / multiplied)
    copies = min(MOST_COPIES, math.ceil(2 * l2_bytes(place) / (forward + 1))) or 1
    inputs = [first, *(cast(first, place.dtype, case.kept, case.grads) for _ in range(copies - 1))]
    if not case.grads:
        inputs = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in x.items()} for x in inputs]

    def prepare(call: Way) -> tuple[Call, int]:
        if trains:
            return captured(place, [step_of(call, x, case.grads, cotangents) for x in inputs]), len(inputs)
        with torch.no_grad():
            return captured(place, [lambda x=x: call(x) for x in inputs]), len(inputs)

    ways = {"Triton": lambda x: case.kernel(module, x), **peers}
    with torch.set_grad_enabled(trains):
        return measure(place, {name: lambda call=call: prepare(call) for name, call in ways.items()}, bound)


def nbytes(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors among them, each memory once."""
    return sum({x.untyped_storage().data_ptr(): x.nbytes for x in tensors if isinstance(x, Tensor)}.values())


def main(ops: str, dtype: str, which: str = "") -> None:
    """Launch the kernels of some ops and nothing else, for compilers and profilers.

    which: "small", the gates' sizes alone; "large", the first of the papers' sizes; empty: all.
    """
    here = place(dry=False, until=math.inf)
    for op in ops.split(","):
        cases = {"small": small, "large": lambda here, op: sized(here, op, 32)[:1]}.get(which)
        launch(here, op, dtype, None if cases is None else cases(here, op))


if __name__ == "__main__":
    main(*sys.argv[1:])
