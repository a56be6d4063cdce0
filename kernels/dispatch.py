"""Which implementation of an op runs: asked for with `use_backend`, decided by device and installation, recorded."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import torch

BACKENDS = ("auto", "reference", "triton", "native")

_wanted: ContextVar[str] = ContextVar("fastprompt_backend", default="auto")


class Choice(NamedTuple):
    """The implementation that runs for an op, and why not a faster one."""

    backend: str
    reason: str


choices: dict[str, Choice] = {}  # the last choice of each op
_warned: set[tuple[str, str]] = set()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context, run every op by the named implementation: "auto", "reference", "triton" or "native".

    "auto" takes the Triton kernels for CUDA and ROCm tensors and PyTorch elsewhere: the reference, or, training on a
    CPU, an op's `recompute.py`, the same with a backward that keeps its inputs alone. An implementation that is asked
    for by name and cannot run is a `RuntimeError` that says why, never a silent detour.

    Raises:
        ValueError: there is no such backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    token = _wanted.set(name)
    try:
        yield
    finally:
        _wanted.reset(token)


def wanted() -> str:
    """The backend that `use_backend` asks for here."""
    return _wanted.get()


def choose(op: str, device: str, unsupported: str = "", recompute: bool = False) -> str:
    """The implementation of `op` on a device of type `device`: "reference", "recompute", "triton" or "native".

    Args:
        unsupported: why the Triton kernels cannot take this call; empty: they can.
        recompute: whether the op's `recompute.py` can take this call.

    Raises:
        RuntimeError: the backend asked for cannot run.
    """
    choice = _decide(op, _wanted.get(), device, unsupported, recompute)
    choices[op] = choice
    return choice.backend


@torch.compiler.assume_constant_result
def _decide(op: str, wanted: str, device: str, unsupported: str, recompute: bool = False) -> Choice:
    obstacle = _obstacle(op, device, unsupported)
    if wanted == "reference":
        return Choice("reference", "asked for by use_backend")
    if wanted == "native":
        if not _has_module(op, "native"):
            raise RuntimeError(f"use_backend('native'): {op} has no native implementation")
        return Choice("native", "asked for by use_backend")
    if not obstacle:
        return Choice("triton", "")
    if wanted == "triton":
        raise RuntimeError(f"use_backend('triton'): {op} cannot run, {obstacle}")
    if device == "cuda" and (op, obstacle) not in _warned:
        _warned.add((op, obstacle))
        warnings.warn(f"{op} runs its PyTorch reference on the GPU: {obstacle}", stacklevel=4)
    return Choice("recompute" if recompute else "reference", obstacle)


def trains_on_cpu(*inputs: torch.Tensor | None) -> bool:
    """Whether tensors on a CPU are used for a backward, outside of compilers and `torch.func`."""
    tensors = [t for t in inputs if t is not None]
    return (torch.is_grad_enabled() and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()
            and all(t.device.type == "cpu" for t in tensors) and any(t.requires_grad for t in tensors))


def _obstacle(op: str, device: str, unsupported: str) -> str:
    """Why the Triton kernels of `op` cannot run; empty: they can."""
    if not _has_module(op, "triton"):
        return "it has no Triton kernels"
    if not _has_triton():
        return "Triton is not installed"
    if device == "cuda" or (device == "cpu" and interpreting() and _wanted.get() == "triton"):
        return unsupported
    return f"Triton kernels take CUDA or ROCm tensors, these are on {device} (TRITON_INTERPRET=1 runs them on cpu)"


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _has_module(op: str, name: str) -> bool:
    return (Path(__file__).parent / op / f"{name}.py").is_file()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
