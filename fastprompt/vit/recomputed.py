"""MLPs that keep their block's residual alone for the backward, where they compute norm, fc1 and activation again.

Nothing is approximate: the backward sees the numbers that the forward saw. A frozen fc2 needs no input for its
backward, so it does not run again. Some rows are computed at a time: the hidden activations of all rows never exist at
once, neither in the forward nor in the backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fastprompt.vit import compressed, reference
from fastprompt.vit.compressed import joined
from fastprompt.vit.linear import input_gradient
from fastprompt.vit.weights import Mlp, Norm

BITS = (*compressed.BITS, 0)
"""What `Keep.bits` can be."""
CHUNK = {"cpu": 2**22}
"""Hidden numbers that exist at a time, by type of device."""
OTHER_CHUNK = 2**27


class Keep(NamedTuple):
    """What a block keeps of its MLP for the backward.

    Attributes:
        bits: bits of each derivative of the activation, 8 or 2 (`compressed.activation`); 0: nothing but the MLP's
            residual; None: what autograd keeps.
        again: whether the block is computed again, in the backward, where nobody reads what leaves it.
    """

    bits: int | None = None
    again: bool = False


ALL = Keep()


def mlp(norm: Norm | None, module: Mlp, x: Tensor, unread: bool = False) -> Tensor:
    """Compute mlp(norm(x)) for rows x (..., D) with frozen weights, keeping x alone for the backward.

    `unread`: nobody reads the result, which is then left uninitialised.
    """
    if not (torch.is_grad_enabled() and x.requires_grad) or torch._C._are_functorch_transforms_active():
        return _plain(norm, module, x)
    if torch.compiler.is_compiling():
        found: Tensor = checkpoint(_plain, norm, module, x, use_reentrant=False, preserve_rng_state=False)
        return found
    y: Tensor = _Recomputed.apply(x, norm, module, unread)
    return y


def _plain(norm: Norm | None, module: Mlp, x: Tensor) -> Tensor:
    return reference.mlp(module, x if norm is None else norm(x))


def chunk(module: Mlp, device: torch.device) -> int:
    """Return how many rows are computed at a time."""
    return max(1, CHUNK.get(device.type, OTHER_CHUNK) // module.fc1.num_outputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm | None, module: Mlp, unread: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.parts, kind = (norm, module), x.device.type
        ctx.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        if unread:
            return torch.empty_like(x)
        rows = x.detach().reshape(-1, x.shape[-1]).split(chunk(module, x.device))
        return joined([_plain(norm, module, part) for part in rows]).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (norm, module) = ctx.saved_tensors, ctx.parts
        size, found = chunk(module, x.device), []
        enabled, dtype = ctx.autocast
        for part, of_part in zip(
            x.reshape(-1, x.shape[-1]).split(size), grad.reshape(-1, grad.shape[-1]).split(size), strict=True
        ):
            with torch.enable_grad(), torch.autocast(x.device.type, dtype, enabled):
                rows = part.detach().requires_grad_()
                hidden = reference.hidden(module, rows if norm is None else norm(rows))
            of_hidden = input_gradient(module.fc2, of_part)
            hidden.backward(of_hidden.to(hidden.dtype))  # the rows are all that has a gradient
            found.append(rows.grad)
        return joined(found).view(x.shape), None, None, None
