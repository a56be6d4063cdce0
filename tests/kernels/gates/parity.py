"""Kernels against PyTorch in float64, in the interpreter and on a GPU.

Tolerance of every output and gradient: max|kernel − f64| ≤ 2 · max|PyTorch, same dtype − f64| + eps · max|f64|.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from spec import Case, Inputs, cast
from torch import Tensor


def drawn(case: Case, device: str = "cpu") -> Inputs:
    """The case's inputs in float64, the same at every call on a device."""
    generator = torch.Generator(device).manual_seed(0)
    found = case.inputs(lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64, device=device))
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in found.items()}


def cotangents_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of outputs, the same for all outputs of these shapes."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [
        torch.randn(o.shape, generator=generator, dtype=torch.float64, device=o.device).to(o.dtype) for o in outputs
    ]


def evaluate(
    call: Callable[[Inputs], Sequence[Tensor]], inputs: Inputs, grads: tuple[str, ...], cotangents: list[Tensor]
) -> dict[str, Tensor]:
    """Outputs and gradients by name; `cotangents` are the gradients of the outputs, filled on first use."""
    outputs = tuple(call(inputs))
    if not cotangents:
        cotangents += cotangents_of(outputs)
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    if grads:
        scaled = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        gradients = torch.autograd.grad(
            [o for o, _ in scaled], [inputs[name] for name in grads], [c for _, c in scaled]
        )
        found |= {f"d {name}": gradient for name, gradient in zip(grads, gradients, strict=True)}
    return found


def error(found: Tensor, exact: Tensor) -> float:
    """max|found − exact|, infinite where the two are not finite in the same places."""
    found = found.double()
    if found.shape != exact.shape or not torch.equal(found.isnan(), exact.isnan()):
        return float("inf")
    if not torch.equal(found.isinf() * found.sign(), exact.isinf() * exact.sign()):
        return float("inf")
    difference = torch.where(exact.isfinite(), found - exact, torch.zeros_like(exact))
    return float(difference.abs().max()) if difference.numel() else 0.0


def same(found: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    """Assert that two tensors of one dtype and shape differ by at most `tolerance` of the largest value."""
    assert found is not None
    assert expected is not None
    assert found.dtype == expected.dtype
    worst, scale = error(found.detach(), expected.detach().double()), float(expected.detach().abs().max())
    assert worst <= tolerance * scale, f"differs by {worst}, largest value {scale}"


def compare(
    case: Case,
    dtype: torch.dtype,
    module: ModuleType,
    device: str = "cpu",
    runs: int = 1,
    within: AbstractContextManager[Any] | None = None,
) -> list[dict[str, Any]]:
    """One row per output and gradient of the kernels: error, budget, PyTorch's error, and whether all is well.

    Args:
        runs: of the kernels; all must give the same bits. within: a context that they are run in.
    """
    rounded = cast(drawn(case, device), dtype, case.kept, ())
    cotangents: list[Tensor] = []
    peer = evaluate(case.reference, cast(rounded, dtype, case.kept, case.grads), case.grads, cotangents)
    exact = evaluate(case.reference, cast(rounded, torch.float64, (), case.grads), case.grads, cotangents)
    with within or nullcontext():
        found, *again = [
            evaluate(
                lambda x: case.kernel(module, x), cast(rounded, dtype, case.kept, case.grads), case.grads, cotangents
            )
            for _ in range(runs)
        ]
    rows = []
    for name, value in found.items():
        scale = float(exact[name].nan_to_num(0, 0, 0).abs().max()) if exact[name].numel() else 0.0
        reference = error(peer[name], exact[name])
        budget = 2 * reference + torch.finfo(peer[name].dtype).eps * scale
        repeated = all(torch.equal(value.nan_to_num(), other[name].nan_to_num()) for other in again)
        ok = error(value, exact[name]) <= budget and value.dtype == peer[name].dtype and repeated
        if case.exact and name.startswith("output"):
            ok = ok and torch.equal(value, peer[name])
        rows.append(
            {
                "case": case.name,
                "dtype": str(dtype).split(".")[1],
                "tensor": name,
                "ok": ok,
                "error": error(value, exact[name]),
                "budget": budget,
                "peer": reference,
                "repeated": repeated,
            }
        )
    return rows
