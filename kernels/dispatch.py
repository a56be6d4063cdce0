"""Which implementation of an op runs: asked for with `use_backend`, decided by device, installation and a measurement,
recorded.

Where kernels of an op, Triton's or the C++ ones, and its PyTorch reference both can run, "auto" times them once for
each signature of the arguments, on the arguments themselves, and keeps to the faster.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_leaves, tree_map_only

from fastprompt.kernels import native as library, stopwatch
from fastprompt.kernels.launch import Plans, unseen

BACKENDS = ("auto", "reference", "triton", "native")
NAMES = {"triton": "Triton", "native": "native"}

_wanted: ContextVar[str] = ContextVar("fastprompt_backend", default="auto")
_latest = "auto"  # what `use_backend` asked for last, in any context
COMPILES_CONTEXTS = TorchVersion(torch.__version__) >= "2.14"  # `torch.compile` before it cannot read a ContextVar
_in_graphs: ContextVar[bool] = ContextVar("fastprompt_native_in_graphs", default=False)
_replayed: ContextVar[bool] = ContextVar("fastprompt_replayed", default=False)


class Choice(NamedTuple):
    """The implementation that runs for an op, and why not a faster one, or the times of both where these were taken."""

    backend: str
    reason: str


class Settled(NamedTuple):
    """What was chosen for calls with the same arguments, and the plans of these calls."""

    choice: Choice
    plans: Plans


choices: dict[str, Choice] = {}  # the last choice of each op
measured: dict[tuple[Any, ...], dict[str, float]] = {}  # signature of a call → seconds of one call by implementation
failures: dict[tuple[Any, ...], str] = {}  # signature of a call → why its kernels cannot run
_warned: set[tuple[str, str]] = set()
_settled: dict[tuple[Any, ...], Settled] = {}  # by `call_of`
TIE = 1.02
"""Kernels, whose bits never change from call to call, run unless PyTorch is faster by more than this."""
CALLS = 16
"""Calls that a measurement on a GPU makes one after the other."""
BEYOND_CACHE = 256 << 20
"""Bytes of inputs among which the calls of a replayed measurement take turns: more than any L2 holds."""
REMEMBERED_ON = ("cuda",)
"""Types of device on which the host is what a small call waits for."""
MOST = 4096
"""Calls that are remembered; beyond that all are forgotten."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context, run every op by the named implementation: "auto", "reference", "triton" or "native".

    "auto" takes the faster of an op's kernels and PyTorch, measured at the first call of each shape. For CUDA and ROCm
    tensors these are the Triton kernels (unmeasured inside `torch.compile` and in a graph capture that meets the shape
    first), at inference on a CPU the native ones (PyTorch inside `torch.compile` and under a dispatch mode: compilers,
    exporters and counters know its operators; `native_in_graphs` allows the native ones there). PyTorch is the
    reference, or, training on a CPU, an op's `recompute.py`, the same with a backward that keeps its inputs alone.
    Kernels that raise when they are first timed give way to PyTorch, with a warning. An implementation that is asked
    for by name and cannot run is a `RuntimeError` that says why, never a silent detour; an op that has none of that
    name runs in PyTorch.

    Raises:
        ValueError: there is no such backend.
    """
    global _latest
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    token = _wanted.set(name)
    _latest = name
    try:
        yield
    finally:
        _wanted.reset(token)
        _latest = _wanted.get()


@contextmanager
def native_in_graphs() -> Iterator[None]:
    """Within this context, what `torch.export` makes of a model calls the native kernels where a call of the same
    signature, outside of it, has found them to be the faster; that graph is for this machine alone. Dynamic shapes and
    `torch.compile` itself get PyTorch's operators.
    """
    token = _in_graphs.set(True)
    try:
        yield
    finally:
        _in_graphs.reset(token)


@contextmanager
def for_graphs() -> Iterator[None]:
    """Within this context, choose for calls that a CUDA graph is going to replay.

    There the host costs nothing, so that "auto" times replayed calls, not launched ones, and remembers them apart.
    """
    token = _replayed.set(True)
    try:
        yield
    finally:
        _replayed.reset(token)


def wanted() -> str:
    """The backend that `use_backend` asks for here; in an older torch's compiler, that it asked for last."""
    return _wanted.get() if COMPILES_CONTEXTS or not torch.compiler.is_dynamo_compiling() else _latest


