"""The library of C++ kernels (`csrc/`): whether it can be used, and the instruction set that it runs on.

It holds the CPU implementations of the operators `fastprompt::<op>_native`, whose schemas and fakes are in
`<op>/native.py`. `setup.py` builds it where a compiler and torch are found; one build serves every torch from 2.10.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

LEVELS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
"""Instruction sets, each with those before it."""
VARIABLE = "FASTPROMPT_NATIVE_LEVEL"
"""Environment variable that lowers the level; the CPU's own is the highest."""
PATH = Path(__file__).with_name("_native.abi3.so")
NOT_BUILT = (
    "the C++ kernels were not built; to build them, with torch and g++ 11 or newer installed, run "
    "`pip install --no-build-isolation .` in fastprompt's source tree"
)
"""Why there is no library: pip builds in an environment of its own, which has no torch, unless it is told not to."""

_level = "none"


def level() -> str:
    """The instruction set that the kernels run on: one of `LEVELS`, or "none" before the library was loaded."""
    return _level


def set_level(name: str) -> str:
    """Run on this instruction set, or the best below it that the CPU has; returns the one that runs from now on."""
    global _level
    _level = LEVELS[ctypes.CDLL(str(PATH)).fastprompt_set_level(ctypes.c_int64(LEVELS.index(name)))]
    return _level


@functools.cache
def obstacle() -> str:
    """Why the library cannot be used; empty: it is loaded."""
    if not PATH.is_file():
        return NOT_BUILT
    wanted = os.environ.get(VARIABLE) or LEVELS[-1]
    if wanted not in LEVELS:
        return f"{VARIABLE} must be one of {LEVELS}, got {wanted!r}"
    try:
        torch.ops.load_library(str(PATH))
        set_level(wanted)
    except (OSError, RuntimeError, AttributeError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        return f"the C++ kernels cannot be loaded with torch {torch.__version__}: {cause}"
    return ""
