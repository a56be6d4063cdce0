"""`adaptive_prompts` in C++ (`csrc/`): one pass over the tokens for their statistics, one for the mixture.

The norm's affine acts on the P mixed rows. On AMX, M · ((X − mean) / std) = (M / std) · X − (M / std) · mean with
bfloat16 tokens X as they are, and M / std as a sum of three bfloat16 numbers: the products are exact. All sums are
float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.kernels.adaptive_prompts.reference import ACTIVATIONS

torch.library.define(
    "fastprompt::adaptive_prompts_native",
    "(Tensor tokens, Tensor norm_weight, Tensor norm_bias, Tensor mix, Tensor bias, Tensor? w1, "
    "Tensor? w2, int activation, float eps) -> Tensor",
)
OPERATOR = torch.ops.fastprompt.adaptive_prompts_native.default


@torch.library.register_fake("fastprompt::adaptive_prompts_native")
def _fake(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mix: Tensor,
    bias: Tensor,
    w1: Tensor | None,
    w2: Tensor | None,
    activation: int,
    eps: float,
) -> Tensor:
    return mix.new_empty(tokens.shape[0], mix.shape[0], tokens.shape[2])


def adaptive_prompts(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mix: Tensor,
    bias: Tensor,
    w1: Tensor | None,
    w2: Tensor | None,
    scale: Tensor | float,
    activation: str,
    eps: float,
    channel_mask: Tensor | None,
    hidden_mask: Tensor | None,
    stats: Tensor | None = None,
) -> Tensor:
    """See `fastprompt.kernels.adaptive_prompts.adaptive_prompts`; without masks and with statistics of its own."""
    if w1 is not None and w2 is not None:
        w1, w2 = w1.contiguous(), (w2 * scale).t().contiguous()  # (r, D) both
    constants = (norm_weight.contiguous(), norm_bias.contiguous(), mix.contiguous(), bias.contiguous())
    return OPERATOR(tokens, *constants, w1, w2, list(ACTIVATIONS).index(activation), eps)