def call_of(op: str, *arguments: Any) -> tuple[Any, ...] | None:
    """All that checks and choice of a call depend on, beside the numbers in its tensors; None: it is not remembered.

    Args:
        arguments: tensors, None and hashable options; the first is a tensor.
    """
    first = arguments[0]
    if not isinstance(first, Tensor) or first.device.type not in REMEMBERED_ON or not unseen(first):
        return None
    kind = first.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    call: list[Any] = [op, _wanted.get(), torch.is_grad_enabled(), autocast, stopwatch.current(), _replayed.get()]
    for x in arguments:
        if isinstance(x, Tensor):
            call += (x.dtype, x.shape, x.stride(), x.device, x.requires_grad, type(x))
        else:
            call += (type(x), x)
    return tuple(call)


def recall(call: tuple[Any, ...] | None, backend: str) -> Plans | None:
    """The plans of such calls, which passed the op's checks and run by `backend`; None: that is not known."""
    if call is None:
        return None
    try:
        settled = _settled[call]
    except (KeyError, TypeError):  # TypeError: an argument cannot be hashed, which the op's checks refuse
        return None
    if settled.choice.backend != backend:
        return None
    choices[call[0]] = settled.choice
    return settled.plans


def choose(
    op: str,
    device: str,
    unsupported: str = "",
    recompute: bool = False,
    arguments: tuple[Any, ...] = (),
    native: str = "",
    call: tuple[Any, ...] | None = None,
) -> str:
    """The implementation of `op` on a device of type `device`: "reference", "recompute", "triton" or "native".

    Args:
        unsupported: why the Triton kernels cannot take this call; empty: they can.
        recompute: whether the op's `recompute.py` can take this call.
        arguments: of the call, as the implementations take them, to time two of them on; a tensor that is written must
            be detached, and is written then. None: Triton's kernels run untimed.
        native: why the native kernels, if the op has any, cannot take this call; empty: they can.
        call: `call_of` all arguments, which passed the op's checks: the choice is remembered for it.

    Raises:
        RuntimeError: the backend asked for cannot run.
    """
    asked = wanted()
    if (
        device == "cpu"
        and not native
        and torch.is_grad_enabled()
        and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
    ):
        native = "they have no backward, and gradients are recorded"
    choice = _decide(op, asked, device, unsupported, recompute, native)
    if choice.backend in ("triton", "native") and asked == "auto":
        choice = _faster(op, choice.backend, arguments)
        call = call if choice.reason not in UNTIMED else None
    choices[op] = choice
    if call is not None:
        if len(_settled) >= MOST:
            _settled.clear()
        _settled[call] = Settled(choice, {})
    return choice.backend


def _decide(op: str, wanted: str, device: str, unsupported: str, recompute: bool = False, native: str = "") -> Choice:
    obstacle = _obstacle(op, device, unsupported)
    if wanted == "reference":
        return Choice("reference", "asked for by use_backend")
    if wanted in NAMES and not _has_module(op, wanted):
        return Choice("recompute" if recompute else "reference", f"it has no {NAMES[wanted]} kernels")
    if wanted == "native":
        missing = _native_obstacle(op, device, native)
        if missing:
            raise RuntimeError(f"use_backend('native'): {op} cannot run, {missing}")
        return Choice("native", "asked for by use_backend")
    if not obstacle:
        return Choice("triton", "")
    if wanted == "triton":
        raise RuntimeError(f"use_backend('triton'): {op} cannot run, {obstacle}")
    if device == "cuda" and (op, obstacle) not in _warned:
        _warned.add((op, obstacle))
        warnings.warn(f"{op} runs its PyTorch reference on the GPU: {obstacle}", stacklevel=4)
    if device == "cpu" and _has_module(op, "native"):
        obstacle = _native_obstacle(op, device, native)
        if not obstacle:
            return Choice("native", "")
        if not native and obstacle == library.obstacle() and ("", obstacle) not in _warned:
            _warned.add(("", obstacle))
            warnings.warn(f"{op} runs in PyTorch, and so will other ops: {obstacle}", stacklevel=4)
    return Choice("recompute" if recompute else "reference", obstacle)


