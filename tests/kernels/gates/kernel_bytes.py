"""Bytes that each kernel has to move: every element of its inputs read once, every element of its outputs written once.

Sizes are named as in the op's docstring; `e` is the size of an element of the tokens. float32 row statistics count 4.
Where a sum is cut into shares so that enough programs work on it, its float32 shares are an output of one launch and an
input of the next.
The gates hold the bytes that a launch touches to 1.05 times these; `make kernels-report` divides them by the memory's
bandwidth for a lower bound of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping


def _library_fwd(e: int, B: int, K: int, M: int, D: int, softmax: int, norm: int, N: int, F: int, P: int) -> int:
    copied = 2 * B * N * D + (1 + B) * F * D + P * D  # N patches behind F prefix rows, P rows of position embedding
    return e * (B * K * M + M * D + B * K * D * (1 + norm) + 2 * D * norm + copied) + 8 * B * K * softmax


def _library_bwd_norm(e: int, B: int, K: int, D: int, **rest: int) -> int:
    return e * (3 * B * K * D + D)


def _library_bwd_logits(e: int, B: int, K: int, M: int, D: int, softmax: int, **rest: int) -> int:
    return e * (2 * B * K * M + M * D + B * K * D * (1 + softmax)) + 8 * B * K * softmax


def _library_bwd_library(e: int, B: int, K: int, M: int, D: int, softmax: int, **rest: int) -> int:
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


def _vae_fwd(e: int, L: int, B: int, S: int, M: int, D: int, Z: int, H: int, noise: int, **rest: int) -> int:
    decoder = Z * H + H + M * D * (H + 1)
    return e * (2 * B * Z + decoder + L * S * D + L * B * (S + M) * D) + 4 * B + 16 * noise


def _vae_bwd_decoder(e: int, L: int, B: int, S: int, M: int, D: int, Z: int, H: int, noise: int, **rest: int) -> int:
    decoder, summed = Z * H + H + M * D * (H + 1), B * M * D * (L > 1)
    return e * (L * B * (S + M) * D + 2 * B * Z + decoder + L * S * D + summed) + 16 * noise


def _vae_bwd_hidden(e: int, B: int, M: int, D: int, H: int, shares: int, **rest: int) -> int:
    return e * (B * M * D + M * D * H) + 4 * shares * B * H


def _vae_bwd_latent(e: int, B: int, Z: int, H: int, noise: int, n: int, shares: int, **rest: int) -> int:
    carried = 4 * B * Z * (n > 1)  # dz goes from one of n decoders' launches to the next
    return e * (4 * B * Z + 2 * (Z * H + H)) + 4 * B * (1 + shares * H) + 16 * noise + carried


def _adaptive_mix(e: int, B: int, N: int, P: int, D: int, **rest: int) -> int:
    return e * (B * N * D + P * N + B * P * D) + 4 * (2 * B * N + P)


def _adaptive_parameters(e: int, B: int, P: int, D: int, H: int, channels: int, hidden: int) -> int:
    return e * (2 * D + P + 2 * D * H + B * D * channels + B * P * H * hidden) + 4 * P


def _adaptive_fwd(e: int, B: int, N: int, P: int, D: int, H: int, channels: int, hidden: int, **rest: int) -> int:
    return e * 2 * B * P * D + _adaptive_parameters(e, B, P, D, H, channels, hidden)


def _adaptive_bwd_prompts(
    e: int, B: int, N: int, P: int, D: int, H: int, channels: int, hidden: int, **rest: int
) -> int:
    return e * 3 * B * P * D + _adaptive_parameters(e, B, P, D, H, channels, hidden) + 4 * B * P * (2 * H + 2)


def _adaptive_bwd_tokens(e: int, B: int, N: int, P: int, D: int, wanted: int, **rest: int) -> int:
    return e * (B * N * D * (1 + wanted) + 2 * D + P * N + B * P * D) + 4 * (2 * B * N + B * P * N)


def _adaptive_bwd_weights(e: int, B: int, P: int, D: int, H: int, channels: int, shares: int, **rest: int) -> int:
    return e * (3 * B * P * D + 2 * D + P + B * D * channels) + 4 * (2 * B * P * H + P + shares * (2 + 2 * H) * D)


def _adaptive_sum_shares(e: int, B: int, N: int, P: int, D: int, H: int, shares: int, **rest: int) -> int:
    return 4 * (B * P * (N + 2) + 2 * P + shares * (2 + 2 * H) * D) + e * (P * N + (2 + 2 * H) * D)


def _add_norm_fwd(e: int, N: int, D: int) -> int:
    return e * 4 * N * D + 8 * N


def _add_norm_bwd(e: int, N: int, D: int) -> int:
    return e * 4 * N * D + 8 * N


FORMULAS: dict[str, Callable[..., int]] = {
    "_add_norm_fwd": _add_norm_fwd,
    "_add_norm_bwd": _add_norm_bwd,
    "_library_prompts_fwd": _library_fwd,
    "_library_prompts_bwd_norm": _library_bwd_norm,
    "_library_prompts_bwd_logits": _library_bwd_logits,
    "_library_prompts_bwd_library": _library_bwd_library,
    "_vae_prompts_fwd": _vae_fwd,
    "_vae_prompts_bwd_decoder": _vae_bwd_decoder,
    "_vae_prompts_bwd_latent": _vae_bwd_latent,
    "_vae_prompts_bwd_hidden": _vae_bwd_hidden,
    "_prefix_attention_fwd": _attention_fwd,
    "_prefix_attention_bwd_queries": _attention_bwd_queries,
    "_prefix_attention_bwd_tokens": _attention_bwd_tokens,
    "_prefix_attention_bwd_prefix": _attention_bwd_prefix,
    "_prefix_attention_sum_runs": _attention_sum_runs,
    "_adaptive_prompts_mix": _adaptive_mix,
    "_adaptive_prompts_fwd": _adaptive_fwd,
    "_adaptive_prompts_bwd_prompts": _adaptive_bwd_prompts,
    "_adaptive_prompts_bwd_tokens": _adaptive_bwd_tokens,
    "_adaptive_prompts_bwd_weights": _adaptive_bwd_weights,
    "_adaptive_prompts_sum_shares": _adaptive_sum_shares,
}


def formula(kernel: str, itemsize: int, sizes: Mapping[str, int]) -> int:
    """Bytes of one launch of `kernel`."""
    return FORMULAS[kernel](itemsize, **sizes)
