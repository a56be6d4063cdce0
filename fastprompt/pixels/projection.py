"""The patch embedding as a linear map from pixels to tokens, and its inverses.

A patch of pixels x ∈ [0, 1]^{3p²} becomes the token e = W x + b, with the image's mean and standard deviation folded
in. If W has rank D, one or infinitely many x give a wanted token; otherwise there may be none, and the nearest x is
used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastprompt.arguments import ArgumentTypeError
from fastprompt.extras import needed
from fastprompt.vit import FrozenViT
from fastprompt.vit.reference import position_embedding

RANK_TOLERANCE = 1e-9
STEPS = 200
NOISE_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class Projection:
    """e = weight · x + bias for pixels x in [0, 1], ordered by channel, then by row; float64 on the CPU.

    Attributes:
        weight: (D, 3p²). bias: (D,). inverse: (3p², D), the pseudo-inverse of the weight.
        singular: (min(D, 3p²),) singular values in descending order.
        mean, std: (3p²,), the backbone's normalisation of each pixel.
    """

    weight: Tensor
    bias: Tensor
    inverse: Tensor
    singular: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, backbone: FrozenViT, before_norm: bool = False) -> Projection:
        """Return the projection of a backbone's patch embedding.

        Args:
            before_norm: ignore the norm that some backbones have after the patch embedding.

        Raises:
            TypeError: `backbone` is not a FrozenViT.
            ValueError: the patch embedding is followed by a norm (as in Swin), so it is not linear.
        """
        if not isinstance(backbone, FrozenViT):
            raise ArgumentTypeError("backbone", f"must be a FrozenViT, got {type(backbone).__name__}")
        if not before_norm and is_normed(backbone):
            raise ValueError(f"backbone {backbone.spec.name} norms its patch embedding, which has no linear inverse")
        kernel = backbone.patch_weight.detach().double().cpu()  # (D, 3, p, p)
        mean, std = (
            torch.tensor(values, dtype=torch.float64).repeat_interleave(kernel[0, 0].numel())
            for values in (backbone.mean, backbone.std)
        )  # (3p²,)
        bias = (
            torch.zeros(len(kernel), dtype=torch.float64)
            if backbone.patch_bias is None
            else backbone.patch_bias.detach().double().cpu()
        )
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
        """Ratio of the largest to the smallest non-zero singular value."""
        return float(self.singular[0] / self.singular[self.rank - 1])

    def tokens(self, pixels: Tensor) -> Tensor:
        """Map pixels (..., 3p²) to tokens (..., D)."""
        return pixels @ self.weight.T + self.bias

    def tokens_in_float32(self, pixels: Tensor) -> Tensor:
        """Compute `tokens` as a host does: normalise float32 pixels, then multiply."""
        normalised = (pixels.float() - self.mean.float()) / self.std.float()
        bias = (self.bias + self.weight @ self.mean).float()
        return (normalised @ (self.weight * self.std).float().T + bias).double()

    def pixels(self, tokens: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Find patches that give the tokens at every place: W (library[m] + offset[k]) + b + places[k] = tokens[m].

        If no patch gives a token, the least-squares solution is used. Among all solutions, the one nearest to
        pictures is chosen: the components of library and offset in the null space of W minimise
        ½ Σ dist(library[m] + offset[k], [0, 1])², which is smooth and convex, by L-BFGS (scipy).

        Args:
            tokens: (M, D). places: (K, D), what the host adds to the token at each place.

        Returns:
            library (M, 3p²), offset (K, 3p²).
        """
        library, offset = (tokens - self.bias) @ self.inverse.T, -places @ self.inverse.T
        if self.rank == self.weight.shape[1]:
            return library, offset

        def free(x: Tensor) -> Tensor:
            """Return the part of x in the null space of W."""
            return x - (x @ self.weight.T) @ self.inverse.T

        def outside(of_library: Tensor, of_offset: Tensor) -> tuple[float, Tensor, Tensor]:
            value, *gradients = _outside(library + free(of_library), offset + free(of_offset))
            return value, free(gradients[0]), free(gradients[1])

        of_library, of_offset = _minimise(outside, torch.full_like(library, 0.5), torch.zeros_like(offset))
        return library + free(of_library), offset + free(of_offset)

    def picture(self, tokens: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """`pixels` for a host that clips them to [0, 1]: find the pictures nearest to the tokens.

        Minimises ½ Σ ‖W x + b + places[k] − tokens[m]‖² + ½ μ Σ dist(x, [0, 1])² with x = library[m] + offset[k]. The
        problem is smooth and convex; it is solved by L-BFGS (scipy) in float32, starting from `pixels` or from grey,
        whichever has the lower value. μ is the mean of W's squared singular values, the average cost in tokens of
        clipping.
        """
        weight, wanted, added = self.weight.float(), (tokens - self.bias).float(), places.float()
        penalty = float(weight.square().sum()) / weight.shape[1]

        def distance(library: Tensor, offset: Tensor) -> tuple[float, Tensor, Tensor]:
            # an error is the sum of an entry's part (M, D) and a place's part (K, D), so no (K, M, D) is needed
            entries, slots = library @ weight.T - wanted, offset @ weight.T + added
            (m, of_entries), (k, of_slots) = ((len(part), part.sum(dim=0)) for part in (entries, slots))
            squares = k * entries.square().sum() + m * slots.square().sum() + 2 * of_entries @ of_slots
            value, of_library, of_offset = _outside(library, offset)
            return (
                0.5 * float(squares) + penalty * value,
                (k * entries + of_slots) @ weight + penalty * of_library,
                (m * slots + of_entries) @ weight + penalty * of_offset,
            )

        exact = [part.float() for part in self.pixels(tokens, places)]
        grey = [torch.full_like(exact[0], 0.5), torch.zeros_like(exact[1])]
        return _minimise(distance, *min((exact, grey), key=lambda start: distance(*start)[0]))

    def undo(self, change: Tensor, picture: bool = False) -> Tensor:
        """Find pixels that subtract `change` from an image's tokens when added to the image: (N, D) → (N, 3p²).

        Args:
            picture: whether the host clips the sum to [0, 1]. If so, the result is the one among Tikhonov's solutions
                −(WᵀW + λ)⁻¹Wᵀ change and zero that leaves the least of the change on images of noise.
        """
        found = -change @ self.inverse.T
        if not picture:
            return found
        square, scale = self.weight @ self.weight.T, float(self.singular[0]) ** 2
        unit = torch.eye(len(square), dtype=square.dtype)
        damped = [-torch.linalg.solve(square + scale * 10.0**-i * unit, change.T).T @ self.weight for i in range(9)]
        return min((found, *damped, torch.zeros_like(found)), key=lambda added: self.left_over(change, added))

    def left_over(self, change: Tensor, added: Tensor) -> float:
        """Return the fraction of ‖change‖ that is left when `added` pixels undo it in 8-bit images of noise."""
        noise = torch.rand(NOISE_IMAGES, *added.shape, generator=torch.Generator().manual_seed(0), dtype=added.dtype)
        difference = ((noise + added) * 255).round().clamp(0, 255) / 255 - noise
        left = difference @ self.weight.T + change
        return float(left.square().sum(dim=(1, 2)).mean().sqrt() / change.norm().clamp_min(1e-30))


def _outside(library: Tensor, offset: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return ½ Σ dist(library[m] + offset[k], [0, 1])² for (M, P) and (K, P), and its gradients, place by place."""
    value, of_library, of_offset = 0.0, torch.zeros_like(library), torch.zeros_like(offset)
    for added, gradient in zip(offset, of_offset, strict=True):
        beyond = library + added
        beyond -= beyond.clamp(0, 1)
        value += 0.5 * float(beyond.square().sum())
        of_library += beyond
        gradient += beyond.sum(dim=0)
    return value, of_library, of_offset


def _minimise(
    objective: Callable[[Tensor, Tensor], tuple[float, Tensor, Tensor]], library: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the float64 minimiser of a convex function with gradients, evaluated in the dtype of the start."""
    sizes, dtype = (library.numel(), offset.numel()), library.dtype

    def parts(flat: np.ndarray, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        first, second = torch.tensor(flat, dtype=dtype).split(sizes)
        return first.view_as(library), second.view_as(offset)

    def flattened(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, *gradients = objective(*parts(flat, dtype))
        return value, torch.cat([gradient.ravel() for gradient in gradients]).double().numpy()

    start = torch.cat([library.ravel(), offset.ravel()]).double().numpy()
    with needed("report", "finding the nearest pixels"):
        from scipy.optimize import minimize

    found = minimize(flattened, start, jac=True, method="L-BFGS-B", options={"maxiter": STEPS})
    return parts(found.x, torch.float64)


def is_normed(backbone: FrozenViT) -> bool:
    """Whether a norm follows the patch embedding."""
    return backbone.staged or backbone.patch_norm is not None


def slot_positions(backbone: FrozenViT, placement: str, rows: int) -> tuple[Tensor, Tensor]:
    """Return what the host's position embedding adds if prompts are pixels.

    Args:
        placement: "extend" or "replace".
        rows: number of rows of patches, at the bottom, that are prompts.

    Returns:
        (rows · columns, D), the position embedding at the prompts' places, and (N, D), how it differs from the
        backbone's own at the image's patches, which is 0 unless the host resamples it. Both are float64 on the CPU.
    """
    height, width = backbone.spec.grid
    prefix = backbone.num_prefix if backbone.spec.pos_on_prefix else 0
    if backbone.pos_embed is None:
        zeros = torch.zeros(height * width, backbone.patch_width, dtype=torch.float64)
        return zeros.new_zeros(rows * width, backbone.patch_width), zeros
    own = backbone.pos_embed[0, prefix:].detach().double().cpu()
    if placement == "replace":
        return own[(height - rows) * width :], torch.zeros_like(own)
    resampled = position_embedding(backbone, (height + rows, width))
    assert resampled is not None
    resampled = resampled[0, prefix:].detach().double().cpu()
    return resampled[height * width :], resampled[: height * width] - own