# What `torch.compiler.assume_constant_result` does, which imports torch._dynamo: seconds of every process that compiles
# nothing. `torch.compile(fullgraph=True)` of every op is tested.
_decide._dynamo_marked_constant = True  # type: ignore[attr-defined]


UNTIMED = ("", "it cannot be timed here")
"""Reasons of choices that a later call may make anew."""


def _faster(op: str, kernels: str, arguments: tuple[Any, ...]) -> Choice:
    """The faster of `kernels` and reference for calls like this one, timed at the first of them."""
    untimed = Choice("triton", UNTIMED[0]) if kernels == "triton" else Choice("reference", UNTIMED[1])
    if not arguments or torch.compiler.is_dynamo_compiling():
        return untimed
    in_graphs, compiling = kernels == "native" and _in_graphs.get(), torch.compiler.is_compiling()
    if compiling and not in_graphs:
        return untimed
    if kernels == "native" and not in_graphs and observed():
        return Choice("reference", "a dispatch mode or a tracer reads PyTorch's operators")
    leaves = arguments if kernels == "native" else tree_leaves(arguments)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    if in_graphs and any(not isinstance(size, int) for x in tensors for size in x.shape):
        return untimed
    device, trains = tensors[0].device, torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    where = (library.level(), torch.get_num_threads()) if kernels == "native" else (_part(device), _replayed.get())
    key = (
        op,
        trains,
        torch.is_autocast_enabled(device.type),
        where,
        *((x.dtype, x.shape, x.requires_grad) if isinstance(x, Tensor) else x for x in leaves),
    )
    if key not in measured and (compiling or in_graphs or not _can_be_timed(tensors)):
        return untimed

    def measure() -> str:
        if key not in measured:
            with torch.cuda.device_of(tensors[0]):

                def timer(backend: str) -> float:
                    step = _step(op, backend, arguments, trains)
                    if kernels == "native":
                        return seconds_on_cpu(step)
                    return (
                        seconds_replayed(_rotated(op, backend, arguments, trains)) if _replayed.get() else seconds(step)
                    )

                try:
                    of_kernels = timer(kernels)
                except Exception as error:  # they do not compile here, or need more of the device than it has
                    failures[key] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
                    of_kernels = float("inf")
                measured[key] = {kernels: of_kernels, "reference": timer("reference")}
        slower = measured[key][kernels] > TIE * measured[key]["reference"]
        return "reference" if slower or key in failures else kernels

    chosen = stopwatch.decide(key, measure, untimed.backend)
    if key in failures and chosen == "reference":
        reason = f"the {NAMES[kernels]} kernels failed: {failures[key]}"
        if (op, reason) not in _warned:
            _warned.add((op, reason))
            warnings.warn(f"{op} runs in PyTorch: {reason}", stacklevel=4)
        return Choice("reference", reason)
    times = measured.get(key)
    if times is None or chosen != measure():
        return Choice(chosen, "as this run chose before, or without a measurement")
    said = f"{times[kernels] * 1e6:.1f} µs, PyTorch {times['reference'] * 1e6:.1f} µs at this shape"
    said += f", {library.level()}" if kernels == "native" else ""
    if chosen == kernels:
        return Choice(kernels, f"the kernels took {said}")
    return Choice("reference", f"the {NAMES[kernels]} kernels are slower: they took {said}")


