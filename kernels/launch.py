"""Launches without the work that Triton and PyTorch do for callers who might be anybody."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST = 4096
"""Launches that are remembered; beyond that all are forgotten."""

Run = Callable[..., None]
Launch = tuple[Run, tuple[Any, ...]]
"""What runs a compiled kernel on a grid, and all its arguments."""

_remembered: dict[tuple[Any, ...], tuple[Run, tuple[Any, ...], Any]] = {}
_here = threading.local()  # `launches`: those of this thread while `again` writes them down


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)`, which binds and specialises all arguments, in a first call like this one.

    What it compiles for them depends on dtypes, on alignment to 16 bytes and on the numbers. A later call in which all
    of these are the same runs what was compiled then. Constants are the kernel's last parameters, and options.
    """
    key = (id(kernel), grid, *constants.items(), *[x if type(x) is int else _kind(x) for x in args])
    known = _remembered.get(key)
    if known is not None:
        run, rest, _ = known
        run(*args, *rest)
    else:
        compiled = kernel[grid](*args, **constants)
        if compiled is None:  # the interpreter compiles nothing
            return
        run, rest = compiled[(*grid, 1, 1)[:3]], tuple(constants[name] for name in kernel.arg_names[len(args) :])
        if len(_remembered) >= MOST:
            _remembered.clear()
        _remembered[key] = run, rest, kernel
    launches = getattr(_here, "launches", None)
    if launches is not None:
        launches.append((run, (*args, *rest)))


class Made(NamedTuple):
    """A tensor that a call allocates."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class View(NamedTuple):
    """A view of the tensor with number `base`; the offset is from its first element."""

    base: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Plan(NamedTuple):
    """A call of an op as its launches. Tensors have numbers: first the inputs, then what the call makes and views.

    Attributes:
        launches: what runs, and its arguments: a tensor's number, or another value in a tuple.
        outputs: the numbers of what the call returns.
    """

    tensors: tuple[Made | View, ...]
    launches: tuple[tuple[Run, tuple[Any, ...]], ...]
    outputs: tuple[int, ...]

    def run(self, inputs: Sequence[Tensor | None], device: torch.device) -> tuple[Tensor, ...]:
        """Make the call with other inputs."""
        tensors: list[Any] = list(inputs)
        for x in self.tensors:
            if isinstance(x, Made):
                tensors.append(torch.empty_strided(x.size, x.stride, dtype=x.dtype, device=device))
            else:
                base = tensors[x.base]
                tensors.append(base.as_strided(x.size, x.stride, base.storage_offset() + x.offset))
        for run, arguments in self.launches:
            run(*[tensors[x] if type(x) is int else x[0] for x in arguments])
        return tuple([tensors[i] for i in self.outputs])


Plans = dict[tuple[Any, ...], "Plan | None"]
"""By part, and by which of the inputs are aligned to 16 bytes; None: such a call cannot be planned."""


def again(
    plans: Plans | None,
    inputs: Sequence[Tensor | None],
    run: Callable[[], tuple[Tensor, ...]],
    part: tuple[Any, ...] = (),
) -> tuple[Tensor, ...]:
    """`run()`, which allocates, views and launches, and does nothing else.

    From the second call on only the launches are made again.

    Args:
        plans: those of calls whose arguments are the same, but for the numbers in tensors; None: `run()`.
        inputs: the tensors that it reads; the first is one.
        part: of the call, where it has several, and all else that this part's launches depend on.
    """
    if plans is None:
        return run()
    key = (*part, *[x is not None and x.data_ptr() % 16 == 0 for x in inputs])
    plan = plans.get(key)
    if plan is not None:
        first = inputs[0]
        assert first is not None
        with torch.cuda.device_of(first):
            return plan.run(inputs, first.device)
    given = [id(x) for x in inputs if x is not None]
    if key in plans or len(set(given)) < len(given):  # which of two arguments a launch read could not be told
        return run()
    launches: list[Launch] = []
    _here.launches = launches
    try:
        outputs = run()
    finally:
        _here.launches = None
    plans[key] = _plan(inputs, launches, outputs)
    return outputs


def _plan(inputs: Sequence[Tensor | None], launches: list[Launch], outputs: tuple[Tensor, ...]) -> Plan | None:
    """The plan of a call that was made; None: there is none."""
    known, tensors = list(inputs), list[Made | View]()
    places = [None if x is None else x.untyped_storage().data_ptr() for x in inputs]

    def number(x: Tensor) -> int:
        for i, other in enumerate(known):
            if other is x:
                return i
        place = x.untyped_storage().data_ptr() if x.numel() else None
        if place is None or place not in places:
            if x.numel() and (x.storage_offset() or x.untyped_storage().nbytes() != x.nbytes):
                raise LookupError("a part of a tensor that is not known")
            tensors.append(Made(x.size(), x.stride(), x.dtype))
        else:
            i = places.index(place)
            base = known[i]
            if base is None or base.dtype != x.dtype or places[: len(inputs)].count(place) > 1:
                raise LookupError("a view of something else")
            tensors.append(View(i, x.size(), x.stride(), int(x.storage_offset()) - int(base.storage_offset())))
        known.append(x)
        places.append(place)
        return len(known) - 1

    try:
        found = tuple([number(x) for x in outputs])  # before the launches, which write to views of them
        steps = [(run, tuple([number(x) if isinstance(x, Tensor) else (x,) for x in args])) for run, args in launches]
    except LookupError:
        return None
    return Plan(tuple(tensors), tuple(steps), found) if steps else None


def _kind(x: Any) -> tuple[Any, ...]:
    """What the compiled code of a kernel depends on in an argument that is no integer."""
    return (x.dtype, x.device, x.data_ptr() % 16 == 0) if isinstance(x, Tensor) else (type(x), x)


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉; Triton's own unwraps its arguments first, which takes several microseconds."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below n, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def unseen(x: Tensor) -> bool:
    """Whether nobody looks at the operators that run on `x`: no compiler, transform, dispatch mode or tensor subclass.

    Then an op's kernels can be launched without the dispatcher.
    """
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
    )


def trains(*tensors: Tensor | None) -> bool:
    """Whether a backward may come: gradients are recorded, and one of the tensors needs one."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
