"""Bytes that each kernel has to move: every element of its inputs read once, every element of its outputs written once.

Sizes are named as in the op's docstring; `e` is the size of an element of the tokens. float32 row statistics count 4.
The gates hold the bytes that a launch touches to 1.05 times these; `make kernels-report` divides them by the memory's
bandwidth for a lower bound of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping


def _library_fwd(e: int, B: int, K: int, M: int, D: int, softmax: int) -> int:
    return e * (B * K * M + M * D + B * K * D) + 8 * B * K * softmax


def _library_bwd_logits(e: int, B: int, K: int, M: int, D: int, softmax: int) -> int:
    return e * (2 * B * K * M + M * D + B * K * D * (1 + softmax)) + 8 * B * K * softmax


def _library_bwd_library(e: int, B: int, K: int, M: int, D: int, softmax: int) -> int:
    return e * (B * K * M + M * D + B * K * D) + 8 * B * K * softmax


FORMULAS: dict[str, Callable[..., int]] = {
    "_library_prompts_fwd": _library_fwd,
    "_library_prompts_bwd_logits": _library_bwd_logits,
    "_library_prompts_bwd_library": _library_bwd_library,
}


def formula(kernel: str, itemsize: int, sizes: Mapping[str, int]) -> int:
    """Bytes of one launch of `kernel`."""
    return FORMULAS[kernel](itemsize, **sizes)
