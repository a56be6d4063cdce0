"""What the gates have to know of an op: `<op>.py` here names its kernels, cases, byte formulas and mutations.

A specification is a module beside this one, named like the op, that holds

    MODULE = "fastprompt.kernels.library_prompts.triton"    # has TABLES: {kernel's name: (Tiles, ...)}
    CASES = [Case(...), ...]      small, odd sizes; they launch every row of every table (`family=` picks the part)
    def at_size(batch)            -> cases at the papers' sizes, for compiler, grid and report; nothing is computed
    FEW_PROGRAMS = {"kernel": {"case": why}}    cases of at_size whose shape allows no 132 programs at batch 32
    def formula(kernel, itemsize, sizes)        bytes of one launch, from kernel_bytes.py; `sizes` are the case's
    TRAFFIC = [Case(...), ...]    sizes at which distinct bytes are counted (about a hundred programs)
    LOADED_ONCE = {"kernel": ("argument", ...)}       arguments no element of which may be loaded twice
    CHECKS = [function, ...]      each is called with the kernels' module, in the interpreter, and asserts a property
    MUTATIONS = [(what, old source text, new source text), ...]      every one must turn a case or a check red;
        the text is that of `ast.unparse`: one statement a line, single quotes, no comments

How the gates are run (each prints one JSON object):

    TRITON_INTERPRET=1 python tests/kernels/gates/interpret.py <op> [case ...]   parity, launches, bounds, bytes, checks
    TRITON_INTERPRET=1 python tests/kernels/gates/mutate.py <op> [mutation ...]  each mutation and what it turned red
    python tests/kernels/gates/compile.py <op> [part ...]                        rows × parts × dtypes: spills

`run.py` runs them for each op with a triton.py and `verdict.py` says what is wrong in their output (`make gates`);
`quick.py` runs one case of each op (`make test`). There is nothing to add there.
A case's inputs come from `draw`: normal float64, or uninitialised memory where only shapes matter. They are rounded to
the dtype under test before anything reads them, so that all implementations see the same numbers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

Draw = Callable[..., Tensor]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call of an op, forward and backward.

    Attributes:
        inputs: draw → named inputs; floating-point tensors are cast to the dtype under test, except those in `kept`.
        kernel: (kernels' module, inputs) → tuple of outputs. reference: inputs → the same by PyTorch.
        grads: names of the inputs whose gradients are compared.
        sizes: what the byte formulas need.
        family: part whose table rows are used. dtypes: under test in the interpreter. compiled: ahead of time.
        exact: outputs must equal the reference's in the same dtype bit for bit, beside the tolerance.
        rivals: inputs → calls without gradients that `make gpu` times beside the reference.
    """

    name: str
    inputs: Callable[[Draw], Inputs]
    kernel: Callable[[ModuleType, Inputs], Sequence[Tensor]]
    reference: Callable[[Inputs], Sequence[Tensor]]
    grads: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    family: str = "sm_80"
    dtypes: tuple[str, ...] = ("float32", "float16")
    compiled: tuple[str, ...] = ("float32", "float16", "bfloat16")
    kept: tuple[str, ...] = ()
    exact: bool = False
    rivals: Callable[[Inputs], dict[str, Callable[[], Any]]] = lambda x: {}


def load_spec(op: str) -> ModuleType:
    """The specification `tests/kernels/gates/<op>.py`."""
    return importlib.import_module(op)


def cast(inputs: Inputs, dtype: Any, kept: tuple[str, ...], grads: tuple[str, ...]) -> Inputs:
    """Inputs with their floating-point tensors in `dtype`; those in `grads` are leaves."""
    out = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and name not in kept:
            value = value.to(dtype)
        if name in grads:
            value = value.detach().clone().requires_grad_()
        out[name] = value
    return out


def row_of(table: tuple[Any, ...], arguments: dict[str, Any]) -> int:
    """The row of a kernel's table that a launch was made with."""
    for i, row in enumerate(table):
        if all(arguments.get(name) == value for name, value in row.options.items()):
            return i
    raise LookupError(f"no row of the table has the tiles of the launch: {arguments}")
