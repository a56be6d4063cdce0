"""The patch embedding as a linear map from pixels to tokens, and its inverses.

A patch of pixels x ∈ [0, 1]^{3p²} becomes the token e = W x + b, with the image's mean and standard deviation folded
in. Which x gives a wanted token? Where W has rank D, infinitely many or exactly one; else none, and the nearest is
taken.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from fastprompt.vit import FrozenSwin, FrozenViT
from fastprompt.vit.reference import position_embedding

RANK_TOLERANCE = 1e-9
STEPS = 200

Box = tuple[Tensor, Tensor]
"""Lowest and highest value of each pixel, (3p²,) or ()."""

UNIT: Box = (torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))


@dataclasses.dataclass(frozen=True)
class Projection:
    """e = weight · x + bias for pixels x in [0, 1], channel by channel and row by row: float64 on the CPU.

    Attributes:
        weight: (D, 3p²). bias: (D,). inverse: (3p², D), the pseudo-inverse of the weight.
        singular: (min(D, 3p²),) singular values, falling.
        mean, std: (3p²,) by which the backbone normalises pixels.
    """

    weight: Tensor
    bias: Tensor
    inverse: Tensor
    singular: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, backbone: FrozenViT) -> Projection:
        """
        Raises:
            TypeError: `backbone` is no FrozenViT.
            ValueError: it is a Swin transformer, or norms its patch embedding, which is then not linear.
        """
        if not isinstance(backbone, FrozenViT):
            raise TypeError(f"backbone must be a FrozenViT, got {type(backbone).__name__}")
        if isinstance(backbone, FrozenSwin) or backbone.patch_norm is not None:
            raise ValueError(f"backbone {backbone.spec.name} norms its patch embedding, which has no linear inverse")
        kernel = backbone.patch_weight.detach().double().cpu()  # (D, 3, p, p)
        mean, std = (torch.tensor(values, dtype=torch.float64).repeat_interleave(kernel[0, 0].numel())
                     for values in (backbone.mean, backbone.std))  # (3p²,)
        bias = torch.zeros(len(kernel), dtype=torch.float64) if backbone.patch_bias is None \
            else backbone.patch_bias.detach().double().cpu()
        weight = kernel.flatten(1) / std
        bias = bias - weight @ mean
        left, singular, right = torch.linalg.svd(weight, full_matrices=False)
        kept = singular > RANK_TOLERANCE * singular[0]
        inverse = (right[kept].T / singular[kept]) @ left[:, kept].T
        return cls(weight, bias, inverse, singular, mean, std)

    @property
    def rank(self) -> int:
        return int((self.singular > RANK_TOLERANCE * self.singular[0]).sum())

    @property
    def condition(self) -> float:
        """Largest over smallest singular value that counts."""
        return float(self.singular[0] / self.singular[self.rank - 1])

    def tokens(self, pixels: Tensor) -> Tensor:
        """(..., 3p²) pixels → (..., D) tokens."""
        return pixels @ self.weight.T + self.bias

    def tokens_in_float32(self, pixels: Tensor) -> Tensor:
        """`tokens` as a host computes them: pixels in float32, normalised, then multiplied."""
        normalised = (pixels.float() - self.mean.float()) / self.std.float()
        bias = (self.bias + self.weight @ self.mean).float()
        return (normalised @ (self.weight * self.std).float().T + bias).double()

    def pixels(self, tokens: Tensor, box: Box = UNIT) -> Tensor:
        """(n, D) tokens → (n, 3p²) pixels that give them, as near to the box as any that do.

        Least squares where no patch gives a token. x = W⁺ (e − b) + (I − W⁺W) y with y to minimise the squared distance
        to the box: smooth and convex, by L-BFGS (scipy).
        """
        least = (tokens - self.bias) @ self.inverse.T
        if self.rank == self.weight.shape[1]:
            return least

        def free(x: Tensor) -> Tensor:
            """The part of x that no token sees."""
            return x - (x @ self.weight.T) @ self.inverse.T

        def outside(flat: np.ndarray) -> tuple[float, np.ndarray]:
            x = least + free(torch.tensor(flat).view_as(least))
            beyond = x - x.clamp(*box)
            return 0.5 * float(beyond.square().sum()), free(beyond).numpy().ravel()

        start = free(((box[0] + box[1]) / 2).expand_as(least))
        found = scipy.optimize.minimize(outside, start.numpy().ravel(), jac=True, method="L-BFGS-B",
                                        options={"maxiter": STEPS})
        return least + free(torch.from_numpy(found.x).view_as(least))

    def picture(self, tokens: Tensor, box: Box = UNIT) -> Tensor:
        """(n, D) tokens → (n, 3p²) pixels in the box whose tokens are nearest.

        min ‖W x + b − e‖² over the box: convex, by L-BFGS-B (scipy), from what `pixels` gives, cut off.
        """
        start = self.pixels(tokens, box).clamp(*box)

        def distance(flat: np.ndarray) -> tuple[float, np.ndarray]:
            beside = self.tokens(torch.tensor(flat).view_as(start)) - tokens
            return 0.5 * float(beside.square().sum()), (beside @ self.weight).numpy().ravel()

        bounds = scipy.optimize.Bounds(*(side.expand_as(start).numpy().ravel() for side in box))
        found = scipy.optimize.minimize(distance, start.numpy().ravel(), jac=True, method="L-BFGS-B", bounds=bounds,
                                        options={"maxiter": STEPS})
        return torch.from_numpy(found.x).view_as(start)


def slot_positions(backbone: FrozenViT, placement: str, rows: int) -> tuple[Tensor, Tensor]:
    """What the host's position embedding adds where prompts are pixels.

    Args:
        placement: "extend" or "replace". rows: rows of patches that are prompts, the lowest.

    Returns:
        (rows · columns, D), of the prompts' places, and (N, D), how much more than the backbone's own the host adds
        to the image's patches: 0 unless it resamples. In float64 on the CPU.
    """
    height, width = backbone.grid
    prefix = backbone.num_prefix if backbone.spec.pos_on_prefix else 0
    if backbone.pos_embed is None:
        zeros = torch.zeros(height * width, backbone.width, dtype=torch.float64)
        return zeros.new_zeros(rows * width, backbone.width), zeros
    own = backbone.pos_embed[0, prefix:].detach().double().cpu()
    if placement == "replace":
        return own[(height - rows) * width:], torch.zeros_like(own)
    resampled = position_embedding(backbone, (height + rows, width))
    assert resampled is not None
    resampled = resampled[0, prefix:].detach().double().cpu()
    return resampled[height * width:], resampled[:height * width] - own
