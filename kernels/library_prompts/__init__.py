"""PGN's prompt mixture: each prompt is a weighted sum of the tokens of a shared library."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.kernels import dispatch
from fastprompt.kernels.library_prompts import reference
from fastprompt.kernels.library_prompts.reference import PreNorm

__all__ = ["ACTIVATIONS", "PreNorm", "library_prompts"]

ACTIVATIONS = ("softmax", "sigmoid")


def library_prompts(
    logits: Tensor,
    library: Tensor,
    activation: str = "softmax",
    *,
    out: Tensor | None = None,
    slot: int = 0,
    patches: Tensor | None = None,
    prefix: Tensor | None = None,
    position: Tensor | None = None,
    pre_norm: PreNorm | None = None,
) -> Tensor:
    """Prompts = activation(logits) · library (PGN §3, the token library), alone, in a sequence, or with all of one.

    Args:
        logits: (B, K, M), one row of selection scores per prompt.
        library: (M, D), the learned tokens.
        activation: "softmax" over the library (each prompt a convex mix) or "sigmoid".
        out: (B, T, D), a sequence changed in place: the prompts are written into its rows slot … slot + K − 1, which
            saves the pass that would concatenate them. None: a fresh tensor.
        patches: (B, N, D), patch tokens that stand in no sequence yet: a fresh one, [prefix, patches, prompts] as PGN
            orders them, is written in one pass.
        prefix: (1, R, D), class token and registers, before the patches. Only with `patches`.
        position: (1, N, D), the position embedding of the patches, or (1, R + N, D), that of the prefix too. Prompts
            have none. Only with `patches`.
        pre_norm: the backbone's LayerNorm before block 0 (CLIP's `ln_pre`), applied to all rows that are written: the
            prompts, rounded to their dtype first, and with `patches` the whole sequence.

    Returns:
        (B, K, D) prompts in the library's dtype, or `out`, or (B, R + N + K, D) in the dtype of `patches`; weights
        and norm are computed in float32 or wider.

    Raises:
        TypeError: a tensor is no floating-point tensor.
        ValueError: shapes, `slot` or `activation` do not fit, or arguments that exclude each other are given.
        RuntimeError: `use_backend` asks for an implementation that cannot run.
    """
    others = (patches, prefix, position, pre_norm)
    call = dispatch.call_of(
        "library_prompts", logits, library, activation, out, slot, patches, prefix, position, *(pre_norm or ())
    )
    plans = dispatch.recall(call, "triton")
    if plans is not None:
        from fastprompt.kernels.library_prompts import triton

        return triton.library_prompts(logits, library, activation, out, slot, *others, plans)
    constants = {"patches": patches, "prefix": prefix, "position": position}
    if pre_norm is not None:
        constants |= {"pre_norm.weight": pre_norm[0], "pre_norm.bias": pre_norm[1]}
    for name, tensor in {"logits": logits, "library": library, "out": out, **constants}.items():
        if (tensor is not None or name in ("logits", "library")) and not (
            isinstance(tensor, Tensor) and tensor.is_floating_point()
        ):
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(tensor, 'dtype', type(tensor))}")
    if logits.ndim != 3:
        raise ValueError(f"logits must have shape (B, K, M), got {tuple(logits.shape)}")
    if library.ndim != 2 or library.shape[0] != logits.shape[2]:
        raise ValueError(
            f"library must have shape (M, D) with M = {logits.shape[2]} as in logits, got {tuple(library.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if out is not None:
        _check_out(out, logits, library, slot)
    _check_sequence(logits, library, out, patches, prefix, position)
    if pre_norm is not None and (pre_norm[0].shape != library.shape[1:] or pre_norm[1].shape != library.shape[1:]):
        raise ValueError(
            f"pre_norm must hold weight and bias of shape ({library.shape[1]},), "
            f"got {tuple(pre_norm[0].shape)} and {tuple(pre_norm[1].shape)}"
        )
    obstacle = _unsupported((logits, library, out), [x for x in constants.values() if x is not None])
    if (
        dispatch.choose(
            "library_prompts",
            logits.device.type,
            obstacle,
            arguments=(logits, library, activation, None if out is None else out.detach(), slot, *others),
            call=call,
        )
        == "triton"
    ):
        from fastprompt.kernels.library_prompts import triton

        return triton.library_prompts(logits, library, activation, out, slot, *others)
    return reference.library_prompts(logits, library, activation, out, slot, *others)


def _unsupported(variables: tuple[Tensor | None, ...], constants: list[Tensor]) -> str:
    """Why the Triton kernels cannot take this call; empty: they can."""
    if any(x is not None and x.dtype == torch.float64 for x in (*variables, *constants)):
        return "float64 is left to PyTorch"
    if torch.is_grad_enabled() and any(x.requires_grad for x in constants):
        return "the kernels have no gradient of patches, prefix, position and pre_norm"
    if any(x.ndim == 1 and not x.is_contiguous() for x in constants):
        return "pre_norm must be contiguous"
    library = variables[1]
    return "" if library is not None and library.shape[0] else "the library is empty"


def _check_out(out: Tensor, logits: Tensor, library: Tensor, slot: int) -> None:
    (b, k, _), d = logits.shape, library.shape[1]
    if out.ndim != 3 or out.shape[0] != b or out.shape[2] != d:
        raise ValueError(f"out must have shape ({b}, T, {d}), got {tuple(out.shape)}")
    if not 0 <= slot <= out.shape[1] - k:
        raise ValueError(f"slot must leave room for {k} prompts in {out.shape[1]} rows, got {slot}")


def _check_sequence(
    logits: Tensor,
    library: Tensor,
    out: Tensor | None,
    patches: Tensor | None,
    prefix: Tensor | None,
    position: Tensor | None,
) -> None:
    if patches is None:
        for name, tensor in (("prefix", prefix), ("position", position)):
            if tensor is not None:
                raise ValueError(f"{name} needs patches")
        return
    b, d = logits.shape[0], library.shape[1]
    if out is not None:
        raise ValueError("out must be None where patches are given: they become a fresh sequence")
    if patches.ndim != 3 or patches.shape[0] != b or patches.shape[2] != d:
        raise ValueError(f"patches must have shape ({b}, N, {d}), got {tuple(patches.shape)}")
    if prefix is not None and (prefix.ndim != 3 or prefix.shape[0] != 1 or prefix.shape[2] != d):
        raise ValueError(f"prefix must have shape (1, R, {d}), got {tuple(prefix.shape)}")
    n, rows = patches.shape[1], patches.shape[1] + (0 if prefix is None else prefix.shape[1])
    if position is not None and tuple(position.shape) not in ((1, n, d), (1, rows, d)):
        raise ValueError(f"position must have shape (1, {n}, {d}) or (1, {rows}, {d}), got {tuple(position.shape)}")