def _can_be_timed(tensors: list[Tensor]) -> bool:
    """Whether there is memory that can be computed on now: no fakes, no transforms, no graph being captured, no empty
    batch.
    """
    if not tensors[0].numel():
        return False
    if torch._C._are_functorch_transforms_active() or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
        return False
    return not (tensors[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _part(device: torch.device) -> str:
    """The part that a device is, so that all of its kind share what was measured on one."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _step(op: str, backend: str, arguments: tuple[Any, ...], trains: bool) -> Callable[[], None]:
    """One call of an implementation, with its backward where something trains; it leaves no gradient behind."""
    call = getattr(importlib.import_module(f"fastprompt.kernels.{op}.{backend}"), op)

    def step() -> None:
        own = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(trains and x.requires_grad), arguments)
        leaves = [x for x in tree_leaves(own) if isinstance(x, Tensor) and x.requires_grad]
        outputs = [x for x in tree_leaves(call(*own)) if x.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, leaves, [x.detach() for x in outputs], allow_unused=True)

    return step


def seconds_on_cpu(step: Callable[[], None]) -> float:
    """Shortest time of a step, after two calls that warm up."""
    times = []
    for _ in range(9):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return min(times[2:])


def _rotated(op: str, backend: str, arguments: tuple[Any, ...], trains: bool) -> list[Callable[[], None]]:
    """`_step` on copies of the arguments that do not fit into the L2 together."""
    size = sum(x.untyped_storage().nbytes() for x in tree_leaves(arguments) if isinstance(x, Tensor))
    copies = min(max(BEYOND_CACHE // max(size, 1), 1), CALLS)

    def copy(x: Tensor) -> Tensor:
        return x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)

    return [_step(op, backend, tree_map_only(Tensor, copy, arguments), trains) for _ in range(copies)]


def seconds(step: Callable[[], None]) -> float:
    """Seconds of a step that the host launches on the current GPU, one of many in a row: the median of five runs.

    Infinite if memory runs out.
    """
    return _seconds([step] * CALLS)


def seconds_replayed(steps: list[Callable[[], None]]) -> float:
    """Seconds of one of these steps in a CUDA graph that replays them; as launched, where they cannot be captured."""
    turns = [steps[i % len(steps)] for i in range(CALLS)]
    for step in steps[:2]:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for step in turns:
                step()
    except torch.OutOfMemoryError:
        return float("inf")
    except RuntimeError:
        return _seconds(turns)
    return _seconds([graph.replay]) / CALLS


def _seconds(steps: Sequence[Callable[[], None]]) -> float:
    """Mean seconds of these steps, one after the other, on the current GPU: the median of five runs."""
    try:
        for step in steps:  # what compiles now is not timed
            step()
        times = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for step in steps:
                step()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000 / len(steps))
        return statistics.median(times)
    except torch.OutOfMemoryError:
        return float("inf")


def observed() -> bool:
    """Whether a dispatch mode (a FLOP counter, for one) or a tracer reads the operators, which should be PyTorch's."""
    return bool(torch._C._len_torch_dispatch_stack()) or torch.jit.is_tracing()


def trains_on_cpu(*inputs: Tensor | None) -> bool:
    """Whether tensors on a CPU are used for a backward, outside of compilers and `torch.func`."""
    tensors = [t for t in inputs if t is not None]
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and all(t.device.type == "cpu" for t in tensors)
        and any(t.requires_grad for t in tensors)
    )


def _obstacle(op: str, device: str, unsupported: str) -> str:
    """Why the Triton kernels of `op` cannot run; empty: they can."""
    if not _has_module(op, "triton"):
        return "it has no Triton kernels"
    if not _has_triton():
        return "Triton is not installed"
    if device == "cuda" or (device == "cpu" and interpreting() and _wanted.get() == "triton"):
        return unsupported
    return f"Triton kernels take CUDA or ROCm tensors, these are on {device} (TRITON_INTERPRET=1 runs them on cpu)"


def _native_obstacle(op: str, device: str, unsupported: str) -> str:
    """Why the native kernels of `op` cannot run; empty: they can."""
    if not _has_module(op, "native"):
        return "it has no native kernels"
    if device != "cpu":
        return f"native kernels take CPU tensors, these are on {device}"
    return library.obstacle() or unsupported


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _has_module(op: str, name: str) -> bool:
    return (Path(__file__).parent / op / f"{name}.py").is_file()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
