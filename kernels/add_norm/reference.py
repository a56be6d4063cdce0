"""The specification of `add_norm` in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def add_norm(x: Tensor, branch: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `fastprompt.kernels.add_norm.add_norm`."""
    added = x + branch
    return added, F.layer_norm(added, x.shape[-1:], None, None, eps)
