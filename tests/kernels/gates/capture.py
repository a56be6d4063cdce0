"""Captures the launches of an op without running them: in a process without TRITON_INTERPRET, on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from spec import Case, cast, row_of
from torch import Tensor
from triton.runtime.jit import JITFunction

from fastprompt.kernels.tiles import as_family

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Captured:
    """A launch as the compiler sees it, and its grid."""

    function: JITFunction
    row: int
    grid: tuple[int, ...]
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def kernel(self) -> str:
        return self.function.__name__

    @property
    def programs(self) -> int:
        count = 1
        for n in self.grid:
            count *= n
        return count

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for launches that compile to the same code."""
        return self.kernel, self.signature, self.constexprs, self.aligned, self.options


def describe(
    function: JITFunction, tables: dict[str, Any], grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Captured:
    """Specialise a launch as Triton's own launcher does: types, constants, arguments divisible by 16."""
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    bound = function.signature.bind(*args, **kwargs)
    bound.apply_defaults()
    signature, constexprs, aligned = [], [], []
    for i, parameter in enumerate(function.params):
        value = bound.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature.append((parameter.name, "constexpr"))
            constexprs.append((parameter.name, value))
        elif isinstance(value, Tensor):
            signature.append((parameter.name, POINTERS[value.dtype]))
            if value.data_ptr() % 16 == 0:
                aligned.append(i)
        elif isinstance(value, bool):
            signature.append((parameter.name, "u1"))
        elif isinstance(value, int):
            signature.append((parameter.name, "i32" if -INT32_MAX <= value <= INT32_MAX else "i64"))
            if value % 16 == 0:
                aligned.append(i)
        else:
            signature.append((parameter.name, "fp32"))
    grid = grid(bound.arguments) if callable(grid) else grid
    row = row_of(tables[function.__name__], {**bound.arguments, **options})
    return Captured(
        function, row, tuple(grid), tuple(signature), tuple(constexprs), tuple(aligned), tuple(options.items())
    )


@contextmanager
def capturing(tables: dict[str, Any]) -> Iterator[list[Captured]]:
    """Within this context kernels are recorded instead of run."""
    found: list[Captured] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append(describe(self, tables, grid, args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        yield found


def capture(case: Case, module: ModuleType, dtype: torch.dtype, part: str) -> list[Captured]:
    """Launches of a case's forward and backward on a part."""
    inputs = case.inputs(lambda *shape: torch.empty(*shape, dtype=dtype))
    with as_family(part), capturing(module.TABLES) as found:
        outputs = [o for o in case.kernel(module, cast(inputs, dtype, case.kept, case.grads)) if o.requires_grad]
        if case.grads:
            torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])
    return found
