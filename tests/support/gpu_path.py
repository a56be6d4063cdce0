"""The path that sequences take on a GPU, on a CPU: rows are written into their slots, ops run as kernels would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastprompt.generators import pgn, rgb_pgn, v2apt, vapt
from fastprompt.vit import forward

OPS = [
    (forward, "add_norm"),
    (forward, "prefix_attention"),
    (pgn, "library_prompts"),
    (rgb_pgn, "library_prompts"),
    (vapt, "adaptive_prompts"),
    (v2apt, "vae_prompts"),
]
"""Where the graph calls an op that has Triton kernels."""


class NoConcatenation(TorchDispatchMode):
    """Refuses to concatenate token rows of `width` or their heads' (B, heads, T, d); `whole` counts the sequences that
    the mixture wrote.

    `exempt`: inside an op whose reference stands in for its kernel.
    """

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.widths, self.head_dim, self.exempt, self.whole = (width, 2 * width, 3 * width), head_dim, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.cat and not self.exempt:
            tokens = out.ndim >= 2 and out.shape[-1] in self.widths and out.shape[0] > 1
            heads = out.ndim == 4 and out.shape[-1] == self.head_dim
            if tokens or heads:
                raise AssertionError(f"{tuple(out.shape)} was concatenated")
        return out


def take(patch: pytest.MonkeyPatch, mode: NoConcatenation, around: Callable[[Any], Any] = lambda op: op) -> None:
    """Take that path; `around` an op: how it is called."""

    def called(op: Any) -> Any:
        run = around(op)

        def exempted(*arguments: Any, **options: Any) -> Tensor:
            mode.whole += options.get("patches") is not None
            mode.exempt += run is op
            try:
                return run(*arguments, **options)
            finally:
                mode.exempt -= run is op

        return exempted

    patch.setattr(forward, "in_slots", lambda x: True)
    for module, name in OPS:
        patch.setattr(module, name, called(getattr(module, name)))
