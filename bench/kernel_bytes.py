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


def _attention_fwd(e: int, B: int, H: int, R: int, T: int, P: int, D: int, n: int, W: int, runs: int) -> int:
    return e * H * (D * (2 * B * R + 2 * B * T + 2 * n * P) + W * R * T) + 4 * B * H * R


def _attention_bwd_queries(e: int, B: int, H: int, R: int, T: int, P: int, D: int, n: int, W: int, runs: int) -> int:
    return e * H * (D * (4 * B * R + 2 * B * T + 2 * n * P) + W * R * T) + 8 * B * H * R


def _attention_bwd_tokens(e: int, B: int, H: int, R: int, T: int, P: int, D: int, n: int, W: int, runs: int) -> int:
    return e * H * (D * (2 * B * R + 4 * B * T) + W * R * T) + 8 * B * H * R


def _attention_bwd_prefix(e: int, B: int, H: int, R: int, T: int, P: int, D: int, n: int, W: int, runs: int) -> int:
    return e * H * D * (3 * B * R + 2 * n * P) + 4 * B * H * R + 2 * n * runs * P * H * D * (e if runs == 1 else 4)


def _attention_sum_runs(e: int, B: int, H: int, R: int, T: int, P: int, D: int, n: int, W: int, runs: int) -> int:
    return 2 * n * P * H * D * (4 * runs + e)


FORMULAS: dict[str, Callable[..., int]] = {
    "_library_prompts_fwd": _library_fwd,
    "_library_prompts_bwd_logits": _library_bwd_logits,
    "_library_prompts_bwd_library": _library_bwd_library,
    "_prefix_attention_fwd": _attention_fwd,
    "_prefix_attention_bwd_queries": _attention_bwd_queries,
    "_prefix_attention_bwd_tokens": _attention_bwd_tokens,
    "_prefix_attention_bwd_prefix": _attention_bwd_prefix,
    "_prefix_attention_sum_runs": _attention_sum_runs,
}


def formula(kernel: str, itemsize: int, sizes: Mapping[str, int]) -> int:
    """Bytes of one launch of `kernel`."""
    return FORMULAS[kernel](itemsize, **sizes)
